"""The report page, from real files: what it holds, what it survives, and that no model output breaks out of it."""

from __future__ import annotations

import base64
import gzip
import json
import re
import subprocess
import sys
from array import array
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from dots_align.report import curves, panels, samples
from dots_align.report.collect import collect
from dots_align.report.page import write_report

HOSTILE = '</script><img src=x onerror="alert(1)"><!--<script>{{script}}\u2028'


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


def write_lines(path: Path, records: list[dict[str, Any]], tail: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail, encoding="utf-8")


def make_stage(directory: Path, stage: str = "grpo", created: str = "2026-01-01T00:00:00Z") -> Path:
    run = {"stage": stage, "recipe": {"seed": 7, "optim": {"lr": 1e-4}}, "recipe_hash": "abc", "version": "0.1"}
    write_json(directory / "run.json", {**run, "created": created})
    write_lines(
        directory / "metrics.jsonl",
        [{"step": step, "time": float(step), f"{stage}/loss": 1 / step, f"{stage}/kl": 0.1} for step in range(1, 11)]
        + [{"step": 10, "time": 10.5, "eval/exact_match": 0.5, "eval/stop_rate": 1.0, "eval/mean_length": 20.0}],
    )
    return directory


def evaluation(score: float) -> dict[str, Any]:
    sample = {"prompt": "1+1?", "response": "2", "answer": "2", "score": score, "finish_reason": "stop"}
    return {"metrics": {"exact_match": score}, "num_prompts": 1, "data": "d", "scorer": "s", "samples": [sample]}


def sample(step: int, **changes: Any) -> dict[str, Any]:
    base = {"prompt": "1+1?", "response": "2", "answer": "2", "reward": 1.0, "rewards": {"exact": 1.0}}
    return {"step": step, **base, "finish_reason": "stop", **changes}


class Page(HTMLParser):
    """The page as an HTML parser sees it: its elements, and the text of each script."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data

    @property
    def data(self) -> dict[str, Any]:
        return json.loads(self.scripts[0])

    @property
    def run(self) -> dict[str, Any]:
        (run,) = self.data["runs"]
        return run

    @property
    def stage(self) -> dict[str, Any]:
        (stage,) = self.run["stages"]
        return stage

    def blob(self, name: str) -> bytes:
        ids = [attributes.get("id") for tag, attributes in self.elements if tag == "script"]
        return gzip.decompress(base64.b64decode(self.scripts[ids.index(name)]))

    def columns(self, sample_set: dict[str, Any]) -> dict[str, list[Any]]:
        """A set's samples, a list a key, of all its chunks."""
        found: dict[str, list[Any]] = {}
        for name, _ in sample_set["chunks"]:
            chunk = json.loads(self.blob(name))
            chunk["prompt"] = [chunk["prompts"][index] for index in chunk["prompt"]]
            for key, values in chunk.items():
                found[key] = found.get(key, []) + values
        return found


def read(run_dir: Path) -> Page:
    return Page(write_report(run_dir))


def test_one_stage(tmp_path: Path) -> None:
    path = write_report(make_stage(tmp_path / "mine"))

    page = Page(path)
    stage = page.stage
    assert path == tmp_path / "mine" / "report.html"
    assert page.run["name"] == stage["name"] == "mine"
    assert stage["kind"] == "grpo"
    summary = {name: value for name, value in stage["summary"].items() if value is not None}
    assert summary == {"exact_match": 0.5, "stop_rate": 1.0, "mean_length": 20.0, "loss": 0.1}
    assert (stage["steps"], stage["seconds"]) == (10, 10.0)
    titles = [panel["title"] for panel in stage["panels"]]
    assert titles == ["Accuracy", "Answer length", "Loss", "KL", "Ends by itself"]
    assert stage["groups"] == []
    assert stage["recipe"]["optim"] == {"lr": 1e-4}
    assert page.run["notices"] == []
    assert list(tmp_path.glob("**/*.tmp")) == []


