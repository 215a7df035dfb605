"""Run directories (of one stage, or of a pipeline of them) gathered into the plain records the page is drawn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dots_align.report.reading import as_number, as_text, read_json
from dots_align.report.samples import Blobs
from dots_align.report.stage import Stage, numbers, read_stage


@dataclass
class Verdict:
    """One sentence about a run. `level` is good, flat, bad or open (nothing can be said yet)."""

    level: str
    text: str


@dataclass
class Run:
    """`start` is the exact match before any training, where the first stage measured it at step 0."""

    name: str
    stages: list[Stage]
    notices: list[str]
    export: str = ""
    start: float | None = None
    verdict: Verdict = field(default_factory=lambda: Verdict("open", ""))


@dataclass
class Report:
    """The whole page: one run, or several to compare. `blobs` are what `Stage`s name."""

    runs: list[Run]
    blobs: Blobs


def collect(run_dirs: Sequence[Path]) -> Report:
    """Reads the runs; ValueError where one holds neither a stage run nor a pipeline."""
    blobs = Blobs()
    runs = [read_run(Path(run_dir), blobs) for run_dir in run_dirs]
    for run, name in zip(runs, distinct_names([Path(run_dir).resolve() for run_dir in run_dirs]), strict=True):
        run.name = name
    return Report(runs, blobs)


def distinct_names(paths: Sequence[Path]) -> list[str]:
    """The directories' names, with as many parents as it takes to tell them apart."""
    depth = 1
    while depth < 4 and len({path.parts[-depth:] for path in paths}) < len(set(paths)):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in paths]


def read_run(run_dir: Path, blobs: Blobs) -> Run:
    """One run directory; ValueError where it holds neither a stage run nor a pipeline."""
    notices: list[str] = []
    if not run_dir.is_dir():
        raise ValueError(f"{run_dir} is not a directory: give the run directory that a stage or the pipeline wrote.")
    pipeline = read_json(run_dir / "pipeline.json", "pipeline.json", notices)
    found = _stage_dirs(run_dir)
    if (run_dir / "pipeline.json").is_file() or (found and not (run_dir / "run.json").is_file()):
        stages = _pipeline_stages(run_dir, pipeline, found, notices, blobs)
    elif (run_dir / "run.json").is_file():
        stages = [read_stage(run_dir, run_dir.resolve().name, notices, blobs)]
    else:
        raise ValueError(
            f"{run_dir} holds no run: expected run.json (one stage), pipeline.json, or sub-directories with a "
            "run.json. Give the output_dir of the recipe that was run."
        )
    run = Run(run_dir.resolve().name, stages, notices, as_text(pipeline.get("export")), _accuracy_at_start(stages))
    run.verdict = verdict(run)
    return run


def _stage_dirs(run_dir: Path) -> list[Path]:
    """Sub-directories that are stage runs, oldest first (stages of one pipeline run one after the other)."""
    found = [path for path in run_dir.iterdir() if not path.is_symlink() and (path / "run.json").is_file()]
    created = {path: str(read_json(path / "run.json", "", []).get("created", "")) for path in found}
    return sorted(found, key=lambda path: (created[path] == "", created[path], path.name))


def _pipeline_stages(
    run_dir: Path, pipeline: dict[str, Any], found: list[Path], notices: list[str], blobs: Blobs
) -> list[Stage]:
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
            stage = read_stage(directory, name, notices, blobs)
        stages.append(_add_pipeline_entry(stage, entry))
    return stages + [read_stage(path, path.name, notices, blobs) for path in found if path.resolve() not in seen]


def _find_stage(run_dir: Path, name: str, output_dir: Any) -> Path | None:
    """Looks inside `run_dir` first: a copied or moved pipeline still names the directories it was written to."""
    written = Path(output_dir) if isinstance(output_dir, str) and output_dir else Path(name)
    candidates = (run_dir / written.name, run_dir / name, written)
    return next((path for path in candidates if (path / "run.json").is_file()), None)


def _add_pipeline_entry(stage: Stage, entry: dict[str, Any]) -> Stage:
    """The pipeline's own measurements (of the checkpoint handed to the next stage) go before the last logged ones."""
    stage.seconds = as_number(entry.get("seconds")) or stage.seconds
    for name, value in numbers(entry.get("metrics")).items():
        stage.summary[name.removeprefix("eval/")] = value
    return stage


def _accuracy_at_start(stages: list[Stage]) -> float | None:
    """Exact match before the first update, where the first stage has an evaluation at step 0."""
    series = stages[0].series.get("eval/exact_match") if stages else None
    return series.values[0] if series and series.steps[:1] == [0] else None


def verdict(run: Run) -> Verdict:
    """What somebody who reads one line should know."""
    for stage in run.stages:
        if stage.findings:
            first = stage.findings[0]
            when = "" if first.first_step is None else f", from step {first.first_step} on"
            return Verdict("bad", f"{stage.name} went wrong: {first.title[0].lower()}{first.title[1:]}{when}.")
    measured = [value for stage in run.stages if (value := stage.summary.get("exact_match")) is not None]
    path = ([run.start] if run.start is not None else []) + measured
    if len(path) >= 2:
        level = "good" if path[-1] > path[0] else "flat"
        way = "rose" if path[-1] > path[0] else "went"
        return Verdict(level, f"Held-out exact match {way} from {path[0]:.1%} to {path[-1]:.1%}.")
    for stage in reversed(run.stages):
        went = stage.outcome
        if went.verdict != "unknown":
            name = went.measure.replace("/", " ").replace("_", " ")
            level = "good" if went.verdict == "better" else "flat"
            return Verdict(level, f"{name[0].upper()}{name[1:]} went from {went.start:.3g} to {went.end:.3g}.")
    if path:
        return Verdict("open", f"Held-out exact match is {path[0]:.1%}.")
    return Verdict("open", "Too little is logged to tell how it went.")
