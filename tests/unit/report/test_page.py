"""The report page, from real files: what it holds, what it survives, and that no model output breaks out of it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dots_align.report import collect as collecting
from dots_align.report import curves
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


def report(run_dir: Path) -> dict[str, Any]:
    return Page(write_report(run_dir)).data


def test_one_stage(tmp_path: Path) -> None:
    path = write_report(make_stage(tmp_path / "mine"))

    page = Page(path)
    (stage,) = page.data["stages"]
    assert path == tmp_path / "mine" / "report.html"
    assert page.data["name"] == stage["name"] == "mine"
    assert stage["kind"] == "grpo"
    assert stage["summary"] == {"exact_match": 0.5, "stop_rate": 1.0, "mean_length": 20.0, "loss": 0.1}
    assert (stage["steps"], stage["seconds"]) == (10, 10.0)
    assert [panel["title"] for panel in stage["panels"]] == ["Loss", "Accuracy", "Response length (tokens)"]
    assert {name for group in stage["groups"] for name in group["names"]} == {"grpo/kl", "eval/stop_rate"}
    assert stage["recipe"]["optim"] == {"lr": 1e-4}
    assert page.data["notices"] == []
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

    data = report(tmp_path)

    assert [stage["name"] for stage in data["stages"]] == ["grpo", "sft", "gone", "extra"]
    assert data["stages"][0]["summary"]["exact_match"] == 0.9
    assert data["stages"][0]["seconds"] == 61.0
    assert data["stages"][2]["summary"] == {"exact_match": 0.1}
    assert len(data["notices"]) == 1


@pytest.mark.parametrize("content", [None, "", '{"stages": [{"na', "[]", '{"stages": 3}'])
def test_pipeline_file_absent_or_broken_leaves_the_stages_oldest_first(tmp_path: Path, content: str | None) -> None:
    make_stage(tmp_path / "b_first", created="2026-01-01T00:00:00Z")
    make_stage(tmp_path / "a_second", created="2026-01-02T00:00:00Z")
    if content is not None:
        (tmp_path / "pipeline.json").write_text(content)

    assert [stage["name"] for stage in report(tmp_path)["stages"]] == ["b_first", "a_second"]


def test_no_run_is_a_helpful_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no run: expected run\.json"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match="is not a directory"):
        write_report(tmp_path / "missing")
    with pytest.raises(ValueError, match="name the file to write"):
        write_report(make_stage(tmp_path / "run"), output=tmp_path)


def test_a_run_that_has_only_begun(tmp_path: Path) -> None:
    write_json(tmp_path / "run.json", {"stage": "sft"})

    (stage,) = report(tmp_path)["stages"]

    assert (stage["series"], stage["samples"], stage["router"], stage["steps"]) == ({}, [], None, None)


def test_a_broken_run_json_is_a_notice(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"stage": "sf')

    data = report(tmp_path)

    assert len(data["stages"]) == 1
    assert "run.json cannot be read" in data["notices"][0]


def test_a_line_cut_off_by_a_kill_is_tolerated(tmp_path: Path) -> None:
    make_stage(tmp_path)
    for name in ("metrics", "router", "samples"):
        with (tmp_path / f"{name}.jsonl").open("ab") as file:
            file.write('{"step": 11, "grpo/loss": 0.1, "prompt": "小'.encode()[:-1])

    data = report(tmp_path)

    assert data["notices"] == []
    assert data["stages"][0]["steps"] == 10


def test_broken_lines_in_the_middle_are_one_notice(tmp_path: Path) -> None:
    make_stage(tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    lines[2:2] = ['{"step": 3, "gr', "[1, 2]", '{"step": "four"}', '{"step": 1e999}']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines) + "\n")

    data = report(tmp_path)

    assert len(data["notices"]) == 1
    assert "metrics.jsonl: left out 4 lines" in data["notices"][0]
    assert "3, 4, 5, 6" in data["notices"][0]
    assert data["stages"][0]["series"]["grpo/loss"]["total"] == 10


def test_hostile_text_cannot_leave_the_data(tmp_path: Path) -> None:
    make_stage(tmp_path / HOSTILE.replace("/", "").replace("\u2028", ""))
    run_dir = next(tmp_path.iterdir())
    write_lines(run_dir / "samples.jsonl", [sample(1, prompt=HOSTILE, response=HOSTILE, answer=HOSTILE)])
    write_json(run_dir / "run.json", {"stage": HOSTILE, "recipe": {HOSTILE: HOSTILE}})

    page = Page(write_report(run_dir))

    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in page.elements]
    assert page.data["stages"][0]["samples"][0]["response"] == HOSTILE
    assert page.data["stages"][0]["recipe"] == {HOSTILE: HOSTILE}
    assert not set("<>&\u2028") & set(page.scripts[0])


def test_odd_but_legal_json_survives(tmp_path: Path) -> None:
    make_stage(tmp_path)
    odd = sample(1, prompt=[{"role": "user", "content": "你好"}], answer=None, reward=float("nan"), rewards=None)
    write_lines(tmp_path / "samples.jsonl", [odd, sample(2, response="\ud800 lone, \x00 nul", reward=10**400)])
    write_json(tmp_path / "run.json", {"stage": "grpo", "recipe": {"clip": float("inf"), "list": [float("nan")]}})

    (stage,) = report(tmp_path)["stages"]

    newest, oldest = stage["samples"]
    assert newest["response"] == "\ud800 lone, \x00 nul"
    assert (newest["reward"], oldest["reward"]) == (None, None)
    assert json.loads(oldest["prompt"])[0]["content"] == "你好"
    assert oldest["answer"] == ""
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

    (stage,) = report(tmp_path)["stages"]

    assert stage["series"]["grpo/loss"]["steps"] == [1, 2, 3, 4, 5, 6]
    assert stage["series"]["grpo/loss"]["values"] == [9.0, 9.0, 9.0, 9.0, 1.0, 1.0]
    assert stage["seconds"] == 9.0
    assert [row["response"] for row in stage["samples"]][:2] == ["new", "old 5"]


def test_long_curves_keep_their_spikes(tmp_path: Path) -> None:
    make_stage(tmp_path)
    records = [{"step": step, "time": 1.0 * step, "grpo/loss": 1.0} for step in range(10_000)]
    records[4_321]["grpo/loss"], records[6_000]["grpo/loss"] = 50.0, float("nan")
    write_lines(tmp_path / "metrics.jsonl", records)

    data = report(tmp_path)

    loss = data["stages"][0]["series"]["grpo/loss"]
    assert len(loss["steps"]) == len(loss["values"]) <= curves.MAX_POINTS
    assert loss["total"] == 10_000
    assert loss["steps"] == sorted(set(loss["steps"]))
    assert (loss["steps"][0], loss["steps"][-1]) == (0, 9_999)
    assert dict(zip(loss["steps"], loss["values"], strict=True))[4_321] == 50.0
    assert "grpo/loss was not a finite number at 1 step(s), first at step 6000" in data["notices"][0]


def test_samples_are_capped_to_the_latest(tmp_path: Path) -> None:
    make_stage(tmp_path)
    count = collecting.MAX_SAMPLES + 7
    write_lines(tmp_path / "samples.jsonl", [sample(step, response="x" * 30_000) for step in range(count)])

    (stage,) = report(tmp_path)["stages"]

    assert stage["samples_total"] == count
    assert [row["step"] for row in stage["samples"]] == list(range(count - 1, 6, -1))
    assert stage["samples"][0]["response"].endswith("… (10,000 more characters)")


def test_router_history_and_max_violation(tmp_path: Path) -> None:
    make_stage(tmp_path)
    good = {"layers": [1, 2], "load": [[0.25, 0.25, 0.25, 0.25], [0.5, 0.25, 0.25, 0.0]]}
    bad: list[dict[str, Any]] = [{"layers": [1], "load": [[1.0], [1.0]]}, {"layers": [1, 2], "load": [[1.0], ["x"]]}]
    records = [{"step": step, **good} for step in range(1, 1001)]
    write_lines(tmp_path / "router.jsonl", [*records[:5], *({"step": 5, **line} for line in bad), *records[5:]])

    data = report(tmp_path)

    router = data["stages"][0]["router"]
    assert router["layers"] == [1, 2]
    assert (len(router["steps"]), router["total"]) == (curves.MAX_SNAPSHOTS, 1000)
    assert (router["steps"][0], router["steps"][-1]) == (1, 1000)
    assert router["violation"]["worst layer"]["values"][-1] == 1.0
    assert router["violation"]["mean of layers"]["values"][-1] == 0.5
    assert "router.jsonl: left out 2 line(s)" in data["notices"][0]


def test_best_and_last_checkpoints_are_evaluated(tmp_path: Path) -> None:
    make_stage(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    for step, score in ((5, 0.9), (20, 0.7), (100, 0.1)):
        write_json(tmp_path / f"checkpoint-{step}" / "eval.json", evaluation(score))
    (tmp_path / "checkpoint-100" / "eval.json").write_text("{")
    (tmp_path / "best").symlink_to("checkpoint-5")
    (tmp_path / "last").symlink_to("checkpoint-20")

    (stage,) = report(tmp_path)["stages"]

    assert [(one["label"], one["checkpoint"]) for one in stage["evaluations"]] == [
        ("best", "checkpoint-5"),
        ("last", "checkpoint-20"),
    ]
    assert stage["evaluations"][0]["samples"][0]["reward"] == 0.9
    assert stage["best"] == "checkpoint-5"
    assert stage["series"]["eval/exact_match"]["steps"] == [5, 20]
    assert stage["summary"]["exact_match"] == 0.7


def test_newest_checkpoint_stands_in_for_missing_or_dangling_links(tmp_path: Path) -> None:
    make_stage(tmp_path)
    write_json(tmp_path / "checkpoint-9" / "eval.json", evaluation(0.2))
    write_json(tmp_path / "checkpoint-10" / "eval.json", evaluation(0.4))
    (tmp_path / "best").symlink_to("checkpoint-77")

    (stage,) = report(tmp_path)["stages"]

    assert [one["checkpoint"] for one in stage["evaluations"]] == ["checkpoint-10"]
    assert stage["best"] == ""


def test_panels_by_name() -> None:
    one = curves.Series([1], [0.5], 1)
    names = ["dpo/loss", "dpo/rewards/chosen", "dpo/rewards/rejected", "dpo/rewards/accuracies", "dpo/grad_norm"]
    headline, groups = curves.choose_panels(dict.fromkeys([*names, "grpo/agreement_kl"], one))

    assert {panel.title: panel.names for panel in headline} == {
        "Loss": ["dpo/loss"],
        "Reward": ["dpo/rewards/chosen", "dpo/rewards/rejected"],
        "Accuracy": ["dpo/rewards/accuracies"],
    }
    assert [(group.title, group.names) for group in groups] == [
        (curves.AGREEMENT, ["grpo/agreement_kl"]),
        ("dpo", ["dpo/grad_norm"]),
    ]


def test_accuracy_in_percent_is_not_drawn_as_a_share() -> None:
    headline, _ = curves.choose_panels({"sft/accuracy": curves.Series([1], [85.0], 1)})

    assert headline == [curves.Panel("Accuracy", ["sft/accuracy"], percent=False)]


def test_accuracy_before_training(tmp_path: Path) -> None:
    make_stage(tmp_path / "sft", "sft")
    write_lines(tmp_path / "sft" / "metrics.jsonl", [{"step": step, "eval/exact_match": step / 10} for step in (0, 5)])

    assert collect(tmp_path).start == 0.0


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
