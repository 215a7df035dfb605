"""What a recipe may name under `on_save:`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, model_validator

from dots_align.config.section import Section

_FUNCTION = ("where", "timeout_seconds", "device", "arguments")
_KEYS = {
    "evaluate": ("where", "timeout_seconds", "device"),
    "keep_best": ("metric", "mode", "keep"),
    "stop_early": ("metric", "mode", "patience", "min_delta"),
    "push": ("to", "hub", "timeout_seconds"),
}


class HookSection(Section):
    """One thing that is done with every published checkpoint. A text alone, such as `evaluate`, is its `hook`.

    `evaluate` (recipe's `evaluation:`), `keep_best`, `stop_early`, `push`, or a function of (checkpoint directory,
    recipe) that may return metrics: `module:function` or `path/to/file.py:function`.
    """

    model_config = ConfigDict(validate_by_name=True, validate_by_alias=True)

    hook: str
    where: Literal["trainer", "process"] | None = Field(
        default=None,
        alias="in",
        description="trainer: training waits for it, in all its processes where it evaluates; process: in a process "
        "beside, while training goes on. By default `evaluate` is in the trainer, a function in a process",
    )
    timeout_seconds: float = Field(default=3600.0, gt=0, description="what takes longer is ended, and has failed")
    device: str | None = Field(default=None, description="of a process beside, such as cuda:7 or cpu; the trainer's")
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments of a function")
    metric: str = Field(default="eval/exact_match", description="by which checkpoints are compared")
    mode: Literal["max", "min"] = Field(default="max", description="whether more or less of it is better")
    keep: int = Field(default=1, ge=1, description="how many of the best stay beside the newest ones")
    patience: int = Field(default=3, ge=1, description="evaluations without a better one before the run ends")
    min_delta: float = Field(default=0.0, ge=0, description="a gain of no more than this is none")
    to: str | None = Field(default=None, description="a folder; with `hub` the name of a repository")
    hub: bool = Field(default=False, description="upload to the Hugging Face hub, with the credentials found there")

    @model_validator(mode="before")
    @classmethod
    def _named(cls, given: Any) -> Any:
        return {"hook": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _keys_fit(self):
        if self.hook not in _KEYS and ":" not in self.hook:
            raise ValueError(f"on_save: `{self.hook}` is none of {', '.join(_KEYS)}, nor a module:function")
        known = _KEYS.get(self.hook, _FUNCTION)
        for name in sorted(self.model_fields_set - {"hook", *known}):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"on_save: `{self.hook}` has no key `{_shown(name)}`; {', '.join(map(_shown, known))}")
        if self.hook == "push" and not self.to:
            raise ValueError("on_save: `push` needs `to`, a folder, or with hub: true a repository")
        return self

    @property
    def in_trainer(self) -> bool:
        """Whether training waits for it."""
        return (self.where or ("trainer" if self.hook == "evaluate" else "process")) == "trainer"


def _shown(name: str) -> str:
    return "in" if name == "where" else name
