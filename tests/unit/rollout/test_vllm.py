"""The vLLM back end against a real HTTP server: what it asks, what it makes of the answers, and what it refuses."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import Dots1ForCausalLM
from trl.generation import vllm_client

from dots_align.config import VllmSection, load_recipe
from dots_align.rollout.backend import RolloutBackend, refresh
from dots_align.rollout.engine import RolloutEngine
from dots_align.rollout.vllm import VllmBackend, known_wrong
from dots_align.stages import grpo
from dots_align.types import GenerationRequest, Sample, SamplingParams
from tests.unit.rollout.vllm_server import Road, VllmServer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def vllm_beside_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM is no dependency: TRL's client is told that it is there, and given the one function it takes from it."""
    monkeypatch.setattr(vllm_client, "is_vllm_available", lambda: True)
    monkeypatch.setattr(vllm_client, "get_ip", lambda: "127.0.0.1", raising=False)


@pytest.fixture
def server(model: Dots1ForCausalLM) -> Iterator[VllmServer]:
    with VllmServer(model) as running:
        yield running


def connect(server: VllmServer) -> VllmBackend:
    section = VllmSection(base_url=server.base_url, connection_timeout=0)
    return VllmBackend(section, server.model.config.vocab_size, CPU)


@pytest.fixture
def backend(server: VllmServer) -> VllmBackend:
    """One whose server has the right weights already."""
    found = connect(server)
    found.refusal = None
    return found


def requests(token_ids, **keys) -> list[GenerationRequest]:
    lengths = (5, 17, 3)
    return [
        GenerationRequest(prompt, 3, SamplingParams(max_tokens=9, stop_token_ids=tuple(range(80)), seed=i, **keys))
        for i, prompt in enumerate(token_ids(*lengths))
    ]


