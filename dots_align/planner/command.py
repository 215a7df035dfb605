"""What `dots-align plan` does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dots_align.config import load_recipe
from dots_align.planner.hardware import GPUS
from dots_align.planner.plan import Plan, make_plan
from dots_align.planner.search import Search, Suggestion
from dots_align.planner.table import as_json, as_text
from dots_align.planner.work import PROMPT_TOKENS, Launch, check_plannable, model_config


def run(
    path: Path,
    overrides: Sequence[str] = (),
    nodes: int | None = None,
    gpus_per_node: int | None = None,
    prompt_tokens: int | None = None,
    as_object: bool = False,
) -> str:
    """Plans a recipe and returns the page, or JSON.

    Args:
        nodes, gpus_per_node: the launch; if not given, what the recipe's name ends in, else 1 and 8.
        prompt_tokens: the longest prompt of a rollout.

    Raises:
        ValueError: the recipe is wrong, its layout impossible, or its stage has no plan.
    """
    recipe = load_recipe(path, overrides)
    check_plannable(recipe)
    launch = Launch.of(path, nodes, gpus_per_node)
    config, source = model_config(recipe.model)
    longest = prompt_tokens or PROMPT_TOKENS
    plan = make_plan(recipe, config, launch, longest)
    search = Search(recipe, config, launch, longest)
    nearest: dict[str, tuple[Suggestion, Plan] | None] = {}
    for gpu in GPUS:
        if not plan.fits(gpu):
            found = search.nearest(gpu)
            nearest[gpu.name] = found and (found, make_plan(found.recipe, config, found.launch, longest))
    write = as_json if as_object else as_text
    page = write(str(path), source, plan, nearest)
    return page if isinstance(page, str) else json.dumps(page, indent=2)
