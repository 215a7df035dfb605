"""What verl's driver saves becomes a checkpoint of the run, like any other: whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from verl.trainer.ppo.checkpoint_callback import CheckpointCallback

from dots_align.checkpoint import PREFIX, manifest_for, seal_and_publish
from dots_align.data.sources import data_hash, load_prompts
from dots_align.stages.critic import CRITIC
from dots_align.verl_plugin import config as _registered  # noqa: F401 - the driver needs our rollout as well
from dots_align.verl_plugin.recipe import recipe_of


class Publish(CheckpointCallback):
    """Moves `global_step_N` into the run as `checkpoint-N`, and leaves links where verl looks for it on a resume."""

    def __init__(self, config: Any = None) -> None:
        super().__init__(config)
        assert config is not None, "verl gives its configuration"
        self.run_dir = Path(config.data.train_files).parent
        self.recipe = recipe_of(config.data.train_files)
        self.data_hash = data_hash(load_prompts(self.recipe.data, self.recipe.seed))

    def on_save(self, trainer: Any, global_step: int, checkpoint_dir: str, async_save: bool = False, **_: Any) -> None:
        saved, final = Path(checkpoint_dir), self.run_dir / f"{PREFIX}{global_step}"
        staging = final.with_name(f".{final.name}.staging")
        shutil.rmtree(staging, ignore_errors=True)
        (saved / "actor").rename(staging)
        if (saved / CRITIC).is_dir():
            (saved / CRITIC).rename(staging / CRITIC)
            (saved / CRITIC).symlink_to(final / CRITIC)
        seal_and_publish(staging, final, manifest_for(self.recipe, global_step, self.data_hash))
        (saved / "actor").symlink_to(final)
        for other in saved.parent.glob("global_step_*"):
            if not (other / "actor").exists():  # a link to a checkpoint that was dropped
                shutil.rmtree(other)
