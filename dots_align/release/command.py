"""`dots-align release`: export, then every gate; RELEASE.json is the mark of a checkpoint that passed them all."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dots_align import __version__
from dots_align.checkpoint import MANIFEST, check_whole, file_sha256
from dots_align.config import ReleaseRecipe, apply_override, explain, load_recipe, recipe_dict
from dots_align.evals.command import make_writable
from dots_align.evals.on_save import check_evaluation
from dots_align.export.source import without_local_paths
from dots_align.export.targets import export
from dots_align.release.gates import (
    Gate,
    check_thresholds,
    evaluation_gates,
    leak_gate,
    parity_gate,
    reload_gate,
    template_gate,
)
from dots_align.runtime import logger, now, write_json

MARK = "RELEASE.json"


def release(checkpoint: Path, output: Path, recipe: ReleaseRecipe, overwrite: bool = False) -> tuple[Path, bool]:
    """Exports a checkpoint and puts the export through all gates.

    Args:
        checkpoint: full or adapter (merged).
        output: the directory of the export.
        overwrite: replace an earlier export there.

    Returns:
        the file with every figure, and whether all gates were passed: then it is `output`/RELEASE.json, and holds the
        sum of the manifest, so that it is the mark of these files alone. Otherwise it lies beside `output`, which has
        no mark.

    Raises:
        ValueError: the checkpoint is damaged, a threshold or the evaluation's data is wrong, or `output` holds
        something else.
    """
    checkpoint, output = Path(checkpoint), Path(output)
    check_whole(checkpoint)
    check_thresholds(recipe)
    check_evaluation(recipe.evaluation, recipe.seed)
    make_writable(output.parent, "--output")
    failed = failure_of(output)
    failed.unlink(missing_ok=True)
    _refuse_foreign(output, overwrite)
    gates = _pass_gates(checkpoint, output, recipe)
    ok = all(gate.ok for gate in gates)
    record: dict[str, Any] = {
        "released": ok,
        "created": now(),
        "version": __version__,
        "recipe": without_local_paths(recipe_dict(recipe)),
        "gates": {gate.name: without_local_paths(gate.as_dict()) for gate in gates},
    }
    if gates[0].ok:
        record["manifest_sha256"] = file_sha256(output / MANIFEST)
    target = output / MARK if ok else failed
    write_json(target, record)
    for gate in gates:
        logger.info("%-10s %s", gate.name, "passed" if gate.ok else "FAILED: " + "; ".join(gate.reasons))
    return target, ok


def is_released(directory: Path) -> bool:
    """Whether a directory has the mark, and is still what was marked."""
    try:
        record = json.loads((directory / MARK).read_text(encoding="utf-8"))
        check_whole(directory)
        return bool(record["released"]) and record["manifest_sha256"] == file_sha256(directory / MANIFEST)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def failure_of(output: Path) -> Path:
    """Where the figures of a failed release lie."""
    return output.with_name(f"{output.name}.failed.json")


def recipe_for(checkpoint: Path, path: Path | None, overrides: Sequence[str]) -> ReleaseRecipe:
    """The release recipe; without one, the evaluation of the recipe that the checkpoint was trained with.

    Raises:
        ValueError: there is neither, or a key is wrong.
    """
    if path is not None:
        return load_recipe(path, overrides, "release")
    manifest = checkpoint / MANIFEST
    made = json.loads(manifest.read_text(encoding="utf-8")) if manifest.is_file() else {}
    trained = made.get("recipe") or {}
    evaluation = trained.get("evaluation")
    if not evaluation:
        raise ValueError(f"{checkpoint}: was not trained with an evaluation; give one with --recipe (stage: release)")
    values = {"stage": "release", "seed": trained.get("seed", 0), "evaluation": evaluation}
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        apply_override(values, override, origins)
    try:
        return ReleaseRecipe.model_validate(values)
    except ValidationError as error:
        raise ValueError("\n".join(explain(e, ReleaseRecipe, origins, manifest) for e in error.errors())) from None


def _refuse_foreign(output: Path, overwrite: bool) -> None:
    """Before gates run for minutes; what is there may only be an earlier export, and only if it may be replaced."""
    if output.exists() and any(output.iterdir()) and not overwrite:
        raise ValueError(f"{output}: is there already; choose another output directory, or give --overwrite")


def _pass_gates(checkpoint: Path, output: Path, recipe: ReleaseRecipe) -> list[Gate]:
    """All gates, whatever the others say; without an export there is nothing to try the rest on."""
    try:
        export(checkpoint, output, overwrite=True, targets=recipe.targets)
    except ValueError as error:
        if output.exists() and not (output / MANIFEST).is_file():
            raise
        return [Gate("export", [str(error)])]
    gates = [Gate("export", [], {"targets": list(recipe.targets)})]
    evaluated = output.with_name(f".{output.name}.eval.json")
    runs: list[tuple[str, Callable[[], list[Gate]]]] = [
        ("reload", lambda: [reload_gate(output)]),
        ("parity", lambda: [parity_gate(checkpoint, output)]),
        ("evaluation", lambda: evaluation_gates(output, recipe, evaluated)),
        ("template", lambda: [template_gate(output)]),
        ("leaks", lambda: [leak_gate(output)]),
    ]
    for name, run in runs:
        try:
            gates += run()
        except (ValueError, OSError) as error:
            gates.append(Gate(name, [str(error)]))
    evaluated.unlink(missing_ok=True)
    return gates
