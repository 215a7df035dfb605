"""What an export reads from its source: how the weights are stored, and how they came to be."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dots_align.checkpoint import MANIFEST
from dots_align.export.curves import Curves, read_curves

# A file of this machine: absolute, in a home directory, on a Windows drive, a file URL, or relative to who knows where.
_LOCAL_PATH = re.compile(r"^(/|~|\\\\|[A-Za-z]:[\\/]|file:|\.\.?[\\/])")
# Keys whose values are text for the model and not names of anything.
_PROSE = frozenset({"system_prompt"})


@dataclass(frozen=True)
class TrainedStage:
    """One stage behind a checkpoint. `evaluation` is its eval.json without the samples, or None. `recipe_hash`,
    `data_hash` and `version` (of dots_align) are what its manifest says; `curves` those of its run.
    """

    stage: str
    step: int
    recipe: dict[str, Any]
    evaluation: dict[str, Any] | None
    recipe_hash: str = ""
    data_hash: str = ""
    version: str = ""
    curves: Curves = field(default_factory=dict)


@dataclass(frozen=True)
class History:
    """How a checkpoint came to be. `stages` are in training order; `base` is what they started from.

    `base` is the name of a checkpoint directory that no recipe made, or `preset:<name>` for fresh weights.
    """

    stages: list[TrainedStage]
    base: str | None

    def as_dict(self) -> dict[str, Any]:
        return {"base": self.base, "stages": [vars(s) for s in self.stages]}


def without_local_paths(value: Any, key: str = "") -> Any:
    """A copy in which every path that means something only on this machine is cut to its last part."""
    if isinstance(value, dict):
        return {k: without_local_paths(v, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [without_local_paths(v, key) for v in value]
    if isinstance(value, str) and key not in _PROSE and _LOCAL_PATH.match(value):
        return re.split(r"[\\/]", value.rstrip("\\/"))[-1]
    return value


def training_history(checkpoint: Path) -> History:
    """Follows the manifests from a checkpoint to the one its stage started from, and so on, as far as they go."""
    stages: list[TrainedStage] = []
    seen: set[Path] = set()
    here: Path | None = checkpoint
    while here is not None and here.resolve() not in seen:
        seen.add(here.resolve())
        manifest = _manifest(here)
        if "training" in manifest:  # an earlier export, which carries its history
            earlier = [TrainedStage(**s) for s in manifest["training"]["stages"]]
            return History(earlier + stages, manifest["training"]["base"])
        recipe = manifest.get("recipe") or {}
        model = recipe.get("model") or {}
        if manifest.get("stage") == "init":
            return History(stages, f"preset:{model['preset']}" if model.get("preset") else None)
        if not manifest:
            return History(stages, here.resolve().name)
        recipe_shown = without_local_paths(recipe)
        stage, step = manifest["stage"], manifest["step"]
        said = {name: manifest.get(name) or "" for name in ("recipe_hash", "data_hash", "version")}
        curves = read_curves(here, stage, step)
        stages.insert(0, TrainedStage(stage, step, recipe_shown, _evaluation(here), **said, curves=curves))
        if not model.get("path"):
            return History(stages, f"preset:{model['preset']}" if model.get("preset") else None)
        start = _start(here, Path(model["path"]))
        if start is None:
            return History(stages, Path(model["path"]).name)
        here = start
    return History(stages, None)


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / MANIFEST
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _start(checkpoint: Path, named: Path) -> Path | None:
    """The directory a recipe started from; runs that moved together are siblings: <runs>/<stage>/checkpoint-N."""
    runs = checkpoint.resolve().parent.parent
    for candidate in (named, runs.joinpath(*named.parts[-2:])):
        if (candidate / MANIFEST).is_file() or (candidate / "config.json").is_file():
            return candidate
    return None


def _evaluation(checkpoint: Path) -> dict[str, Any] | None:
    """eval.json without its samples; None if there is none, or none that can be read: a card does without it."""
    try:
        found = json.loads((checkpoint / "eval.json").read_text(encoding="utf-8"))
        metrics = {str(name): float(value) for name, value in found["metrics"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    shown = {name: found[name] for name in ("num_prompts", "data", "scorer") if name in found}
    return without_local_paths({"metrics": metrics, **shown})
