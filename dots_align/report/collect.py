"""A run directory (one stage, or a pipeline of them) gathered into the plain records the page is drawn from."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dots_align.report.curves import Panel, Router, Series, choose_panels, read_curves, read_router, thin
from dots_align.report.reading import as_number, as_text, checkpoint_step, embeddable, read_json, read_lines

MAX_SAMPLES = 500  # per stage, the latest


@dataclass
class Evaluation:
    """The samples of one checkpoint's eval.json. `label` says why it is shown: best, last, or its name."""

    label: str
    checkpoint: str
    metrics: dict[str, float]
    num_prompts: int | None
    data: str
    scorer: str
    samples: list[dict[str, Any]]
    total: int


@dataclass
class Stage:
    """Everything the page shows of one stage. `summary` holds final values by short name (exact_match, loss, ...)."""

    name: str
    kind: str
    created: str = ""
    version: str = ""
    recipe_hash: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    steps: int | None = None
    best: str = ""
    summary: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    panels: list[Panel] = field(default_factory=list)
    groups: list[Panel] = field(default_factory=list)
    router: Router | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    samples_total: int = 0
    evaluations: list[Evaluation] = field(default_factory=list)


@dataclass
class Report:
    """The whole page. `start` is the exact match before any training, where the first stage measured it at step 0."""

    name: str
    stages: list[Stage]
    notices: list[str]
    export: str = ""
    start: float | None = None


def collect(run_dir: Path) -> Report:
    """Reads `run_dir`; ValueError where it holds neither a stage run nor a pipeline."""
    notices: list[str] = []
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory: give the run directory that a stage or the pipeline wrote.")
    pipeline = read_json(run_dir / "pipeline.json", "pipeline.json", notices)
    found = _stage_dirs(run_dir)
    if (run_dir / "pipeline.json").is_file() or (found and not (run_dir / "run.json").is_file()):
        stages = _pipeline_stages(run_dir, pipeline, found, notices)
    elif (run_dir / "run.json").is_file():
        stages = [read_stage(run_dir, run_dir.resolve().name, notices)]
    else:
        raise ValueError(
            f"{run_dir} holds no run: expected run.json (one stage), pipeline.json, or sub-directories with a "
            "run.json. Give the output_dir of the recipe that was run."
        )
    report = Report(run_dir.resolve().name, stages, notices, export=as_text(pipeline.get("export")))
    report.start = _accuracy_at_start(stages)
    return report


def _stage_dirs(run_dir: Path) -> list[Path]:
    """Sub-directories that are stage runs, oldest first (stages of one pipeline run one after the other)."""
    found = [path for path in run_dir.iterdir() if not path.is_symlink() and (path / "run.json").is_file()]
    created = {path: str(read_json(path / "run.json", "", []).get("created", "")) for path in found}
    return sorted(found, key=lambda path: (created[path] == "", created[path], path.name))


