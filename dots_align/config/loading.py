"""Reading a recipe file with its overrides, and telling a person what is wrong with it."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from dots_align.config.recipes import RECIPES, PipelineRecipe
from dots_align.config.section import Section

# What other programs call a key of ours.
ELSEWHERE = {
    "lr": "learning_rate",
    "bs": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "num_epochs": "num_train_epochs",
    "rank": "r",
    "alpha": "lora_alpha",
    "num_generations": "group_size",
    "max_new_tokens": "max_tokens",
    "max_seq_length": "max_length",
    "max_completion_length": "max_tokens",
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Any:
    """Reads a recipe file, applies `key=value` overrides and validates every key.

    Args:
        path: the YAML file.
        overrides: like `optim.learning_rate=1e-5`; values are YAML, `key=null` unsets.
        stage: the stage the caller is about to run; a recipe of another stage is refused.

    Raises:
        ValueError: one line for each thing that is wrong, with file, line or override, key, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: {_no_recipe(path)}")
    try:
        text = path.read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        lines = key_lines(text)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); a recipe is a YAML file") from None
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys, found {type(values).__name__}")
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        if values.get("stage") == "pipeline":
            override = _stage_override(values, override)
        apply_override(values, override, origins)
    found = values.get("stage")
    if not isinstance(found, str) or found not in RECIPES:
        where = origins.get(("stage",), str(path))
        raise ValueError(f"{where}: `stage` must be one of {', '.join(RECIPES)}, found {found!r}")
    if stage is not None and found != stage:
        raise ValueError(f"{path}: this is a recipe for stage {found!r}; run `dots-align {found} {path}`")
    try:
        recipe = RECIPES[found].model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        # A list whose only item is wrong is also called too short; the item is what to mend.
        deeper = {e["loc"][:n] for e in problems for n in range(len(e["loc"]))}
        problems = [e for e in problems if e["type"] != "too_short" or e["loc"] not in deeper]
        raise ValueError("\n".join(explain(e, RECIPES[found], origins, path) for e in problems)) from None
    return _with_stages_found(recipe, path) if isinstance(recipe, PipelineRecipe) else recipe


def _with_stages_found(recipe: PipelineRecipe, path: Path) -> PipelineRecipe:
    """Recipes that are not where a pipeline is run from are looked for from the folders that its own file lies in."""
    stages = []
    for stage in recipe.stages:
        places = [Path(stage.recipe), *(folder / stage.recipe for folder in path.resolve().parents)]
        found = next((place for place in places if place.is_file()), places[0])
        stages.append(stage.model_copy(update={"recipe": str(found)}))
    return recipe.model_copy(update={"stages": tuple(stages)})


def _no_recipe(path: Path) -> str:
    if path.is_dir():
        return "this is a directory; give a recipe, a YAML file"
    beside = [str(p) for p in path.parent.glob("*.yaml")]
    near = difflib.get_close_matches(str(path), beside, n=1)
    known = "the recipes that come with dots_align are under recipes/"
    return f"no such recipe file; {f'did you mean {near[0]}?' if near else known}"


def recipe_dict(recipe: Section) -> dict[str, Any]:
    """The recipe with every default filled in, as plain JSON values."""
    return recipe.model_dump(mode="json", by_alias=True)


def recipe_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two recipes differ, as `key: old -> new`."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += recipe_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(
                f"{prefix}{key}: {json.dumps(before, ensure_ascii=False)} -> {json.dumps(after, ensure_ascii=False)}"
            )
    return found


def key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line number of every key path in a YAML document; list items appear as their index."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                if (first := lines.get((*at, str(key.value)))) is not None:
                    raise ValueError(f"line {line}: `{key.value}` is given twice, first in line {first}; keep one")
                lines[(*at, str(key.value))] = line
                walk(value, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*at, str(index))] = value.start_mark.line + 1
                walk(value, (*at, str(index)))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return lines


def _stage_override(values: dict[str, Any], override: str) -> str:
    """`grpo.train.max_steps=5` given to a pipeline goes to the stage whose recipe file is called grpo."""
    name, dot, rest = override.partition(".")
    if not dot or name in PipelineRecipe.model_fields:
        return override
    names = [Path(str(stage.get("recipe"))).stem for stage in values.get("stages", []) if isinstance(stage, dict)]
    if name not in names:
        raise ValueError(f"override {override!r}: no stage {name!r} in this pipeline; there are {', '.join(names)}")
    index = names.index(name)
    given = [*values["stages"][index].get("overrides", []), rest]
    return f"stages.{index}.overrides={json.dumps(given)}"


