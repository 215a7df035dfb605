"""The RL training engine: cutting the batch or stopping and resuming never changes a number."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import Dots1ForCausalLM, PreTrainedTokenizerFast

from dots_align.checkpoint import save_model
from dots_align.config import LoraSection, OptimSection
from dots_align.model.balance import BalanceLoss
from dots_align.model.dots1 import load_base_model
from dots_align.model.experts import IMPLEMENTATION
from dots_align.model.lora import add_adapter
from dots_align.model.router import LoadMonitor, moe_layers
from dots_align.model.training import ResponseScores, TrainingEngine, prompt_shares, response_scores
from dots_align.types import Trajectory

# A large epsilon keeps Adam from blowing the rounding of vanishing gradients up to whole steps.
OPTIM = OptimSection(learning_rate=1e-3, warmup_steps=2, weight_decay=0.1, adam_epsilon=1e-4)


@pytest.fixture
def trajectories(token_ids) -> list[Trajectory]:
    prompts, answers = token_ids(4, 9, 4, 30, 6, 1), token_ids(7, 1, 12, 3, 20, 5, seed=1)
    return [
        Trajectory(prompt, answer, [-1.0] * len(answer), i // 2, float(i % 2))
        for i, (prompt, answer) in enumerate(zip(prompts, answers, strict=True))
    ]


def grpo_like(trajectories: list[Trajectory]) -> Callable[[ResponseScores], tuple[torch.Tensor, dict[str, float]]]:
    """Clipped ratio times advantage, over the tokens of the whole batch."""
    tokens = sum(len(t.response_ids) for t in trajectories)

    def loss(scores: ResponseScores) -> tuple[torch.Tensor, dict[str, float]]:
        advantages = torch.tensor([1.0 if trajectories[i].reward else -0.5 for i in scores.members])[:, None]
        ratio = (scores.logprobs - scores.logprobs.detach()).exp()
        value = -(advantages * ratio * scores.mask).sum() / tokens
        return value, {"mean_logprob": float((scores.logprobs.detach() * scores.mask).sum() / scores.mask.sum())}

    return loss


def engine(model: Dots1ForCausalLM, micro_batch_tokens: int = 10_000) -> TrainingEngine:
    return TrainingEngine(model, OPTIM, 10, micro_batch_tokens, temperature=0.7)


def step(engine: TrainingEngine, trajectories: list[Trajectory]) -> dict[str, float]:
    return engine.train_batch(trajectories, range(len(trajectories)), grpo_like(trajectories))


def test_micro_batches_do_not_change_the_step(model: Dots1ForCausalLM, trajectories: list[Trajectory]) -> None:
    results = []
    for limit in (10_000, 40, 1):
        trained = engine(copy.deepcopy(model), limit)
        metrics = [step(trained, trajectories) for _ in range(2)]
        results.append((metrics, dict(trained.model.named_parameters())))
    (wanted, weights), *others = results
    moved = max(float((weights[n] - p).detach().abs().max()) for n, p in model.named_parameters())
    assert moved > 1e-4
    for metrics, found in others:
        for a, b in zip(metrics, wanted, strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
        assert all(float((found[name] - weights[name]).detach().abs().max()) < 1e-6 for name in weights)


def test_metrics_are_means_over_the_tokens_of_the_batch(
    model: Dots1ForCausalLM, trajectories: list[Trajectory]
) -> None:
    before = engine(model).infer_batch(trajectories, range(6))
    metrics = step(engine(copy.deepcopy(model), 30), trajectories)
    assert metrics["mean_logprob"] == pytest.approx(float(torch.cat(list(before.values())).mean()), abs=1e-4)
    assert 0 < metrics["entropy"] < 6.3
    assert metrics["grad_norm"] > 0


def test_saving_and_loading_resumes_bit_identically(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, trajectories: list[Trajectory], tmp_path: Path
) -> None:
    through, before = engine(model, 40), engine(copy.deepcopy(model), 40)
    step(through, trajectories)
    wanted = step(through, trajectories)
    step(before, trajectories)
    save_model(before.model, tokenizer, tmp_path)
    before.save_checkpoint(tmp_path, 1)
    resumed = engine(load_base_model(tmp_path, "float32", "packed", "grouped_mm"), 40)
    assert resumed.load_checkpoint(tmp_path) == 1
    assert resumed.learning_rate == before.learning_rate
    assert step(resumed, trajectories) == wanted
    assert resumed.learning_rate == through.learning_rate
    found, state = resumed.model.state_dict(), through.model.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


def test_the_parts_of_a_step_make_the_step(model: Dots1ForCausalLM, trajectories: list[Trajectory]) -> None:
    whole, parts = engine(model, 40), engine(copy.deepcopy(model), 40)
    wanted = step(whole, trajectories)
    found = parts.forward_backward_batch(trajectories, range(6), grpo_like(trajectories))
    assert {**found, "grad_norm": parts.optimizer_step()} == wanted
    assert parts.lr_scheduler_step() == whole.learning_rate
    weights = parts.model.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in whole.model.state_dict().items())


def test_every_parameter_and_buffer_is_sent_by_its_hub_name(
    model: Dots1ForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    save_model(model, tokenizer, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    sent, adapter = engine(model).get_per_tensor_param()
    found = dict(sent)
    assert adapter is None
    assert found.keys() == stored.keys()
    assert all(torch.equal(found[name], stored[name]) for name in stored)
    assert any(name.endswith("e_score_correction_bias") for name in found)


def naive(model: Dots1ForCausalLM, trajectory: Trajectory, temperature: float) -> torch.Tensor:
    ids = torch.tensor([trajectory.prompt_ids + trajectory.response_ids])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0, len(trajectory.prompt_ids) - 1 : -1]
    picked = torch.tensor(trajectory.response_ids)[:, None]
    return (logits / temperature).log_softmax(-1).gather(-1, picked).squeeze(-1)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_infer_batch_gives_the_logprobs_at_the_sampling_temperature(
    model: Dots1ForCausalLM, trajectories: list[Trajectory], temperature: float
) -> None:
    found = TrainingEngine(model, OPTIM, 1, 25, temperature).infer_batch(trajectories, [5, 1, 4])
    assert sorted(found) == [1, 4, 5]
    for index, logprobs in found.items():
        assert not logprobs.requires_grad
        torch.testing.assert_close(logprobs, naive(model, trajectories[index], temperature), atol=1e-4, rtol=0)


def test_infer_batch_of_a_reference_uses_the_reference(model: Dots1ForCausalLM, trajectories: list[Trajectory]) -> None:
    reference = copy.deepcopy(model)
    trained = engine(model)
    step(trained, trajectories)  # the warm-up starts at a learning rate of 0
    step(trained, trajectories)
    found = trained.infer_batch(trajectories, [0], reference)[0]
    torch.testing.assert_close(found, naive(reference, trajectories[0], 0.7), atol=1e-4, rtol=0)
    assert not torch.allclose(found, trained.infer_batch(trajectories, [0])[0], atol=1e-3)


def test_scores_are_zero_where_a_response_has_no_token(model: Dots1ForCausalLM, trajectories: list[Trajectory]) -> None:
    scores = response_scores(model, trajectories, [[2], [1]], 1.0)
    assert scores.mask.tolist() == [[1.0] * 12, [1.0] + [0.0] * 11]
    assert scores.logprobs[1, 1:].tolist() == [0.0] * 11
    assert scores.logprobs[1, 0] < 0
    assert [places.tolist() for places in scores.places] == [list(range(16)), list(range(16, 26))]
    assert len(scores.entropy) == 13


def test_an_empty_batch_moves_only_the_schedule(model: Dots1ForCausalLM) -> None:
    trained, before = engine(model), copy.deepcopy(model.state_dict())
    metrics = trained.train_batch([], [], grpo_like([]))
    assert metrics == {"loss": 0.0, "grad_norm": 0.0}
    assert trained.learning_rate == pytest.approx(5e-4)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_only_parameters_that_require_gradients_are_trained(
    model: Dots1ForCausalLM, trajectories: list[Trajectory]
) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "lm_head.weight")
    before = copy.deepcopy(model.state_dict())
    trained = engine(model)
    step(trained, trajectories)
    step(trained, trajectories)
    assert [n for n, t in model.state_dict().items() if not torch.equal(before[n], t)] == ["lm_head.weight"]


def test_the_observer_sees_every_trajectory_and_cannot_change_the_step(
    model: Dots1ForCausalLM, trajectories: list[Trajectory]
) -> None:
    seen: list[int] = []

    def observe(scores, recorded) -> None:
        (routes,), (gaps,) = recorded.routes, recorded.gaps
        assert len(routes) == len(gaps) == sum(map(len, scores.places))
        seen.extend(scores.members)

    watched, plain = engine(model, 40), engine(copy.deepcopy(model), 40)
    members = range(len(trajectories))
    for _ in range(2):
        found = watched.train_batch(trajectories, members, grpo_like(trajectories), observe)
        assert found == plain.train_batch(trajectories, members, grpo_like(trajectories))
    assert sorted(seen) == sorted([*members, *members])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.model.parameters(), strict=True))


# ------------------------------------------------------------------------------------------------------- shared prompts


@pytest.fixture
def grouped(token_ids, loaded_model: Dots1ForCausalLM) -> list[Trajectory]:
    """3 groups of 4, 1 and 3 responses, some of one token, in no order, with routes no router here would choose."""
    prompts = token_ids(9, 1, 17, seed=3)
    answers = token_ids(7, 1, 12, 3, 20, 5, 1, 9, seed=4)
    layers, k = len(moe_layers(loaded_model)), loaded_model.config.num_experts_per_tok
    groups, trajectories = [0, 2, 0, 1, 2, 0, 2, 0], []
    for number, (group, answer) in enumerate(zip(groups, answers, strict=True)):
        tokens = len(prompts[group]) + len(answer) - 1
        random = torch.rand(tokens, layers, 16, generator=torch.Generator().manual_seed(number))
        of_prompt = torch.rand(len(prompts[group]), layers, 16, generator=torch.Generator().manual_seed(50 + group))
        random[: len(prompts[group])] = of_prompt
        routes = random.argsort(-1)[..., :k].to(torch.uint8).numpy().tobytes()
        reward = float(number % 3 == 0)
        trajectories.append(Trajectory(prompts[group], answer, [-1.0] * len(answer), group, reward, routes))
    return trajectories


VARIANTS: dict[str, Callable[[Dots1ForCausalLM], Any]] = {
    "plain": lambda model: model,
    "checkpointed": lambda model: model.gradient_checkpointing_enable({"use_reentrant": False}) or model,
    "lora": lambda model: add_adapter(
        model,
        LoraSection(r=4, target_modules=("q_proj", "k_proj", "v_proj"), target_parameters=("mlp.experts.down_proj",)),
        "base",
    ),
}


def gradients_of(
    model: Any, grouped: list[Trajectory], limit: int, shared: bool, replay: bool = False
) -> tuple[dict[str, torch.Tensor], dict[int, torch.Tensor], dict[int, bytes | None], torch.Tensor]:
    """Gradients of an optimizer step with a balance loss, log-probs beforehand, recorded routes, expert loads."""
    monitor, balance = LoadMonitor(model), BalanceLoss(model, 0.5)
    balance.scale = 1 / len(grouped)
    trained = TrainingEngine(model, OPTIM, 10, limit, 0.7, share_prompts=shared)
    members = range(len(grouped))
    routes = {i: t.routes for i, t in enumerate(grouped)} if replay else None
    recorded: dict[int, bytes | None] = {}
    logprobs = trained.infer_batch(grouped, members, routes=routes, record=recorded)
    trained.forward_backward_batch(grouped, members, grpo_like(grouped), routes=routes)
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found, logprobs, recorded, monitor.slots()


@pytest.mark.parametrize("replay", [False, True], ids=["own routes", "replayed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_sharing_prompts_changes_no_number(
    model: Dots1ForCausalLM, grouped: list[Trajectory], variant: str, replay: bool
) -> None:
    torch.manual_seed(0)  # of a fresh adapter
    model.set_experts_implementation(IMPLEMENTATION)
    model = VARIANTS[variant](model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    # Each as it is; then whole groups a forward; then the largest group cut, its prompt in each part.
    wanted, *others = (
        gradients_of(copy.deepcopy(model), grouped, limit, shared, replay)
        for limit, shared in ((10_000, False), (10_000, True), (60, True), (25, True), (1, True))
    )
    assert max(float(g.abs().max()) for g in wanted[0].values()) > 1e-2
    for gradients, logprobs, routes, loads in others:
        assert gradients.keys() == wanted[0].keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, wanted[0][name], atol=1e-5, rtol=1e-5, msg=name)
        for index, row in logprobs.items():
            torch.testing.assert_close(row, wanted[1][index], atol=1e-5, rtol=0)
        assert routes == wanted[2]
        assert torch.equal(loads, wanted[3])
    if replay:
        assert wanted[2] == {i: t.routes for i, t in enumerate(grouped)}


def test_a_prompt_is_computed_once_for_its_group(model: Dots1ForCausalLM, grouped: list[Trajectory]) -> None:
    tokens = []
    model.model.register_forward_pre_hook(lambda *call: tokens.append(call[2]["input_ids"].shape[1]), with_kwargs=True)
    engine(model).infer_batch(grouped, range(8))
    assert tokens == [9 + 1 + 17 + sum(len(t.response_ids) for t in grouped)]


def test_attention_that_knows_no_shared_prompts_gets_none(model_dir: Path, grouped: list[Trajectory]) -> None:
    found, wanted = (
        engine(load_base_model(model_dir, "float32", name, "grouped")).infer_batch(grouped, range(8))
        for name in ("sdpa", "packed")
    )
    for index, row in found.items():
        torch.testing.assert_close(row, wanted[index], atol=1e-5, rtol=0)


def test_prompts_read_along_other_routes_are_not_shared(grouped: list[Trajectory]) -> None:
    routes: dict[int, bytes | None] = {i: t.routes for i, t in enumerate(grouped)}
    assert prompt_shares(grouped, range(8), routes) == [[0, 2, 5, 7], [1, 4, 6], [3]]
    changed = bytearray(grouped[5].routes or b"")
    changed[0] = (changed[0] + 1) % 16
    assert prompt_shares(grouped, range(8), routes | {5: bytes(changed)}) == [[0, 2, 7], [1, 4, 6], [3], [5]]
    assert prompt_shares(grouped, range(8)) == [[0, 2, 5, 7], [1, 4, 6], [3]]


def test_a_cosine_ends_at_its_floor(model: Dots1ForCausalLM) -> None:
    optim = OptimSection(learning_rate=1e-3, min_learning_rate=2e-4, lr_scheduler_type="cosine")
    trained, rates = TrainingEngine(model, optim, 10, 100), []
    for _ in range(10):
        trained.train_batch([], [], lambda _: (torch.zeros(()), {}))
        rates.append(trained.learning_rate)
    assert rates == sorted(rates, reverse=True)
    assert rates[4] == pytest.approx(6e-4)
    assert rates[-1] == pytest.approx(2e-4)