def assert_same(found: list[list[Sample]], expected: list[list[Sample]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert (a.response_ids, a.finish_reason, a.routes) == (b.response_ids, b.finish_reason, None)
            assert a.rollout_logprobs == pytest.approx(b.rollout_logprobs, abs=1e-5)
            assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "keys",
    [{}, {"temperature": 0.7}, {"top_k": 20, "top_p": 0.9}, {"min_p": 0.02}, {"temperature": 0.0}],
    ids=str,
)
def test_samples_are_those_of_the_engine_behind_the_server(backend: VllmBackend, model, token_ids, keys):
    wanted = requests(token_ids, **keys)
    finished: list[int] = []
    found = backend.generate(wanted, on_finished=finished.append)
    assert_same(found, RolloutEngine(model).generate(wanted))
    assert sum(finished) == 9
    reasons = {sample.finish_reason for group in found for sample in group}
    assert reasons == {"stop"} if keys.get("temperature") == 0 else {"stop", "length"}


def test_both_are_rollout_backends(backend: VllmBackend):
    generic: RolloutBackend = backend
    assert generic.generate([]) == []


def test_the_server_stops_where_the_request_says(backend: VllmBackend, server: VllmServer, token_ids):
    backend.generate(requests(token_ids)[:1])
    (asked,) = server.requests
    assert asked["ignore_eos"] is True
    assert asked["stop_token_ids"] == list(range(80))
    assert (asked["n"], asked["max_tokens"], asked["seed"], asked["logprobs"]) == (3, 9, 0, 0)


def test_what_is_still_in_line_is_not_asked_once_a_request_has_failed(
    backend: VllmBackend, token_ids, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def fails_at_first(number: int, request: GenerationRequest) -> list[Sample]:
        asked.append(number)
        if number == 0:
            raise ValueError("the first one")
        time.sleep(0.05)
        return []

    backend.section = backend.section.model_copy(update={"max_concurrent_requests": 1})
    monkeypatch.setattr(backend, "_samples", fails_at_first)
    with pytest.raises(ValueError, match="the first one"):
        backend.generate([GenerationRequest(prompt) for prompt in token_ids(*[3] * 40)])
    assert len(asked) < 40


class TestRefused:
    """Asks for what a server cannot do, and answers that cannot be right."""

    def test_routes(self, backend, token_ids):
        with pytest.raises(ValueError, match="does not tell the experts"):
            backend.generate(requests(token_ids), return_routes=True)

    def test_samples_begun_elsewhere(self, backend, token_ids):
        begun = (Sample([1], [-1.0], [-1.0], "abort"),)
        with pytest.raises(ValueError, match=r"request 0: .*cannot go on with samples begun"):
            backend.generate([GenerationRequest(token_ids(4)[0], 1, SamplingParams(), begun)])

    @pytest.mark.parametrize(
        ("request_", "message"),
        [
            (GenerationRequest([]), "request 0: the prompt is empty"),
            (GenerationRequest([5000]), "request 0: a token id lies outside the vocabulary"),
            (GenerationRequest([1], 0), "request 0: max_tokens and num_samples"),
            (GenerationRequest([1], 1, SamplingParams(max_tokens=4000)), "request 0: .*maximum context length"),
        ],
    )
    def test_impossible_requests(self, backend, request_, message):
        with pytest.raises(ValueError, match=message):
            backend.generate([request_])

    def test_a_sample_that_was_cut_short(self, backend, server, token_ids):
        server.cut = 4
        request = GenerationRequest(token_ids(5)[0], 1, SamplingParams(max_tokens=9))
        with pytest.raises(ValueError, match="ended a sample after 4 tokens, neither at a stop token nor"):
            backend.generate([request])

    def test_numbers_that_broke(self, backend, server, token_ids):
        server.broken = True
        with pytest.raises(ValueError, match=r"request 0: the server sent no log-probs \(or NaN\)"):
            backend.generate([GenerationRequest(token_ids(5)[0], 1, SamplingParams(max_tokens=3))])

    def test_a_server_without_the_right_options(self, model):
        for keys, message in [
            ({"logprobs_mode": "raw_logprobs"}, "start it with --logprobs-mode processed_logprobs"),
            ({"dtype": "torch.float16"}, "serves in torch.float16; start it with --dtype bfloat16"),
        ]:
            with VllmServer(model, **keys) as server, pytest.raises(ValueError, match=message):
                connect(server)
        with VllmServer(model) as server:
            server.development = False
            with pytest.raises(ValueError, match="VLLM_SERVER_DEV_MODE=1"):
                connect(server)

    def test_no_server(self):
        with pytest.raises(ValueError, match=r"rollout.vllm.base_url=http://127.0.0.1:9: .*can't be reached"):
            VllmBackend(VllmSection(base_url="http://127.0.0.1:9", connection_timeout=0), 512, CPU)

    def test_no_vllm_here(self, server, monkeypatch):
        monkeypatch.undo()
        with pytest.raises(ValueError, match=r"install the vllm of the server here too, or use rollout.backend=local"):
            connect(server)


@pytest.mark.parametrize(
    ("version", "dtype", "reason"),
    [
        ("0.9.1", torch.bfloat16, "scales the routed experts twice"),
        ("0.11.2", torch.float32, "scales the routed experts twice"),
        ("0.12.0", torch.bfloat16, "scales the shared experts too"),
        ("0.18.1", torch.bfloat16, "scales the shared experts too"),
        ("0.18.1.post1+cu129", torch.bfloat16, "scales the shared experts too"),
        ("0.19.0", torch.bfloat16, None),
        ("0.21.0", torch.float16, "wrong in float16"),
        ("0.22.0", torch.bfloat16, None),
        ("0.23.4", torch.float16, "wrong in float16"),
        ("0.24.0", torch.float16, None),
        ("0.31.0+cu129", torch.bfloat16, None),
        ("dev", torch.bfloat16, "no version that could be looked up"),
    ],
)
def test_known_wrong_versions(version, dtype, reason):
    found = known_wrong(version, dtype)
    assert (found is None) == (reason is None)
    if reason is not None:
        assert reason in (found or "")
        assert version in (found or "")


def test_a_wrong_server_is_refused_by_name(model):
    with (
        VllmServer(model, version="0.14.0") as server,
        pytest.raises(ValueError, match=r"vLLM 0.14.0: its dots1 scales the shared experts too.*backend=local"),
    ):
        connect(server)


class TestWeights:
    """Updates over everything but NCCL."""

    @pytest.fixture
    def trained(self, model: Dots1ForCausalLM) -> Dots1ForCausalLM:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for tensor in [*other.parameters(), *(b for n, b in other.named_buffers() if n.endswith("bias"))]:
                tensor.mul_(1.2)
        return other

    def join(self, backend: VllmBackend, road: Road, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("init_communicator", "update_named_params"):
            monkeypatch.setattr(backend.client, name, getattr(road, name))

    def test_an_update_arrives_under_the_hub_s_names(self, server, trained, token_ids, monkeypatch):
        backend, road, wanted = connect(server), Road(server), requests(token_ids)
        self.join(backend, road, monkeypatch)
        with pytest.raises(ValueError, match="has not been sent any weights yet"):
            backend.generate(wanted)
        refresh(backend, trained)
        assert_same(backend.generate(wanted), RolloutEngine(trained).generate(wanted))
        names = [name for name, _, _ in road.metadata]
        assert "model.layers.1.mlp.experts.15.up_proj.weight" in names
        assert "model.layers.1.mlp.gate.e_score_correction_bias" in names
        assert not any("rotary" in name or "gate_up" in name for name in names)
        assert "/reset_prefix_cache" in server.calls

    @pytest.mark.parametrize("lost", ["e_score_correction_bias", "experts.3.down_proj.weight"])
    def test_what_gets_lost_is_noticed(self, server, trained, token_ids, monkeypatch, lost):
        backend = connect(server)
        self.join(backend, Road(server, lost), monkeypatch)
        with pytest.raises(ValueError, match=r"computes something else than the trainer: the log-probs of the canary"):
            refresh(backend, trained)
        with pytest.raises(ValueError, match=r"not generating: .*computes something else"):
            backend.generate(requests(token_ids))
        self.join(backend, Road(server), monkeypatch)
        refresh(backend, trained)
        backend.generate(requests(token_ids))

    def test_without_a_gpu(self, server, trained):
        with pytest.raises(ValueError, match=r"sending weights to the vLLM server at .* needs a CUDA device"):
            refresh(connect(server), trained)


def test_grpo_learns_the_same_from_either_back_end(model_dir: Path, server, tmp_path, monkeypatch):
    road = Road(server)
    for name in ("init_communicator", "update_named_params"):
        monkeypatch.setattr(
            vllm_client.VLLMClient, name, lambda _client, *args, name=name: getattr(road, name)(*args)
        )  # fmt: skip
    (tmp_path / "reward.py").write_text("def even(r):\n    return sum(t % 2 == 0 for t in r.response_ids) / 8\n")
    recipe = tmp_path / "grpo.yaml"
    recipe.write_text(
        f"""
stage: grpo
output_dir: {tmp_path}/local
model: {{path: {model_dir}}}
data: {{path: "synthetic:prompts", max_samples: 16}}
rollout: {{group_size: 4, max_tokens: 8}}
rewards: [{{function: "{tmp_path}/reward.py:even"}}]
train: {{max_steps: 2, num_prompts_per_step: 4}}
optim: {{learning_rate: 1.0e-3}}
"""
    )
    grpo.run(load_recipe(recipe))
    keys = ["rollout.backend=vllm", f"rollout.vllm.base_url={server.base_url}", f"output_dir={tmp_path}/vllm"]
    grpo.run(load_recipe(recipe, keys))
    ours, theirs = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("local", "vllm")
    )
    assert [line["step"] for line in theirs] == [1, 2]
    for a, b in zip(ours, theirs, strict=True):
        for name in ("grpo/reward", "grpo/response_length", "grpo/loss", "grpo/grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5), name
        assert b["grpo/agreement_median"] < 1e-5