def _pipeline_stages(run_dir: Path, pipeline: dict[str, Any], found: list[Path], notices: list[str]) -> list[Stage]:
    """Stages in pipeline.json's order, then those it does not name yet (it is still running, or was killed)."""
    listed = pipeline.get("stages")
    entries = [entry for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
    stages, seen = [], set()
    for number, entry in enumerate(entries, start=1):
        name = as_text(entry.get("name")) or f"stage {number}"
        directory = _find_stage(run_dir, name, entry.get("output_dir"))
        if directory is None:
            notices.append(f"{name}: its run directory is gone; only what pipeline.json says about it is shown.")
            stage = Stage(name, name)
        else:
            seen.add(directory.resolve())
            stage = read_stage(directory, name, notices)
        stages.append(_add_pipeline_entry(stage, entry))
    return stages + [read_stage(path, path.name, notices) for path in found if path.resolve() not in seen]


def _find_stage(run_dir: Path, name: str, output_dir: Any) -> Path | None:
    """Looks inside `run_dir` first: a copied or moved pipeline still names the directories it was written to."""
    written = Path(output_dir) if isinstance(output_dir, str) and output_dir else Path(name)
    candidates = (run_dir / written.name, run_dir / name, written)
    return next((path for path in candidates if (path / "run.json").is_file()), None)


def _add_pipeline_entry(stage: Stage, entry: dict[str, Any]) -> Stage:
    """The pipeline's own measurements (of the checkpoint handed to the next stage) go before the last logged ones."""
    stage.seconds = as_number(entry.get("seconds")) or stage.seconds
    for name, value in _numbers(entry.get("metrics")).items():
        stage.summary[name.removeprefix("eval/")] = value
    return stage


def read_stage(directory: Path, name: str, notices: list[str]) -> Stage:
    """One stage run; whatever is missing stays empty, whatever is broken becomes a notice."""
    run = read_json(directory / "run.json", f"{name}/run.json", notices)
    recipe = run.get("recipe")
    stage = Stage(
        name,
        kind=as_text(run.get("stage")) or name,
        created=as_text(run.get("created")),
        version=as_text(run.get("version")),
        recipe_hash=as_text(run.get("recipe_hash")),
        recipe=embeddable(recipe) if isinstance(recipe, dict) else {},
    )
    evaluations = _read_evaluations(directory, name, notices)
    _add_curves(stage, directory, evaluations, notices)
    label = f"{name}/router.jsonl"
    stage.router = read_router(read_lines(directory / "router.jsonl", label, notices), notices, label)
    label = f"{name}/samples.jsonl"
    stage.samples, stage.samples_total = _latest(read_lines(directory / "samples.jsonl", label, notices))
    for line in read_lines(directory / "hooks.jsonl", f"{name}/hooks.jsonl", notices):
        if line.get("status") != "done":
            status = as_text(line.get("status")).replace("_", " ")
            hook, error = as_text(line.get("hook")), as_text(line.get("error"))
            notices.append(f"{name}: on_save hook {hook} {status} on checkpoint-{line['step']}: {error}.")
    stage.best = _link_target(directory / "best")
    stage.evaluations = _shown_evaluations(directory, evaluations)
    return stage


def _add_curves(stage: Stage, directory: Path, evaluations: dict[str, dict[str, Any]], notices: list[str]) -> None:
    label = f"{stage.name}/metrics.jsonl"
    curves = read_curves(read_lines(directory / "metrics.jsonl", label, notices), notices, label)
    for name, points in _evaluation_points(evaluations).items():
        curves.series.setdefault(name, thin(sorted(points.items())))
    stage.series, stage.seconds, stage.steps = curves.series, curves.seconds, curves.last_step
    stage.panels, stage.groups = choose_panels(stage.series)
    stage.summary = {
        "exact_match": _final(stage, "eval/exact_match"),
        "stop_rate": _final(stage, "eval/stop_rate"),
        "mean_length": _final(stage, "eval/mean_length"),
    }
    for panel in stage.panels:
        # DPO's implicit rewards (rewards/chosen, ...) are curves, not a score to sum a stage up with
        if panel.title in ("Loss", "Reward") and "/rewards/" not in panel.names[0]:
            stage.summary[panel.title.lower()] = _final(stage, panel.names[0])


def _final(stage: Stage, name: str) -> float | None:
    values = [value for value in stage.series[name].values if value is not None] if name in stage.series else []
    return values[-1] if values else None


def _read_evaluations(directory: Path, name: str, notices: list[str]) -> dict[str, dict[str, Any]]:
    """eval.json by checkpoint name, in the order of their steps; an eval.json of the run itself (`eval`) comes last."""
    found = {}
    for path in directory.glob("checkpoint-*/eval.json"):
        if checkpoint_step(path.parent.name) is not None:
            label = f"{name}/{path.parent.name}/eval.json"
            found[path.parent.name] = read_json(path, label, notices)
    ordered = dict(sorted(found.items(), key=lambda item: checkpoint_step(item[0]) or 0))
    own = read_json(directory / "eval.json", f"{name}/eval.json", notices)
    return {**ordered, name: own} if own else ordered


def _evaluation_points(evaluations: dict[str, dict[str, Any]]) -> dict[str, dict[int, float | None]]:
    """eval/<name> series from the checkpoints, for runs whose metrics.jsonl has none."""
    series: dict[str, dict[int, float | None]] = {}
    for checkpoint, evaluation in evaluations.items():
        for name, value in _numbers(evaluation.get("metrics")).items():
            series.setdefault(f"eval/{name}", {})[checkpoint_step(checkpoint) or 0] = value
    return series


def _shown_evaluations(directory: Path, evaluations: dict[str, dict[str, Any]]) -> list[Evaluation]:
    """The best and the last checkpoint's, each once; the newest evaluated one where neither link leads to one."""
    shown: dict[str, list[str]] = {}
    for link in ("best", "last"):
        target = _link_target(directory / link)
        if evaluations.get(target):
            shown.setdefault(target, []).append(link)
    newest = next((name for name in reversed(evaluations) if evaluations[name]), None)
    if not shown and newest:
        shown[newest] = []
    return [_evaluation(" and ".join(labels), name, evaluations[name]) for name, labels in shown.items()]


def _evaluation(label: str, checkpoint: str, content: dict[str, Any]) -> Evaluation:
    listed = content.get("samples")
    samples = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    prompts = as_number(content.get("num_prompts"))
    return Evaluation(
        label,
        checkpoint,
        metrics=_numbers(content.get("metrics")),
        num_prompts=None if prompts is None else int(prompts),
        data=as_text(content.get("data")),
        scorer=as_text(content.get("scorer")),
        samples=[_sample(item, reward="score") for item in samples[:MAX_SAMPLES]],
        total=len(samples),
    )


def _latest(records: Iterable[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """(the latest MAX_SAMPLES samples, newest first; how many there are), without what a resume abandoned."""
    kept: deque[dict[str, Any]] = deque(maxlen=MAX_SAMPLES)
    total = 0
    for record in records:
        while kept and kept[-1]["step"] > record["step"]:
            kept.pop()
            total -= 1
        kept.append({"step": record["step"], **_sample(record, reward="reward")})
        total += 1
    return list(reversed(kept)), total


def _sample(record: dict[str, Any], reward: str) -> dict[str, Any]:
    texts = {key: as_text(record.get(key)) for key in ("prompt", "response", "answer", "finish_reason")}
    return {**texts, "reward": as_number(record.get(reward)), "rewards": _numbers(record.get("rewards"))}


def _numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping by name; empty for anything else."""
    items = value.items() if isinstance(value, dict) else ()
    return {str(name): number for name, item in items if (number := as_number(item)) is not None}


def _link_target(link: Path) -> str:
    """The checkpoint's name behind a `best` or `last` link, or "" where there is none."""
    return Path(os.path.realpath(link)).name if link.is_symlink() and link.exists() else ""


def _accuracy_at_start(stages: list[Stage]) -> float | None:
    series = stages[0].series.get("eval/exact_match") if stages else None
    return series.values[0] if series and series.steps[:1] == [0] else None
