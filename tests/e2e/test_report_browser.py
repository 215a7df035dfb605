"""The report page in a real browser: what it draws, what pointer and keys do, and that hostile text stays text."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dots_align.experts.analysis import Analysis, CheckpointLoad, Shift
from dots_align.experts.domains import Domain
from dots_align.experts.result import as_values
from dots_align.experts.weights import WeightChange
from dots_align.report.page import BASE_SCRIPTS, render_page, write_report
from tests.e2e.browser import BROWSER, NAMES, Browser

HOSTILE = "</script><img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
LAYERS, EXPERTS, SAMPLES = 3, 8, 50

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(BROWSER is None, reason=f"no Chromium-like browser on PATH (looked for {NAMES})"),
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


def sample(step: int) -> dict[str, Any]:
    """Its reward grows with the step; the advantage of the first half is negative."""
    return {
        "step": step,
        "prompt": f"What is {step} plus 1?",
        "response": f"答案是 {step + 1}",
        "answer": str(step + 1),
        "reward": step / SAMPLES,
        "rewards": {"exact": 1.0, "brevity": step / SAMPLES - 1},
        "finish_reason": "stop" if step % 10 else "length",
        "tokens": ["答案", "是", " ", str(step + 1), "<|endofresponse|>"],
        "logprobs": [-0.1, -2.5, -0.01, -0.7, 0.0],
        "advantages": [-0.5 if step <= SAMPLES / 2 else 0.5],
    }


def make_pipeline(root: Path) -> Path:
    make_stage(root / "sft", "sft", 0.4)
    make_stage(root / "grpo", "grpo", 0.8)
    rows = [sample(step) for step in range(1, SAMPLES)]
    rows.append({**sample(SAMPLES), "prompt": HOSTILE, "response": HOSTILE, "answer": HOSTILE, "reward": -1.0})
    rows[-1] |= {"tokens": ["<b>", HOSTILE], "logprobs": [-0.1, -3.0]}
    write_lines(root / "grpo" / "samples.jsonl", rows)
    checkpoint = root / "grpo" / "checkpoint-50"
    checkpoint.mkdir()
    evaluated = [{**sample(0), "score": 1.0}, {**sample(0), "response": HOSTILE, "score": 0.0}]
    (checkpoint / "eval.json").write_text(json.dumps({"metrics": {"exact_match": 0.8}, "samples": evaluated}))
    (root / "grpo" / "best").symlink_to("checkpoint-50")
    stages = [{"name": name, "output_dir": str(root / name), "seconds": 61.0} for name in ("sft", "grpo")]
    (root / "pipeline.json").write_text(json.dumps({"stages": stages}))
    return root


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(make_pipeline(tmp_path_factory.mktemp("run") / "tiny"))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def browser(running: Browser, page: Path) -> Iterator[Browser]:
    """The page, freshly loaded; no test may leave a complaint behind."""
    running.complaints.clear()
    running.prefer("light")
    running.open(page)
    yield running
    assert running.complaints == []
    assert running.run("document.documentElement.dataset.errors || null") is None


STAGE = "#stage-1"  # grpo


def text(browser: Browser, selector: str) -> str:
    found = browser.run(f"document.querySelector({json.dumps(selector)}).innerText")
    return re.sub(r"\s+", " ", found).strip()


def count(browser: Browser, selector: str) -> int:
    return browser.run(f"document.querySelectorAll({json.dumps(selector)}).length")


def shown_of_all(browser: Browser) -> str:
    return text(browser, f"{STAGE} .said")


def focus(browser: Browser, selector: str) -> None:
    browser.run(f"document.querySelector({json.dumps(selector)}).focus({{preventScroll: true}})")


def test_every_chart_is_drawn_and_nothing_fails(browser: Browser) -> None:
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    for place in range(0, browser.run("document.documentElement.scrollHeight"), 700):  # charts wait until they are near
        browser.run(f"scrollTo(0, {place})")
        browser.settle()
    names = browser.run(f"[...document.querySelectorAll('{STAGE} path[data-series]')].map((one) => one.dataset.series)")
    metrics = ["loss", "reward", "response length", "agreement max diff", "kl"]
    held_out = ["held-out exact match", "held-out mean length", "held-out stop rate"]
    assert sorted(names) == sorted([*metrics, *held_out, "worst layer", "mean of layers"])
    path = browser.run(f"document.querySelector('{STAGE} path[data-series=loss]').getAttribute('d')")
    assert len(re.findall(r"[ML]", path)) == 50
    assert "NaN" not in browser.run("document.querySelector('main').outerHTML")
    assert "could not be drawn" not in text(browser, "main")


def test_the_top_says_how_it_went(browser: Browser) -> None:
    assert text(browser, "h1") == "Held-out exact match rose from 40.0% to 80.0%."
    label = browser.run("document.querySelector('.stairs svg').getAttribute('aria-label')")
    assert label == "Held-out exact match: sft 40%, grpo 80%"
    assert count(browser, ".autopsy.well .checks li") == 9
    assert count(browser, ".finding") == 0


def test_the_pointer_reads_a_curve(browser: Browser) -> None:
    chart = f"{STAGE} [aria-label='Loss'] .chart"
    x, y = browser.center(chart)
    browser.mouse("mouseMoved", x, y)
    browser.settle()
    assert re.fullmatch(r"step 2\d loss 0\.0[34]\d*", text(browser, "#tip"))
    # charts of a stage point at the same step
    assert browser.run(f"document.querySelectorAll('{STAGE} g[visibility=visible] .cross').length") > 1


def test_a_stretch_is_zoomed_into_and_filters_the_samples(browser: Browser) -> None:
    browser.drag(f"{STAGE} [aria-label='Loss'] .chart", 0.4, 0.7)
    chip = text(browser, f"{STAGE} .stage-head .chip")
    first, last = map(int, re.findall(r"\d+", chip))
    assert 12 <= first < last <= 40
    assert shown_of_all(browser) == f"{last - first + 1} of {SAMPLES}"
    browser.click(f"{STAGE} .samples .chip")
    assert shown_of_all(browser) == f"{SAMPLES} of {SAMPLES}"
    assert browser.run(f"document.querySelector('{STAGE} .stage-head .chip').hidden") is True


def test_keys_do_what_the_pointer_does(browser: Browser) -> None:
    browser.center(f"{STAGE} [aria-label='Loss'] .chart")
    focus(browser, f"{STAGE} [aria-label='Loss'] .chart")
    browser.press("Home")
    assert text(browser, "#tip") == "step 1 loss 1"
    browser.press("ArrowRight")
    assert text(browser, "#tip") == "step 2 loss 0.5"
    browser.press("+")
    assert not browser.run(f"document.querySelector('{STAGE} .chip').hidden")
    browser.press("Escape")
    assert browser.run(f"document.querySelector('{STAGE} .chip').hidden")


def test_every_curve_has_a_table(browser: Browser) -> None:
    card = f"{STAGE} [aria-label='Loss']"
    browser.click(f"{card} button")
    assert count(browser, f"{card} tbody tr") == 50
    assert text(browser, f"{card} tbody tr") == "1 1"
    assert browser.run(f"document.querySelector(\"{card} button\").getAttribute('aria-expanded')") == "true"


def test_the_heatmap_tells_each_expert(browser: Browser) -> None:
    browser.center(f"{STAGE} .heat")
    focus(browser, f"{STAGE} .heat")
    for key in ("ArrowRight", "ArrowDown", "ArrowRight"):
        browser.press(key)
    assert text(browser, "#tip") == "step 30, layer 2, expert 1 share of slots 11.1% of its fair share 0.89×"
    slider = f"document.querySelector('{STAGE} .experts input[type=range]')"
    browser.run(f"{slider}.focus()")
    browser.press("Home")
    label = browser.run(f"document.querySelector('{STAGE} .heat').getAttribute('aria-label')")
    assert label.startswith("Expert load at step 10. Max violation: layer 1 0.00")
    browser.press("End")
    assert "layer 1 0.78" in browser.run(f"document.querySelector('{STAGE} .heat').getAttribute('aria-label')")


def test_samples_are_searched_filtered_and_ordered(browser: Browser) -> None:
    search, low = f"{STAGE} .samples input[type=search]", f"{STAGE} .samples input[type=number]"
    assert shown_of_all(browser) == f"{SAMPLES} of {SAMPLES}"
    browser.type(search, "PLUS 答案")
    assert shown_of_all(browser) == f"{SAMPLES - 1} of {SAMPLES}"
    browser.type(search, 'what "is 17 plus"')
    assert shown_of_all(browser) == f"1 of {SAMPLES}"
    assert text(browser, f"{STAGE} .pane .prompt mark:nth-of-type(2)") == "is 17 plus"
    browser.type(search, "")
    browser.type(low, "0.5")
    assert shown_of_all(browser) == f"25 of {SAMPLES}"
    browser.type(low, "")
    for select, value, first in (("how answers end", "length", "-1"), ("order", "high", "0.8")):
        node = f"document.querySelector('{STAGE} .samples select[aria-label=\"{select}\"]')"
        browser.run(f"{node}.value = {json.dumps(value)}, {node}.dispatchEvent(new Event('input'))")
        assert text(browser, f"{STAGE} .list [aria-posinset='1'] .pill") == first
    assert shown_of_all(browser) == f"5 of {SAMPLES}"
    browser.type(search, "nothing like it")
    assert text(browser, f"{STAGE} .pane") == "No sample matches."


def test_the_list_is_walked_with_keys(browser: Browser) -> None:
    browser.center(f"{STAGE} .list")
    focus(browser, f"{STAGE} .list")
    browser.press("ArrowDown")
    assert text(browser, f"{STAGE} .pane .prompt") == "What is 49 plus 1?"
    browser.press("End")
    assert text(browser, f"{STAGE} .pane .prompt") == "What is 1 plus 1?"
    chosen = f"document.getElementById(document.querySelector('{STAGE} .list').getAttribute('aria-activedescendant'))"
    assert browser.run(f"{chosen}.getAttribute('aria-posinset')") == str(SAMPLES)
    assert browser.run(f"{chosen}.getAttribute('aria-selected')") == "true"
    assert count(browser, f"{STAGE} .list [role=option]") < 30  # only what is in view exists
    browser.click(f"{STAGE} .list [aria-posinset='45']")
    assert text(browser, f"{STAGE} .pane .prompt") == "What is 6 plus 1?"


def test_tokens_are_coloured(browser: Browser) -> None:
    browser.click(f"{STAGE} .list [aria-posinset='2']")
    browser.wait(f"document.querySelectorAll('{STAGE} .pane .token').length === 5")
    weights = browser.run(
        f"[...document.querySelectorAll('{STAGE} .token')].map((t) => t.style.getPropertyValue('--weight'))"
    )
    assert weights == ["11%", "55%", "4%", "29%", "0%"]
    focus(browser, f"{STAGE} .tokens")
    browser.press("ArrowRight")
    browser.press("ArrowRight")
    assert text(browser, "#tip") == 'token 2 of 5: "是" log-prob -2.5 (8.2%) advantage 0.5'
    browser.click(f"{STAGE} .pane .segmented label:nth-of-type(2)")
    browser.wait(f"document.querySelectorAll('{STAGE} .token.plus').length === 5")
    browser.click(f"{STAGE} .list [aria-posinset='3']")
    parts = text(browser, f"{STAGE} .parts")
    assert parts == "exact 1 brevity -0.04"


def test_hostile_text_is_shown_and_does_not_run(browser: Browser) -> None:
    browser.click(f"{STAGE} .list [aria-posinset='1']")
    browser.wait(f"document.querySelectorAll('{STAGE} .pane .token').length === 2")
    browser.run("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert HOSTILE in text(browser, f"{STAGE} .pane .prompt")
    assert text(browser, f"{STAGE} .pane .tokens") == "<b>" + HOSTILE
    assert HOSTILE in text(browser, f"{STAGE} .recipe")
    assert count(browser, "main img, main script") == 0
    assert "pwned" not in browser.run("document.title")


def test_evaluations_are_samples_too(browser: Browser) -> None:
    node = f"document.querySelector('{STAGE} .samples-card select')"
    browser.run(f"{node}.value = '1', {node}.dispatchEvent(new Event('change'))")
    browser.wait(f"document.querySelector('{STAGE} .said')?.textContent === '2 of 2'")
    assert text(browser, f"{STAGE} .list [aria-posinset='2'] .a").startswith("</script>")


def test_everything_that_can_be_used_has_a_name(browser: Browser) -> None:
    nodes = browser.send("Accessibility.getFullAXTree")["nodes"]
    roles = {
        "button",
        "combobox",
        "searchbox",
        "slider",
        "spinbutton",
        "listbox",
        "radio",
        "application",
        "link",
        "textbox",
    }
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node.get("ignored")
        and node.get("role", {}).get("value") in roles
        and not node.get("name", {}).get("value")
    ]
    assert nameless == []
    names = {node.get("name", {}).get("value") for node in nodes}
    assert {"Sections", "Samples", "Autopsy", "search samples", "Loss as a table"} <= names
    # the first Tab leads past the navigation
    browser.run("document.activeElement.blur(), scrollTo(0, 0)")
    browser.press("Tab")
    assert browser.run("document.activeElement.textContent") == "Skip to the report"


def test_light_and_dark(browser: Browser, tmp_path: Path) -> None:
    seen = {}
    for scheme in ("light", "dark"):
        browser.prefer(scheme)
        browser.settle()
        seen[scheme] = browser.run("getComputedStyle(document.body).backgroundColor")
        browser.screenshot(tmp_path / f"{scheme}.png")
    assert sum(map(int, re.findall(r"\d+", seen["light"]))) > 600
    assert sum(map(int, re.findall(r"\d+", seen["dark"]))) < 100
    assert (tmp_path / "light.png").read_bytes() != (tmp_path / "dark.png").read_bytes()


def test_a_run_that_went_wrong_is_dissected(running: Browser, tmp_path: Path) -> None:
    make_stage(tmp_path / "run", "grpo", 0.5)
    lines = [
        {"step": step, "time": 1.0, "grpo/reward": 0.8 if step < 30 else 0.1}
        | {"grpo/mismatch_kl": 1e-4 if step < 30 else 0.5}
        for step in range(1, 61)
    ]
    write_lines(tmp_path / "run" / "metrics.jsonl", lines)
    running.open(write_report(tmp_path / "run"))
    assert "went wrong: trainer and rollout disagree, from step 30 on." in text(running, "h1")
    assert text(running, ".finding.first h4") == "Trainer and rollout disagree"
    assert "mismatch_kl reaches 0.5 nats from step 30 on" in text(running, ".finding.first ul")
    assert count(running, ".checks .bad") == 1
    running.click(".finding.first button")
    assert text(running, "#stage-0 .stage-head .chip") == "steps 23–42 ✕"


def test_runs_are_compared(running: Browser, tmp_path: Path) -> None:
    for name, accuracy in (("one", 0.4), ("two", 0.8)):
        make_stage(tmp_path / name, "grpo", accuracy)
    recipe = json.loads((tmp_path / "two" / "run.json").read_text())
    recipe["recipe"]["optim"]["learning_rate"] = 3e-4
    (tmp_path / "two" / "run.json").write_text(json.dumps(recipe))
    write_lines(tmp_path / "two" / "samples.jsonl", [sample(1)])
    running.open(write_report([tmp_path / "one", tmp_path / "two"]))
    running.center("#stage-0 [aria-label='Loss'] .chart")
    drawn = "document.querySelectorAll(\"#stage-0 [aria-label='Loss'] path[data-series]\")"
    assert running.run(f"[...{drawn}].map((one) => one.dataset.series)") == ["one", "two"]
    assert text(running, "table.diff tbody") == "optim.learning_rate 0.0001 0.0003"
    assert count(running, ".tile.who") == 2
    assert running.complaints == []


def test_many_samples_come_in_chunks(running: Browser, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"stage": "grpo"}')
    write_lines(tmp_path / "run" / "samples.jsonl", [sample(step) for step in range(1, 9_001)])
    running.open(write_report(tmp_path / "run"))
    assert text(running, ".said") == "9,000 of 9,000"
    running.type(".samples input[type=search]", '"is 8999 plus"')
    assert text(running, ".said") == "1 of 9,000"
    assert count(running, ".list [role=option]") == 1


def test_an_empty_run_renders(running: Browser, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text('{"stage": "sft"}')
    running.open(write_report(tmp_path / "run"))
    assert "Nothing measured yet." in text(running, "main")
    assert running.run("document.documentElement.dataset.errors || null") is None


def test_a_part_that_cannot_be_drawn_leaves_the_rest(running: Browser, page: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace('"violation":{', '"elsewhere":{'), encoding="utf-8")
    running.open(broken)
    assert "This part could not be drawn" in text(running, f"{STAGE} .experts")
    assert running.run("document.documentElement.dataset.errors")
    assert shown_of_all(running) == f"{SAMPLES} of {SAMPLES}"


def make_experts_page(path: Path) -> Path:
    """Two checkpoints of 2 layers and 4 experts; the second sends maths to expert 0 of layer 1."""
    even, skewed = [[25, 25, 25, 25], [40, 20, 20, 20]], [[70, 10, 10, 10], [25, 25, 25, 25]]
    counts = [{"maths": np.array(table), "prose": np.array(even)} for table in (even, skewed)]
    shift = {name: np.array([0.5, 0.1]) for name in counts[0]}
    loads = [
        CheckpointLoad("checkpoint-1", "runs/x/checkpoint-1", 1, counts[0]),
        CheckpointLoad("checkpoint-2", "runs/x/checkpoint-2", 2, counts[1], [Shift("checkpoint-1", shift, shift)]),
    ]
    change = WeightChange(*(np.full((2, 4), value) for value in (0.1, 0.2, -0.01)))
    domains = [Domain("maths", "maths.jsonl"), Domain("prose", HOSTILE)]
    found = Analysis([1, 2], 4, 1, domains, {"maths": 100, "prose": 100}, loads, change)
    path.write_bytes(render_page("experts", {"experts": as_values(found)}, (*BASE_SCRIPTS, "experts.js"), {}))
    return path


def test_the_page_of_experts(running: Browser, tmp_path: Path) -> None:
    running.complaints.clear()
    running.open(make_experts_page(tmp_path / "experts.html"))
    assert "30.0% of all choices of experts differ between checkpoint-1 and checkpoint-2." in text(running, "h1")
    first = "#specialists tbody tr:nth-child(1)"
    assert text(running, first) == "1 0 maths 2.80× 1.00×"
    load = "[aria-label='Expert load']"
    running.center(f"{load} .heat")
    focus(running, f"{load} .heat")
    running.press("ArrowRight")
    assert text(running, "#tip") == "layer 1, expert 0 maths 2.80× prose 1.00×"
    node = f"document.querySelector(\"{load} select[aria-label='checkpoint']\")"
    running.run(f"{node}.value = '0', {node}.dispatchEvent(new Event('change'))")
    running.press("ArrowLeft")
    assert text(running, "#tip") == "layer 1, expert 0 maths 1.00× prose 1.00×"
    for place in range(0, running.run("document.documentElement.scrollHeight"), 600):
        running.run(f"scrollTo(0, {place})")
        running.settle()
    running.click("[aria-label='Router shift by layer'] button")
    assert text(running, "[aria-label='Router shift by layer'] tbody tr") == "layer 1 50% 50%"
    assert count(running, "main img, main script") == 0
    assert running.complaints == []
    assert running.run("document.documentElement.dataset.errors || null") is None
