"""The command: its table, its exit status, what it says of engines that cannot run."""

from __future__ import annotations

import copy
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from dots_align import cli
from dots_align.export.hf import export_hf
from dots_align.parity.check import Parity, compare_all
from dots_align.parity.compare import Comparison
from dots_align.parity.endpoint import Endpoint
from dots_align.parity.engines import Transformers
from dots_align.parity.fresh import Exported
from dots_align.parity.observation import Asked, logprobs_of
from dots_align.parity.questions import asked, fixed_questions, read_questions
from dots_align.parity.table import as_text

PROMPTS = (
    {"prompt": "What is 2 plus 3?"},
    {"text": "从前有座山。"},
    {"messages": [{"role": "user", "content": "你好"}]},
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps(p, ensure_ascii=False) for p in PROMPTS), encoding="utf-8")
    return path


@pytest.mark.slow
def test_a_deviating_copy_ends_with_status_1_and_its_name(
    model_dir: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export = export_hf(model_dir, tmp_path / "export")
    config = json.loads((export / "config.json").read_text(encoding="utf-8"))
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 10000.0
    (export / "config.json").write_text(json.dumps(config), encoding="utf-8")
    arguments = ["parity", str(model_dir), "--prompts", str(prompts), "--exported", str(export), "--json"]
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--python", str(tmp_path / "no-python")])
    found = json.loads(capsys.readouterr().out)
    rows = {row["name"]: row for row in found["engines"]}
    assert stopped.value.code == 1
    assert not found["ok"]
    assert rows["exported copy"]["causes"] == ["wrong rope_theta"]
    assert rows["exported copy"]["aspects"]["rope"] == "wrong"
    assert rows["rollout torch"]["problems"] == []
    assert "no-python" in rows[f"transformers of {tmp_path / 'no-python'}"]["problems"][0]


@pytest.mark.slow
def test_a_sound_checkpoint_ends_quietly(model_dir: Path, prompts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["parity", str(model_dir), "--prompts", str(prompts)])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1].startswith("PARITY: all ")
    assert [line.split("  ")[0] for line in lines[4:10]][:6] == [
        "transformers eager",
        "transformers sdpa",
        "training",
        "rollout torch",
        "rollout native",
        "exported copy",
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("[1]", ":1: not a prompt"),
        ("{}", "none of messages, prompt, text"),
        ('{"messages": [{"role": "boss", "content": "x"}]}', "role 'boss'"),
        ("", "holds no prompt"),
    ],
)
def test_prompts_that_are_none_are_refused(tokenizer: Any, tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line, encoding="utf-8")
    with pytest.raises(ValueError, match=r"prompts\.jsonl") as refused:
        read_questions(path, tokenizer)
    assert said in str(refused.value)


def test_a_bias_that_decides_nothing_is_said_not_to_be_provable(loaded_model: Any, tokenizer: Any) -> None:
    model = copy.deepcopy(loaded_model)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.zero_()
    found = compare_all("here", model, short(tokenizer), [Transformers(model, tokenizer)])
    text = as_text(found)
    assert found.ok
    assert "its correction bias decides nothing" in " ".join(text.split())
    (row,) = [line for line in text.splitlines() if line.startswith("transformers eager")]
    assert row.split() == [*row.split()[:7], "ok", "ok", "?", "ok", "ok", "ok"]


def test_why_an_engine_was_skipped_does_not_widen_the_columns() -> None:
    rows = [Comparison("training", max_difference=2e-6), Comparison("llama.cpp F32", skipped="x" * 90)]
    header, rule, *_ = as_text(Parity("here", rows, {})).split("\n\n")[1].splitlines()
    assert len(header) == len(rule) < 110
    assert "x" * 90 in as_text(Parity("here", rows, {}))


def short(tokenizer: Any) -> Asked:
    found = fixed_questions(tokenizer, 512)
    return asked((found[0], found[5], found[-1]), tokenizer)