def test_pipeline_keeps_its_order_and_finds_moved_and_unlisted_stages(tmp_path: Path) -> None:
    for name, created in (("sft", "2026-01-01T00:00:00Z"), ("grpo", "2026-01-02T00:00:00Z"), ("extra", "2026-01-03")):
        make_stage(tmp_path / name, name, created)
    entries = [
        {"name": "grpo", "output_dir": "/elsewhere/runs/grpo", "metrics": {"exact_match": 0.9}, "seconds": 61.0},
        {"name": "sft", "output_dir": "/elsewhere/runs/sft", "metrics": {}, "seconds": 5.0},
        {"name": "gone", "output_dir": "/elsewhere/runs/gone", "metrics": {"exact_match": 0.1}},
    ]
    write_json(tmp_path / "pipeline.json", {"stages": entries})

    run = read(tmp_path).run

    assert [stage["name"] for stage in run["stages"]] == ["grpo", "sft", "gone", "extra"]
    assert run["stages"][0]["summary"]["exact_match"] == 0.9
    assert run["stages"][0]["seconds"] == 61.0
    assert run["stages"][2]["summary"] == {"exact_match": 0.1}
    assert len(run["notices"]) == 1


@pytest.mark.parametrize("content", [None, "", '{"stages": [{"na', "[]", '{"stages": 3}'])
def test_pipeline_file_absent_or_broken_leaves_the_stages_oldest_first(tmp_path: Path, content: str | None) -> None:
    make_stage(tmp_path / "b_first", created="2026-01-01T00:00:00Z")
    make_stage(tmp_path / "a_second", created="2026-01-02T00:00:00Z")
    if content is not None:
        (tmp_path / "pipeline.json").write_text(content)

    assert [stage["name"] for stage in read(tmp_path).run["stages"]] == ["b_first", "a_second"]


def test_no_run_is_a_helpful_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: expected run\.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        write_report(tmp_path / "missing")
    with pytest.raises(ValueError, match="name the file to write"):
        write_report(make_stage(tmp_path / "run"), output=tmp_path)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"stage": "sft"})

    page = read(tmp_path)
    stage = page.stage

    assert (stage["series"], stage["samples"], stage["router"], stage["steps"]) == ({}, [], None, None)