def apply_override(values: dict[str, Any], override: str, origins: dict[tuple[str, ...], str]) -> None:
    """Puts `key=value` into `values`, and where it came from into `origins`, by key path."""
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: write key=value, for example optim.learning_rate=1e-5")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        value = raw  # such as {a: b with a stray brace: the user means the string
    path = tuple(key.split("."))
    here: Any = values
    for depth, part in enumerate(path):
        inner = depth < len(path) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) > len(here):
                raise ValueError(
                    f"override {override!r}: {'.'.join(path[:depth])} is a list of {len(here)}; {part!r} is not in it"
                )
            if int(part) == len(here):
                here.append({})  # one past the end adds an item
            place: Any = int(part)
        else:
            place = part
            if inner and not isinstance(here.get(part), dict | list):
                here[part] = {}
        if inner:
            here = here[place]
        else:
            here[place] = value
    origins[path] = f"override {override!r}"


def explain(error: Any, recipe: type[Section], origins: dict[tuple[str, ...], str], path: Path) -> str:
    """One line for a person: where, which key, what is wrong, what to do."""
    location = tuple(str(part) for part in error["loc"])
    where = _origin(location, origins) or str(path)
    key, found = ".".join(location), f"found {error['input']!r}"
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_suggestion(recipe, location)}"
    if error["type"] == "missing":
        return f"{where}: the key `{key}` is missing; add it to the recipe or give it as {key}=…"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    if error["type"] == "tuple_type":
        return f"{where}: `{key}`: has to be a list, such as [a, b], {found}"
    if error["type"] in ("model_type", "model_attributes_type"):
        inner = next((k for k in _all_keys(recipe) if k.startswith(f"{key}.")), f"{key}.…")
        return f"{where}: `{key}`: has to be a group of keys, such as {inner}=…, {found}"
    told = f"{where}: `{key}`: {error['msg'][0].lower()}{error['msg'][1:]}, {found}"
    if error["type"] == "literal_error" and isinstance(error["input"], str):
        near = difflib.get_close_matches(error["input"], re.findall(r"'([^']+)'", error["ctx"]["expected"]), n=1)
        told += f"; did you mean {near[0]!r}?" if near else ""
    return told


def _origin(location: tuple[str, ...], origins: dict[tuple[str, ...], str]) -> str | None:
    """Where a key was given, or what it lies in, or (a group that only an override made) what lies in it."""
    around = (origins[location[:n]] for n in range(len(location), 0, -1) if location[:n] in origins)
    inside = (origin for place, origin in origins.items() if place[: len(location)] == location)
    return next(around, None) or next(inside, None)


def _all_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + (info.alias or name))
        for candidate in (info.annotation, *get_args(info.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                keys += _all_keys(candidate, f"{prefix}{name}.")
    return keys


def _suggestion(recipe: type[Section], location: tuple[str, ...]) -> str:
    """The nearest existing key: by the whole path, or by the last part wherever it lives."""
    keys, plain = _all_keys(recipe), tuple(part for part in location if not part.isdigit())
    near = [] if plain[-1] in ELSEWHERE else difflib.get_close_matches(".".join(plain), keys, n=1, cutoff=0.75)
    if not near:
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
        near = [by_leaf[leaf] for leaf in _near_leaves(plain[-1], list(by_leaf))]
    if not near:
        return f"; keys here are {', '.join(_siblings(keys, location))}"
    section, _, leaf = near[0].rpartition(".")
    if section == ".".join(plain[:-1]):  # beside it: in the same item of the same list
        return f"; did you mean `{'.'.join((*location[:-1], leaf))}`?"
    return f"; did you mean `{near[0]}`?"


def _near_leaves(wanted: str, leaves: list[str]) -> list[str]:
    """The one that is spelled alike, that other programs call so, or whose name `wanted` is a part of."""
    spelled = difflib.get_close_matches(wanted, leaves, n=1, cutoff=0.7)
    called = [ELSEWHERE[wanted]] if ELSEWHERE.get(wanted) in leaves else []
    part = [leaf for leaf in leaves if len(wanted) > 4 and wanted in leaf]
    return (called or spelled or part)[:1]


def _siblings(keys: list[str], location: tuple[str, ...]) -> list[str]:
    prefix = ".".join(location[:-1])
    prefix = f"{prefix}." if prefix else ""
    return [k[len(prefix) :] for k in keys if k.startswith(prefix) and "." not in k[len(prefix) :]] or ["stage"]