# ------------------------------------------------------------------------------------------------------------ a server


class Completions(BaseHTTPRequestHandler):
    """What a server with OpenAI's API says, computed by a real model; class attributes are set by the test."""

    model: Any
    tokenizer: Any
    takes_ids = True
    bos: tuple[int, ...] = ()
    late = False

    def do_GET(self) -> None:
        self.reply({"data": [{"id": "dots"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path.endswith("chat/completions"):
            given = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=True)
            self.reply({"usage": {"prompt_tokens": len(given["input_ids"]) + len(self.bos)}})
            return
        prompt = body["prompt"]
        if isinstance(prompt, list) and not self.takes_ids:
            self.reply({"error": "prompt must be a string"}, 422)
            return
        ids = [*self.bos, *(prompt if isinstance(prompt, list) else self.tokenizer(prompt)["input_ids"])]
        with torch.no_grad():
            logits = self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        choice = {"finish_reason": "stop" if "logit_bias" in body else "length"}
        if body.get("echo"):
            choice["logprobs"] = {"token_logprobs": [None, *logprobs_of(logits, ids, self.late).tolist(), -1.0]}
        self.reply({"choices": [choice], "usage": {"prompt_tokens": len(ids)}})

    def reply(self, content: Any, status: int = 200) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def server(loaded_model: Any, tokenizer: Any) -> Iterator[tuple[type[Completions], str]]:
    handler = type("Handler", (Completions,), {"model": copy.deepcopy(loaded_model), "tokenizer": tokenizer})
    handler.model.config._attn_implementation = "eager"
    running = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield handler, f"http://127.0.0.1:{running.server_port}/v1"
    running.shutdown()
    running.server_close()


def ask(loaded_model: Any, tokenizer: Any, url: str) -> Parity:
    engine = Endpoint(url, tokenizer, precision="F32")
    return compare_all("here", copy.deepcopy(loaded_model), short(tokenizer), [engine])


@pytest.mark.parametrize(("takes_ids", "late"), [(True, False), (False, False), (True, True)])
def test_a_right_server_has_parity(
    loaded_model: Any, tokenizer: Any, server: tuple[type[Completions], str], takes_ids: bool, late: bool
) -> None:
    handler, url = server
    handler.takes_ids, handler.late = takes_ids, late
    found = ask(loaded_model, tokenizer, url)
    assert found.ok, found.rows[0].problems
    assert found.rows[0].unit == "log-prob"
    assert found.rows[0].num_tokens >= 40
    assert found.rows[0].template_equal
    assert found.rows[0].late == late
    assert ("one position late" in as_text(found)) == late


@pytest.mark.parametrize("late", [False, True])
def test_the_mistake_of_a_server_is_named(
    loaded_model: Any, tokenizer: Any, server: tuple[type[Completions], str], late: bool
) -> None:
    handler, url = server
    handler.late = late
    for _, block in enumerate(handler.model.model.layers[1:]):
        block.mlp.routed_scaling_factor = 6.25
    assert ask(loaded_model, tokenizer, url).verdict.endswith(": double scaling")


def test_a_server_that_adds_a_token_or_is_not_there_says_so(
    loaded_model: Any, tokenizer: Any, server: tuple[type[Completions], str]
) -> None:
    handler, url = server
    handler.bos = (5,)
    assert "other chat template" in ask(loaded_model, tokenizer, url).verdict
    assert ask(loaded_model, tokenizer, "http://127.0.0.1:1").rows[0].causes == ["cannot run"]


def test_a_directory_that_is_none_is_a_row_and_no_crash(loaded_model: Any, tokenizer: Any, tmp_path: Path) -> None:
    engine = Exported(shutil.copytree(Path(__file__).parent, tmp_path / "nothing"))
    (row,) = compare_all("here", copy.deepcopy(loaded_model), short(tokenizer), [engine]).rows
    assert row.causes == ["cannot run"]
    assert "cannot load and run it" in row.problems[0]
