"""The report page in a real browser: what it draws, that it draws without errors, that hostile text stays text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dots_align.report.page import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
LAYERS, EXPERTS, SAMPLES = 3, 8, 5

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=f"no Chromium-like browser on PATH (looked for {BROWSERS})"),
]


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def make_stage(directory: Path, stage: str, accuracy: float) -> None:
    directory.mkdir(parents=True)
    recipe = {"seed": 7, "optim": {"learning_rate": 1e-4, "betas": [0.9, 0.95]}, "note": HOSTILE}
    (directory / "run.json").write_text(
        json.dumps({"stage": stage, "recipe": recipe, "created": "2026-01-01T00:00:00Z"})
    )
    metrics: list[dict[str, Any]] = [
        {"step": step, "time": step * 1.5, f"{stage}/loss": 1 / step, f"{stage}/reward": step / 50, f"{stage}/kl": 1e-9}
        | {f"{stage}/response_length": 60.0 - step, f"{stage}/agreement_max_diff": 1e-6}
        for step in range(1, 51)
    ]
    for step in (25, 50):
        metrics[step - 1] |= {"eval/exact_match": accuracy * step / 50, "eval/mean_length": 20.0, "eval/stop_rate": 1.0}
    write_lines(directory / "metrics.jsonl", metrics)
    load = [[2 / (EXPERTS + 1)] + [1 / (EXPERTS + 1)] * (EXPERTS - 1)] * LAYERS
    even = [[1 / EXPERTS] * EXPERTS] * LAYERS
    lines = [{"step": step, "layers": [1, 2, 3], "load": even if step == 10 else load} for step in (10, 20, 30)]
    write_lines(directory / "router.jsonl", lines)


def make_pipeline(root: Path) -> Path:
    make_stage(root / "sft", "sft", 0.4)
    make_stage(root / "grpo", "grpo", 0.8)
    sample = {
        "prompt": "1+1?",
        "response": "答案是 2",
        "answer": "2",
        "rewards": {"exact": 1.0},
        "finish_reason": "stop",
    }
    rows = [{**sample, "step": step, "reward": step / SAMPLES} for step in range(1, SAMPLES)]
    rows.append({**sample, "step": SAMPLES, "prompt": HOSTILE, "response": HOSTILE, "answer": HOSTILE, "reward": -1.0})
    write_lines(root / "grpo" / "samples.jsonl", rows)
    checkpoint = root / "grpo" / "checkpoint-50"
    checkpoint.mkdir()
    evaluated = [{**sample, "score": 1.0}, {**sample, "response": HOSTILE, "score": 0.0}]
    (checkpoint / "eval.json").write_text(json.dumps({"metrics": {"exact_match": 0.8}, "samples": evaluated}))
    (root / "grpo" / "best").symlink_to("checkpoint-50")
    stages = [{"name": name, "output_dir": str(root / name), "seconds": 61.0} for name in ("sft", "grpo")]
    (root / "pipeline.json").write_text(json.dumps({"stages": stages}))
    return root


class Dom(HTMLParser):
    """The rendered page as a flat list of (tag, attributes, id of the stage it is in)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text = text
        self.elements: list[tuple[str, dict[str, str], str]] = []
        self.stage = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name: value or "" for name, value in attrs}
        if attributes.get("id", "").startswith("stage-"):
            self.stage = attributes["id"]
        self.elements.append((tag, attributes, self.stage))

    def find(self, tag: str, css_class: str = "", stage: str | None = None) -> list[dict[str, str]]:
        return [
            attributes
            for name, attributes, inside in self.elements
            if name == tag and css_class in ["", *attributes.get("class", "").split()] and stage in (None, inside)
        ]


