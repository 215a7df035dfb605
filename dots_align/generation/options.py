"""The keys of `dots-align generate`; this file imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from dots_align.config import DataSection, ModelSection, ParallelSection, Section, apply_override, explain, recipe_dict


class GenerateOptions(Section):
    """What is sampled, and how. The sampling keys mean what they mean in a recipe's `rollout:`."""

    model: ModelSection
    data: DataSection
    parallel: ParallelSection = ParallelSection()
    num_samples: int = Field(default=1, ge=1, description="of each prompt")
    temperature: float = Field(default=1.0, ge=0, description="0 is greedy")
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, description="0: no limit")
    min_p: float = Field(default=0.0, ge=0, le=1)
    max_tokens: int = Field(default=256, ge=1)
    seed: int = Field(default=0, ge=0)
    token_ids: bool = Field(default=False, description="ids of the prompt and of each sample")
    logprobs: bool = Field(default=False, description="token ids and their log-probabilities")
    routes: bool = Field(default=False, description="token ids and the experts they went to")
    max_num_sequences: int = Field(default=256, ge=1, description="samples that decode at once")
    kv_cache_gib: float | None = Field(default=None, gt=0, description="null: half of the memory that is free")
    overwrite: bool = Field(default=False, description="delete what another run left in the output file")

    @property
    def keeps_ids(self) -> bool:
        return self.token_ids or self.logprobs or self.routes

    def identity(self) -> dict[str, Any]:
        """The keys that change what is sampled, but for the checkpoint and the prompts."""
        how = {"model", "data", "parallel", "max_num_sequences", "kv_cache_gib", "overwrite"}
        return {key: value for key, value in recipe_dict(self).items() if key not in how}


def load_options(checkpoint: Path, prompts: str, overrides: Sequence[str]) -> GenerateOptions:
    """Validates what was given on the command line.

    Raises:
        ValueError: one line for each key that is wrong, with what to do.
    """
    values: dict[str, Any] = {"model": {"path": str(checkpoint)}, "data": {"path": prompts}}
    origins: dict[tuple[str, ...], str] = {}
    for override in overrides:
        apply_override(values, override, origins)
    try:
        return GenerateOptions.model_validate(values)
    except ValidationError as error:
        where = Path("command line")
        raise ValueError("\n".join(explain(e, GenerateOptions, origins, where) for e in error.errors())) from None


def generation_keys() -> list[str]:
    """`key=default` of what is particular to generating, for the help."""
    shared = ("model", "data", "parallel")
    own = [f"{k}={v.default}".lower() for k, v in GenerateOptions.model_fields.items() if k not in shared]
    data = [
        f"data.{k}={v.default}" for k, v in DataSection.model_fields.items() if k in ("prompt_field", "messages_field")
    ]
    return [key.replace("none", "null") for key in (*own, *data)]