def test_a_broken_run_json_is_a_notice(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"stage": "sf')

    run = read(tmp_path).run

    assert len(run["stages"]) == 1
    assert "run.json cannot be read" in run["notices"][0]


def test_a_line_cut_off_by_a_kill_is_tolerated(tmp_path: Path) -> None:
    make_stage(tmp_path)
    for name in ("metrics", "router", "samples"):
        with (tmp_path / f"{name}.jsonl").open("ab") as file:
            file.write('{"step": 11, "grpo/loss": 0.1, "prompt": "小'.encode()[:-1])

    run = read(tmp_path).run

    assert run["notices"] == []
    assert run["stages"][0]["steps"] == 10


def test_broken_lines_in_the_middle_are_one_notice(tmp_path: Path) -> None:
    make_stage(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[2:2] = ['{"step": 3, "gr', "[1, 2]", '{"step": "four"}', '{"step": 1e999}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    run = read(tmp_path).run

    assert len(run["notices"]) == 1
    assert "metrics.jsonl: left out 4 lines" in run["notices"][0]
    assert "3, 4, 5, 6" in run["notices"][0]
    assert run["stages"][0]["series"]["grpo/loss"]["total"] == 10


def test_hostile_text_cannot_leave_the_data(tmp_path: Path) -> None:
    make_stage(tmp_path / HOSTILE.replace("/", "").replace("\u2028", ""))
    run_dir = next(tmp_path.iterdir())
    hostile = sample(1, prompt=HOSTILE, response=HOSTILE, answer=HOSTILE, tokens=[HOSTILE], logprobs=[-1.0])
    write_lines(run_dir / "samples.jsonl", [hostile])
    write_json(run_dir / "run.json", {"stage": HOSTILE, "recipe": {HOSTILE: HOSTILE}})

    page = Page(write_report(run_dir))

    (shown,) = page.stage["samples"]
    assert [tag for tag, _ in page.elements].count("script") == 2 + 2  # the data and the script; samples and tokens
    assert "img" not in [tag for tag, _ in page.elements]
    columns = page.columns(shown)
    assert columns["prompt"] == columns["response"] == columns["answer"] == [HOSTILE]
    assert page.stage["recipe"] == {HOSTILE: HOSTILE}
    assert not set("<>&\u2028") & set(page.scripts[0])


def test_odd_but_legal_json_survives(tmp_path: Path) -> None:
    make_stage(tmp_path)
    odd = sample(1, prompt=[{"role": "user", "content": "你好"}], answer=None, reward=float("nan"), rewards=None)
    write_lines(tmp_path / "samples.jsonl", [odd, sample(2, response="\ud800 lone, \x00 nul", reward=10**400)])
    write_json(tmp_path / "run.json", {"stage": "grpo", "recipe": {"clip": float("inf"), "list": [float("nan")]}})

    page = read(tmp_path)
    stage = page.stage

    shown = page.columns(stage["samples"][0])  # newest first
    assert shown["response"][0] == "\ud800 lone, \x00 nul"
    assert shown["reward"] == [None, None]
    assert json.loads(shown["prompt"][1])[0]["content"] == "你好"
    assert shown["answer"] == ["2", ""]
    assert stage["recipe"] == {"clip": "inf", "list": ["nan"]}


def test_the_page_needs_no_network(tmp_path: Path) -> None:
    page = Page(write_report(make_stage(tmp_path)))

    assert not re.search(r"https?://|url\(|@import|//[a-z]+\.[a-z]", page.text)
    assert {attrs["href"] for tag, attrs in page.elements if tag == "link"} == {"data:,"}
    assert not [attrs for _, attrs in page.elements if "src" in attrs or any(name.startswith("on") for name in attrs)]
    policy = next(attrs["content"] or "" for tag, attrs in page.elements if tag == "meta" and "http-equiv" in attrs)
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "innerHTML" not in page.text


def test_a_resume_replaces_the_steps_it_abandoned(tmp_path: Path) -> None:
    make_stage(tmp_path)
    before = [{"step": step, "time": step * 1.0, "grpo/loss": 9.0} for step in range(1, 8)]
    after = [{"step": step, "time": step - 4.0, "grpo/loss": 1.0} for step in range(5, 7)]
    write_lines(tmp_path / "metrics.jsonl", before + after)
    write_lines(tmp_path / "samples.jsonl", [sample(step, response=f"old {step}") for step in range(1, 8)])
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write(json.dumps(sample(5, response="new")) + "\n")

    page = read(tmp_path)
    stage = page.stage

    assert stage["series"]["grpo/loss"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert stage["series"]["grpo/loss"]["values"] == [9.0, 9.0, 9.0, 9.0, 1.0, 1.0]
    assert stage["seconds"] == 9.0
    assert page.columns(stage["samples"][0])["response"][:2] == ["new", "old 4"]


def test_long_curves_keep_their_spikes(tmp_path: Path) -> None:
    make_stage(tmp_path)
    records = [{"step": step, "time": 1.0 * step, "grpo/loss": 1.0} for step in range(10_000)]
    records[4_321]["grpo/loss"], records[6_000]["grpo/loss"] = 50.0, float("nan")
    write_lines(tmp_path / "metrics.jsonl", records)

    run = read(tmp_path).run

    loss = run["stages"][0]["series"]["grpo/loss"]
    assert len(loss["steps"]) == len(loss["values"]) <= curves.MAX_POINTS
    assert loss["total"] == 10_000
    assert loss["steps"] == sorted(set(loss["steps"]))
    assert (loss["steps"][0], loss["steps"][-1]) == (0, 9_999)
    assert dict(zip(loss["steps"], loss["values"], strict=True))[4_321] == 50.0
    assert "grpo/loss was not a finite number at 1 step(s), first at step 6000" in run["notices"][0]


def test_samples_are_all_there_or_spread_evenly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_stage(tmp_path)
    monkeypatch.setattr(samples, "MAX_SAMPLES", 100)
    monkeypatch.setattr(samples, "CHUNK", 30)
    write_lines(tmp_path / "samples.jsonl", [sample(step, response="x" * 30_000) for step in range(250)])

    page = read(tmp_path)

    (shown,) = page.stage["samples"]
    steps = page.columns(shown)["step"]
    assert (shown["total"], shown["shown"]) == (250, len(steps))
    assert 50 < len(steps) <= 101
    assert len(shown["chunks"]) == -(-len(steps) // 30)
    assert steps[0] == 249
    assert {a - b for a, b in pairwise(steps[1:])} == {4}
    assert page.columns(shown)["response"][0].endswith("… (10,000 more characters)")


def test_long_texts_leave_room_for_fewer_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_stage(tmp_path)
    monkeypatch.setattr(samples, "MAX_CHARS", 10_000)
    write_lines(tmp_path / "samples.jsonl", [sample(step, response="y" * 1_000) for step in range(40)])

    (shown,) = read(tmp_path).stage["samples"]

    assert shown["total"] == 40
    assert 5 <= shown["shown"] <= 10


def test_tokens_keep_their_logprobs_and_advantages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_stage(tmp_path)
    tokens = {"tokens": ["4", "2", "<|end|>"], "logprobs": [-0.1234, float("-inf"), 0], "advantages": [0.70711]}
    odd = {"tokens": ["4"], "logprobs": [-0.1, -0.2], "advantages": [1, 2]}  # do not fit each other
    write_lines(tmp_path / "samples.jsonl", [sample(1, **tokens), sample(2, **odd), sample(3)])

    page = read(tmp_path)

    (shown,) = page.stage["samples"]
    ((_, name),) = shown["chunks"]
    assert (shown["shown"], shown["detailed"]) == (3, 1)
    assert page.columns(shown)["length"] == [None, 1, 3]
    assert json.loads(page.blob(name)) == {"2": [["4", "2", "<|end|>"], [-0.123, None, 0.0], [0.707]]}
    monkeypatch.setattr(samples, "MAX_TOKENS", 2)
    write_lines(tmp_path / "samples.jsonl", [sample(step, **tokens) for step in range(9)])
    (shown,) = read(tmp_path).stage["samples"]
    assert (shown["shown"], shown["detailed"]) == (9, 1)


def test_router_history_and_max_violation(tmp_path: Path) -> None:
    make_stage(tmp_path)
    good = {"layers": [1, 2], "load": [[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0.0]]}
    bad: list[dict[str, Any]] = [{"layers": [1], "load": [[1.0], [1.0]]}, {"layers": [1, 2], "load": [[1.0], ["x"]]}]
    records = [{"step": step, **good} for step in range(1, 1001)]
    write_lines(tmp_path / "router.jsonl", [*records[:5], *({"step": 5, **line} for line in bad), *records[5:]])

    page = read(tmp_path)
    run = page.run

    router = run["stages"][0]["router"]
    assert router["layers"] == [1, 2]
    assert (len(router["steps"]), router["total"]) == (curves.MAX_SNAPSHOTS, 1000)
    assert (router["steps"][0], router["steps"][-1]) == (1, 1000)
    shares = array("H", page.blob(router["loads"]))
    assert len(shares) == curves.MAX_SNAPSHOTS * 2 * 4
    assert [round(share / 65535, 3) for share in shares[-8:]] == [0.25, 0.25, 0.25, 0.25, 0.5, 0.25, 0.25, 0.0]
    assert router["experts"] == 4
    assert router["violation"]["worst layer"]["values"][-1] == 1.0
    assert router["violation"]["mean of layers"]["values"][-1] == 0.5
    assert "router.jsonl: left out 2 line(s)" in run["notices"][0]


def test_best_and_last_checkpoints_are_evaluated(tmp_path: Path) -> None:
    make_stage(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    for step, score in ((5, 0.9), (20, 0.7), (100, 0.1)):
        write_json(tmp_path / f"checkpoint-{step}" / "eval.json", evaluation(score))
    (tmp_path / "checkpoint-100" / "eval.json").write_text("{")
    (tmp_path / "best").symlink_to("checkpoint-5")
    (tmp_path / "last").symlink_to("checkpoint-20")

    page = read(tmp_path)
    stage = page.stage

    labels = [one["label"] for one in stage["samples"]]
    assert labels == ["Evaluation of checkpoint-5 (best)", "Evaluation of checkpoint-20 (last)"]
    assert page.columns(stage["samples"][0])["reward"] == [0.9]
    assert stage["best"] == "checkpoint-5"
    assert stage["series"]["eval/exact_match"]["steps"] == [5, 20]
    assert stage["summary"]["exact_match"] == 0.7


def test_newest_checkpoint_stands_in_for_missing_or_dangling_links(tmp_path: Path) -> None:
    make_stage(tmp_path)
    write_json(tmp_path / "checkpoint-9" / "eval.json", evaluation(0.2))
    write_json(tmp_path / "checkpoint-10" / "eval.json", evaluation(0.4))
    (tmp_path / "best").symlink_to("checkpoint-77")

    page = read(tmp_path)
    stage = page.stage

    assert [one["label"] for one in stage["samples"]] == ["Evaluation of checkpoint-10"]
    assert stage["best"] == ""


def test_panels_by_name() -> None:
    one, other = curves.Series([1], [0.5], 1), curves.Series([1], [0.25], 1)
    names = ["dpo/loss", "dpo/rewards/chosen", "dpo/rewards/rejected", "dpo/rewards/accuracies", "dpo/num_tokens"]
    headline, groups = panels.choose_panels({**dict.fromkeys(names, one), "grpo/mismatch_max": one})

    assert {panel.title: panel.names for panel in headline} == {
        "Implicit rewards": ["dpo/rewards/chosen", "dpo/rewards/rejected"],
        "Accuracy": ["dpo/rewards/accuracies"],
        "Loss": ["dpo/loss"],
    }
    assert [(group.title, group.names) for group in groups] == [
        (panels.AGREEMENT, ["grpo/mismatch_max"]),
        ("dpo", ["dpo/num_tokens"]),
    ]
    (reward,), _ = panels.choose_panels({"grpo/reward": one, "grpo/reward_same": one, "grpo/reward_format": other})
    assert reward.names == ["grpo/reward", "grpo/reward_format"]


def test_phases_are_not_counted_twice() -> None:
    one = curves.Series([1], [0.5], 1)
    logged = ["rollout_seconds", "sampling_seconds", "score_seconds", "score_busy_seconds", "update_seconds"]
    for more, phases in (
        ([], ["sampling_seconds", "score_seconds", "update_seconds"]),
        (["rollout_wait_seconds"], ["rollout_wait_seconds", "update_seconds"]),
    ):
        (panel,), _ = panels.choose_panels({f"grpo/{name}": one for name in logged + more})
        assert (panel.kind, panel.names) == ("stack", [f"grpo/{name}" for name in phases])
    (panel,), _ = panels.choose_panels({"grpo/rollout_seconds": one, "grpo/update_seconds": one})
    assert panel.names == ["grpo/rollout_seconds", "grpo/update_seconds"]


def test_what_a_scale_cannot_show_is_drawn_on_another() -> None:
    (accuracy,), _ = panels.choose_panels({"sft/accuracy": curves.Series([1], [85.0], 1)})
    assert accuracy == panels.Panel("Accuracy", ["sft/accuracy"], scale="linear")
    (norm,), _ = panels.choose_panels({"sft/grad_norm": curves.Series([1, 2], [0.0, 0.0], 2)})
    assert norm.scale == "linear"


def test_several_runs_are_one_page_where_they_lie(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_stage(tmp_path / name / "grpo")
    path = write_report([tmp_path / "a" / "grpo", tmp_path / "b" / "grpo"])

    page = Page(path)
    assert path == tmp_path / "compare.html"
    assert [run["name"] for run in page.data["runs"]] == ["a/grpo", "b/grpo"]


def test_the_verdict_is_one_line(tmp_path: Path) -> None:
    for name, accuracy in (("sft", 0.4), ("grpo", 0.9)):
        make_stage(tmp_path / name, name, "2026-01-01" if name == "sft" else "2026-01-02")
        write_json(tmp_path / name / "checkpoint-10" / "eval.json", evaluation(accuracy))
        (tmp_path / name / "metrics.jsonl").unlink()

    assert read(tmp_path).run["verdict"] == {"level": "good", "text": "Held-out exact match rose from 40.0% to 90.0%."}


def test_accuracy_before_training(tmp_path: Path) -> None:
    make_stage(tmp_path / "sft", "sft")
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": step, "eval/exact_match": step / 10} for step in (0, 5)])

    assert collect([tmp_path]).runs[0].start == 0.0


def test_writing_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(make_stage(tmp_path / "run"), output=tmp_path / "new" / "page.html")
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))

    with pytest.raises(OSError, match="disk full"):
        write_report(tmp_path / "run", output=path)

    assert path.read_text() == before
    assert [item.name for item in path.parent.iterdir()] == ["page.html"]


def test_importing_needs_only_the_standard_library() -> None:
    code = (
        "import sys, dots_align.report.page\n"
        "extra = {name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "print(sorted(extra & {'torch', 'numpy', 'matplotlib', 'pydantic', 'yaml', 'transformers'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout.strip() == "[]"
