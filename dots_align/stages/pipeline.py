"""Stages in order, each from the checkpoint of the one before; then export and report."""

from __future__ import annotations

import importlib
import time
from pathlib import Path
from typing import Any

from dots_align.checkpoint import evaluation_of, linked, newest_whole
from dots_align.config import PipelineRecipe, load_recipe
from dots_align.export.targets import export
from dots_align.report.page import write_report
from dots_align.run_directory import open_run_directory
from dots_align.runtime import logger, world_size, write_json

EXPORT, REPORT, RECORD = "export", "report.html", "pipeline.json"


def run(recipe: PipelineRecipe) -> Path:
    """Runs what is not finished yet and returns the exported chat checkpoint (or the last stage's checkpoint)."""
    if world_size() > 1:
        raise ValueError("a pipeline runs on one process; launch its stages one by one with accelerate launch")
    # Every recipe is read, and every stage's code imported, before anything is trained.
    stages = plan(recipe)
    runners = [importlib.import_module(f"dots_align.stages.{stage.stage}").run for stage in stages]
    run_dir = open_run_directory(recipe)
    record: list[dict[str, Any]] = []
    previous: Path | None = None
    for stage, runner in zip(stages, runners, strict=True):
        started = time.monotonic()
        if previous is not None:
            stage = _starting_from(stage, previous)
        last = runner(stage)
        reached = (recipe.start_from == "best" and linked(last.parent, "best")) or last
        record.append(
            {
                "name": stage.stage,
                "output_dir": stage.output_dir,
                "checkpoint": str(reached),
                "metrics": evaluation_of(reached),
                "seconds": round(time.monotonic() - started, 1),
            }
        )
        write_json(run_dir / RECORD, {"stages": record, "export": None, "report": None})
        if stage.stage != "reward_model":  # which is a means: the next stage goes on from the model before
            previous = reached
    assert previous is not None
    exported = export(previous, run_dir / EXPORT, overwrite=True) if recipe.export else None
    report = run_dir / REPORT
    paths = {"export": str(exported) if exported else None, "report": str(report)}
    write_json(run_dir / RECORD, {"stages": record, **paths})
    write_report(run_dir, report)
    _say(record, previous, exported, report)
    return exported or previous


def plan(recipe: PipelineRecipe) -> list[Any]:
    """The stages' recipes with the pipeline's seed and output directory: `<output_dir>/<name of the recipe file>`."""
    stages, names = [], set()
    for entry in recipe.stages:
        name = Path(entry.recipe).stem
        if name in names:
            raise ValueError(f"stages: two recipes are named {name!r}, they would share {recipe.output_dir}/{name}")
        names.add(name)
        own = [f"output_dir={recipe.output_dir}/{name}", f"seed={recipe.seed}"]
        loaded = load_recipe(entry.recipe, [*own, *entry.overrides])
        if loaded.stage in ("pipeline", "eval"):
            raise ValueError(f"stages: {entry.recipe} is a recipe for {loaded.stage!r}, which is no training stage")
        stages.append(loaded)
    if all(stage.stage == "reward_model" for stage in stages):
        raise ValueError(
            "stages: a pipeline ends with a model that answers, and there are only reward models in this one"
        )
    return stages


def _starting_from(stage: Any, checkpoint: Path) -> Any:
    model = stage.model.model_copy(update={"path": str(checkpoint), "preset": None})
    return stage.model_copy(update={"model": model})


def _say(record: list[dict[str, Any]], last: Path, exported: Path | None, report: Path) -> None:
    """The last lines of a pipeline: what was reached, where it lies, how to talk to it."""
    logger.info("")
    for stage in record:
        values = stage["metrics"]
        if "accuracy" in values:
            logger.info(
                "%-6s accuracy    %5.1f %%   (%.0f s)", stage["name"], 100 * values["accuracy"], stage["seconds"]
            )
        elif values:
            logger.info(
                "%-6s exact match %5.1f %%   stop rate %5.1f %%   mean length %5.1f   (%.0f s)",
                stage["name"],
                100 * values["exact_match"],
                100 * values["stop_rate"],
                values["mean_length"],
                stage["seconds"],
            )
    logger.info("")
    logger.info("chat checkpoint: %s", exported or newest_whole(last.parent))
    logger.info("report:          %s", report)
    logger.info("talk to it:      dots-align chat %s", exported or last)
