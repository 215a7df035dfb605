"""One stage run, gathered from its directory into the plain records the page is drawn from."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dots_align.report.autopsy import autopsy
from dots_align.report.curves import Curves, Router, Series, read_curves, read_router, thin
from dots_align.report.evidence import Case, Finding, Outcome, outcome
from dots_align.report.panels import Panel, choose_panels
from dots_align.report.reading import as_number, as_text, checkpoint_step, embeddable, read_json, read_lines
from dots_align.report.samples import Blobs, SampleSet, pack_samples, read_samples

MAX_JUDGED = 4_000  # samples the autopsy looks at


@dataclass
class Stage:
    """Everything the page shows of one stage. `summary` holds final values by short name (exact_match, loss, ...)."""

    name: str
    kind: str
    created: str = ""
    version: str = ""
    recipe_hash: str = ""
    data_hash: str = ""
    recipe: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    steps: int | None = None
    best: str = ""
    summary: dict[str, float | None] = field(default_factory=dict)
    series: dict[str, Series] = field(default_factory=dict)
    panels: list[Panel] = field(default_factory=list)
    groups: list[Panel] = field(default_factory=list)
    router: Router | None = None
    samples: list[SampleSet] = field(default_factory=list)
    outcome: Outcome = field(default_factory=lambda: Outcome("unknown"))
    findings: list[Finding] = field(default_factory=list)


def read_stage(directory: Path, name: str, notices: list[str], blobs: Blobs) -> Stage:
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
    stage.data_hash = _data_hash(directory)
    evaluations = _read_evaluations(directory, name, notices)
    curves = _add_curves(stage, directory, evaluations, notices)
    label = f"{name}/router.jsonl"
    stage.router = read_router(read_lines(directory / "router.jsonl", label, notices), notices, label, blobs)
    label = f"{name}/samples.jsonl"
    samples, total = read_samples(read_lines(directory / "samples.jsonl", label, notices))
    if samples:
        stage.samples.append(pack_samples(blobs, samples, total, "Rollouts", about="what the policy was trained on"))
    notices += _failed_hooks(read_lines(directory / "hooks.jsonl", f"{name}/hooks.jsonl", notices), name)
    stage.best = link_target(directory / "best")
    stage.samples += _evaluation_sets(directory, evaluations, blobs)
    case = Case(stage.kind, curves.points, stage.recipe, samples[-MAX_JUDGED:])
    stage.outcome, stage.findings = outcome(case), autopsy(case)
    return stage


def _failed_hooks(lines: Iterable[dict[str, Any]], name: str) -> list[str]:
    failed = [line for line in lines if line.get("status") != "done"]
    return [
        f"{name}: on_save hook {as_text(line.get('hook'))} {as_text(line.get('status')).replace('_', ' ')} on "
        f"checkpoint-{line['step']}: {as_text(line.get('error'))}."
        for line in failed
    ]


def _add_curves(stage: Stage, directory: Path, evaluations: dict[str, dict[str, Any]], notices: list[str]) -> Curves:
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
        "loss": _final(stage, f"{stage.kind}/loss"),
        "reward": _final(stage, f"{stage.kind}/reward"),
    }
    return curves


def _final(stage: Stage, name: str) -> float | None:
    values = [value for value in stage.series[name].values if value is not None] if name in stage.series else []
    return values[-1] if values else None


def _data_hash(directory: Path) -> str:
    """As the newest checkpoint's manifest has it."""
    steps = {step: path for path in directory.glob("checkpoint-*") if (step := checkpoint_step(path.name)) is not None}
    newest = steps[max(steps)] if steps else None
    return as_text(read_json(newest / "manifest.json", "", []).get("data_hash")) if newest else ""


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
        for name, value in numbers(evaluation.get("metrics")).items():
            series.setdefault(f"eval/{name}", {})[checkpoint_step(checkpoint) or 0] = value
    return series


def _evaluation_sets(directory: Path, evaluations: dict[str, dict[str, Any]], blobs: Blobs) -> list[SampleSet]:
    """The best and the last checkpoint's, each once; the newest evaluated one where neither link leads to one."""
    shown: dict[str, list[str]] = {}
    for link in ("best", "last"):
        target = link_target(directory / link)
        if evaluations.get(target):
            shown.setdefault(target, []).append(link)
    newest = next((name for name in reversed(evaluations) if evaluations[name]), None)
    if not shown and newest:
        shown[newest] = []
    sets = [_evaluation_set(", ".join(labels), name, evaluations[name], blobs) for name, labels in shown.items()]
    return [one for one in sets if one is not None]


def _evaluation_set(links: str, checkpoint: str, content: dict[str, Any], blobs: Blobs) -> SampleSet | None:
    listed = content.get("samples")
    samples = [item for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    if not samples:
        return None
    prompts = as_number(content.get("num_prompts"))
    facts = [f"{prompts:.0f} prompts" if prompts else "", as_text(content.get("data"))]
    facts += [f"scored by {scorer}" if (scorer := as_text(content.get("scorer"))) else ""]
    label = f"Evaluation of {checkpoint}" + (f" ({links})" if links else "")
    in_order = list(reversed(samples))  # packed newest first: the file's own order
    return pack_samples(blobs, in_order, len(samples), label, "score", " · ".join(filter(None, facts)))


def numbers(value: Any) -> dict[str, float]:
    """The finite numbers of a mapping by name; empty for anything else."""
    items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else ()
    return {str(name): number for name, item in items if (number := as_number(item)) is not None}


def link_target(link: Path) -> str:
    """The checkpoint's name behind a `best` or `last` link, or "" where there is none."""
    return Path(os.path.realpath(link)).name if link.is_symlink() and link.exists() else ""