def open_page(page: Path, profile: Path, fragment: str = "") -> Dom:
    """The DOM after the page's script ran, in a fresh browser profile."""
    assert BROWSER is not None
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    flags += "--disable-component-update --disable-sync --window-size=1280,900 --virtual-time-budget=5000 --dump-dom"
    command = [BROWSER, *flags.split(), f"--user-data-dir={profile}", page.resolve().as_uri() + fragment]
    done = subprocess.run(command, capture_output=True, timeout=120, check=True)
    return Dom(done.stdout.decode("utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_pipeline(tmp_path_factory.mktemp("run") / "tiny"))


@pytest.fixture(scope="module")
def dom(page: Path, tmp_path_factory: pytest.TempPathFactory) -> Dom:
    return open_page(page, tmp_path_factory.mktemp("profile"), "#all")


def test_it_draws_without_errors(dom: Dom) -> None:
    (html,) = dom.find("html")
    assert html.get("data-ready") == "true"
    assert "data-errors" not in html
    assert "could not be drawn" not in dom.text.split('<script type="application/json"')[0]


def test_curves_are_paths_one_per_series(dom: Dom) -> None:
    paths = dom.find("path", "line", stage="stage-1")
    names = sorted(path["data-series"] for path in paths)
    headline = ["grpo/loss", "grpo/reward", "held-out exact match", "grpo/response length", "held-out mean length"]
    others = ["grpo/agreement max diff", "grpo/kl", "held-out stop rate"]
    assert names == sorted([*headline, "worst layer", "mean of layers", *others])
    loss = next(path["d"] for path in paths if path["data-series"] == "grpo/loss")
    assert len(re.findall(r"[ML]", loss)) == 50
    assert "NaN" not in dom.text.split('<script type="application/json"')[0]


def test_accuracy_through_the_pipeline(dom: Dom) -> None:
    assert len(dom.find("rect", "bar")) == 2
    assert 'aria-label="Held-out exact match: sft 40%, grpo 80%"' in dom.text


def test_heatmap_has_a_cell_per_layer_and_expert(dom: Dom) -> None:
    for stage in ("stage-0", "stage-1"):
        cells = dom.find("rect", "cell", stage=stage)
        assert len(cells) == LAYERS * EXPERTS
        assert len({(cell["data-row"], cell["data-expert"]) for cell in cells}) == LAYERS * EXPERTS
        assert len([cell for cell in cells if "over" in cell["class"].split()]) == LAYERS
    assert "Max violation: layer 1 0.78, layer 2 0.78, layer 3 0.78" in dom.text


def test_sampled_answers_and_evaluation_samples(dom: Dom) -> None:
    assert len(dom.find("tr", "sample", stage="stage-0")) == 0
    assert len(dom.find("tr", "sample", stage="stage-1")) == SAMPLES + 2
    assert "答案是 2" in dom.text


def test_hostile_text_is_shown_and_does_not_run(dom: Dom) -> None:
    assert dom.find("img") == []
    assert len(dom.find("script")) == 2
    assert "<title>pwned" not in dom.text
    shown = HOSTILE.replace("<", "&lt;").replace(">", "&gt;")
    assert f'<div class="text">{shown}</div>' in dom.text


def test_controls_work(page: Path, tmp_path: Path) -> None:
    """Filters, the step slider, smoothing and the tooltip, driven by a script in a copy without the page's policy."""
    drive = """
    const stage = document.getElementById("stage-1"), said = {};
    const set = (node, value, type = "input") => { node.value = value; node.dispatchEvent(new Event(type)); };
    const rows = () => stage.querySelectorAll("table tr.sample").length;
    setTimeout(() => {
      const [text, low] = [stage.querySelector("input[type=search]"), stage.querySelector("input[type=number]")];
      const order = stage.querySelector(".tools select"), slider = stage.querySelector("input[type=range]");
      said.all = rows(); set(text, "ANSWER"); said.none = rows(); set(text, "答案"); said.text = rows();
      set(text, ""); set(low, "0.5"); said.reward = rows(); set(low, "");
      set(order, "low"); said.lowest = stage.querySelector("tr.sample .pill").textContent;
      said.pills = stage.querySelectorAll("tr.sample .pill").length;
      set(slider, "0"); said.even = stage.querySelector(".heat svg").getAttribute("aria-label");
      set(document.getElementById("smoothing"), "0.9", "change");
      said.raw = stage.querySelectorAll("path.raw").length;
      const chart = stage.querySelector(".chart svg"), box = chart.getBoundingClientRect();
      chart.dispatchEvent(new PointerEvent("pointermove", { clientX: box.right, clientY: box.top + 50 }));
      said.tip = document.getElementById("tip").innerText;
      document.documentElement.dataset.said = JSON.stringify(said);
    }, 500);
    """
    source = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    driven = tmp_path / "driven.html"
    driven.write_text(source.replace("</body>", f"<script>{drive}</script></body>"), encoding="utf-8")

    (html,) = open_page(driven, tmp_path / "profile").find("html")
    said = json.loads(html["data-said"])

    assert "data-errors" not in html
    assert (said["all"], said["none"], said["text"], said["reward"]) == (SAMPLES + 2, 2, SAMPLES + 1, 4)
    assert (said["lowest"], said["pills"]) == ("-1", SAMPLES + 2)
    assert "layer 1 0.00" in said["even"]
    assert said["raw"] >= 3
    assert re.sub(r"\s+", " ", said["tip"]) == "step 50 grpo/loss 0.02"


def test_an_empty_run_renders(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"stage": "sft"}')

    dom = open_page(write_report(tmp_path / "run"), tmp_path / "profile")

    (html,) = dom.find("html")
    assert (html.get("data-ready"), html.get("data-errors")) == ("true", None)
    assert "Nothing measured yet." in dom.text


def test_a_part_that_cannot_be_drawn_is_reported_and_leaves_the_rest(page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace('"violation":{', '"elsewhere":{'), encoding="utf-8")

    dom = open_page(broken, tmp_path / "profile")

    (html,) = dom.find("html")
    assert html.get("data-ready") == "true"
    assert html.get("data-errors")
    assert "This part could not be drawn" in dom.text
    assert len(dom.find("tr", "sample", stage="stage-1")) == SAMPLES + 2
