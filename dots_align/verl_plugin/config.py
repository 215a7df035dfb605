"""Our part of verl's configuration. verl makes these by their names, in the driver and in every worker, before it looks
for an engine or a rollout: so importing this module is what registers ours.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from verl.workers.config import EngineConfig, OptimizerConfig

from dots_align.verl_plugin import engine, rollout  # noqa: F401 - they register themselves
from dots_align.verl_plugin.loading import require
from dots_align.verl_plugin.mapping import STRATEGY

require()


@dataclass
class DotsOptimizerConfig(OptimizerConfig):
    """AdamW and its schedule, in verl's names where it has one.

    `num_training_steps` and `lr_warmup_steps` count optimizer steps; verl's ratio and its total are not read.
    """

    lr_scheduler_type: str = "cosine"
    min_learning_rate: float | None = None
    adam_epsilon: float = 1e-8
    num_training_steps: int = 1


@dataclass
class DotsEngineConfig(EngineConfig):
    """How the model is loaded, spread and trained: sections of a recipe, as mappings, and verl's own keys.

    `mismatch` is the policy's gate; `temperature` that of the rollouts, where verl does not tell it.
    """

    strategy: str = STRATEGY
    model: dict[str, Any] = field(default_factory=dict)
    parallel: dict[str, Any] = field(default_factory=dict)
    lora: Any = None
    mismatch: Any = None
    bf16: bool = False
    gradient_checkpointing: bool = False
    share_prompts: bool = True
