"""Evaluation tasks: a small file each (tasks/*.yaml, or your own) says where records lie, what is asked and how the
answer counts.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import Field, ValidationError, model_validator

from dots_align.config import RewardSection, Section, explain
from dots_align.config.loading import key_lines
from dots_align.data.chat import as_dicts, encode_prompt
from dots_align.evals.records import Record, TaskData, read_records
from dots_align.types import Message

TASKS = Path(__file__).with_name("tasks")
_TEMPLATES = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=False)
_TEMPLATES.globals.update(len=len, list=list, str=str, letters="ABCDEFGHIJKLMNOPQRSTUVWXYZ")
KINDS = {"text": str, "number": (int, float), "list": list, "object": dict}


class SamplingSection(Section):
    """How a task that generates is sampled. With several samples a prompt, scores are means over them (avg@k)."""

    num_samples: int = Field(default=1, ge=1)
    temperature: float = Field(default=0.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=1024, ge=1)
    stop: tuple[str, ...] = Field(default=(), description="texts before which an answer is cut off")
    seed: int = 0


class TaskSection(Section):
    """A task. Templates (jinja) see a record's fields, `file` (the name of its file, without suffix) and `group`.

    `generate`: the answer to `prompt` is scored against `reference` by `scorers`. `choice`: of the `choices`, texts
    that continue the prompt, the likeliest one is the answer, and `gold` the index of the right one. `loss`: how likely
    the only choice is, and whether it is what the model would have said.
    """

    name: str
    about: str = Field(description="where the task comes from, and whose form of asking this is")
    language: Literal["en", "zh"]
    kind: Literal["generate", "choice", "loss"]
    data: TaskData
    fields: dict[str, Literal["text", "number", "list", "object", "any"]]
    rename: dict[str, str] = Field(
        default_factory=dict, description="names that other copies of the data have, to those here"
    )
    group: str | None = Field(default=None, description="template: what results are also given for one by one")
    form: Literal["chat", "text"] = Field(default="chat", description="chat: the prompt is a user's turn")
    preamble: str = Field(default="", description="template: before the examples")
    prompt: str
    answer: str = Field(default="", description="template: how an example goes on behind its prompt")
    num_shots: int = Field(default=0, ge=0)
    shots: TaskData | None = None
    reference: str | tuple[str, ...] = Field(default="", description="template; or fields, as a JSON object")
    scorers: dict[str, RewardSection] = Field(default_factory=dict, description="reward functions by metric")
    metric: str = Field(description="the one of its metrics that sums the task up")
    choices: str = Field(default="", description="expression: a list of texts")
    gold: str = Field(default="", description="expression: a number")
    sampling: SamplingSection = SamplingSection()
    example: dict[str, Any] = Field(description="a made-up record")

    @model_validator(mode="after")
    def _whole(self):
        if (self.kind == "generate") != bool(self.scorers):
            raise ValueError(f"{self.name}: `scorers` belong to a task that generates, and only to that")
        if (self.kind != "generate") != bool(self.choices):
            raise ValueError(f"{self.name}: `choices` belong to a task of kind choice or loss, and only to that")
        if self.num_shots and not (self.shots and self.answer):
            raise ValueError(
                f"{self.name}: num_shots={self.num_shots} needs `shots`, the file of examples, and `answer`"
            )
        return self


@dataclass(frozen=True)
class Item:
    """What is asked of the model for one record. `choices` continue the prompt; `gold` is the right one's index."""

    source: str
    group: str
    messages: tuple[Message, ...]
    choices: tuple[str, ...] = ()
    gold: int = 0
    reference: str = ""

    @property
    def prompt(self) -> str:
        """The prompt as text, or of a chat the user's turn."""
        return self.messages[-1].content


def task_names() -> list[str]:
    """The tasks that come with the package."""
    return sorted(path.stem for path in TASKS.glob("*.yaml"))


def load_task(name: str) -> TaskSection:
    """The task of that name, or of the path of a .yaml file. Raises ValueError: there is none, or it is not whole."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else TASKS / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"no task {name!r}; there are {', '.join(task_names())}, or give the path of a .yaml file")
    text = path.read_text(encoding="utf-8")
    try:
        return TaskSection.model_validate(yaml.safe_load(text))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from None
    except ValidationError as error:
        lines = {key: f"{path}:{line}" for key, line in key_lines(text).items()}
        raise ValueError("\n".join(explain(e, TaskSection, lines, path) for e in error.errors())) from None


def load_items(task: TaskSection, folder: Path | None, tokenizer: Any, limit: int | None, hub: bool) -> list[Item]:
    """What a task asks, in the order of its data.

    Args:
        folder: under which its files lie. tokenizer: for data that is generated to a length. limit: at most so many.
        hub: read from the Hugging Face hub what is not under `folder`.

    Raises:
        ValueError: no data; or a record, named by file and line, lacks a field, or one is of another kind.
    """
    records = read_records(task.data, folder, tokenizer, limit, hub, task.name)
    shots: dict[str, list[Record]] = {}
    if task.num_shots:
        assert task.shots is not None
        for record in read_records(task.shots, folder, tokenizer, None, hub, task.name):
            values = checked(task, record)
            shots.setdefault(_group(task, values, record), []).append(Record(record.source, values))
    found = []
    for record in records:
        values = checked(task, record)
        group = _group(task, values, record)
        found.append(make_item(task, Record(record.source, values), group, shots.get(group, [])[: task.num_shots]))
    return found


def checked(task: TaskSection, record: Record) -> dict[str, Any]:
    """A record's fields, by the names the task has for them. Raises ValueError, naming file and line."""
    values = dict(record.values)
    for old, new in task.rename.items():
        if old in values and new not in values:
            values[new] = values.pop(old)
    for name, kind in task.fields.items():
        if name not in values:
            have = ", ".join(map(repr, record.values)) or "nothing"
            raise ValueError(
                f"{record.source}: no field {name!r}, which task {task.name} needs (the record has {have})"
            )
        if kind != "any" and not isinstance(values[name], KINDS[kind]):
            found = type(values[name]).__name__
            raise ValueError(f"{record.source}: field {name!r} must be a {kind} for task {task.name}, found {found}")
    return {"file": "", **values}


def make_item(task: TaskSection, record: Record, group: str, shots: list[Record]) -> Item:
    """The item of a record whose fields were checked."""
    try:
        parts = [render(task.preamble, record.values, group)]
        parts += [render(task.prompt, s.values, group) + render(task.answer, s.values, group) for s in shots]
        parts.append(render(task.prompt, record.values, group))
        if task.kind == "generate":
            reference = _reference(task, record.values, group)
            return Item(record.source, group, _messages(parts), reference=reference)
        choices = tuple(_evaluate(task.choices, record.values, group))
        gold = _evaluate(task.gold, record.values, group) if task.gold else 0
        if not isinstance(gold, int) or not 0 <= gold < len(choices) or not all(choices):
            raise ValueError(f"the right choice is {gold!r} of {choices!r}")
        return Item(record.source, group, _messages(parts), choices, gold)
    except (TemplateError, ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(f"{record.source}: not a record of task {task.name}: {error}") from None


def _messages(parts: list[str]) -> tuple[Message, ...]:
    return (Message("user", "\n\n".join(part for part in parts if part)),)


def _reference(task: TaskSection, values: dict[str, Any], group: str) -> str:
    if isinstance(task.reference, str):
        return render(task.reference, values, group)
    return json.dumps({name: values[name] for name in task.reference if name in values}, ensure_ascii=False)


def _group(task: TaskSection, values: dict[str, Any], record: Record) -> str:
    try:
        return render(task.group, values, "") if task.group else ""
    except TemplateError as error:
        raise ValueError(f"{record.source}: not a record of task {task.name}: {error}") from None


@functools.cache
def _template(text: str) -> Any:
    return _TEMPLATES.from_string(text)


@functools.cache
def _expression(text: str) -> Any:
    return _TEMPLATES.compile_expression(text, undefined_to_none=False)


def render(template: str, values: dict[str, Any], group: str) -> str:
    """A template filled in with a record."""
    return _template(template).render(**values, group=group).rstrip("\n")


def _evaluate(expression: str, values: dict[str, Any], group: str) -> Any:
    return _expression(expression)(**values, group=group)


def prompt_ids(tokenizer: Any, task: TaskSection, item: Item) -> list[int]:
    """Token ids of an item's prompt: the user's turn up to `<|response|>`, or, of form `text`, the text alone."""
    if task.form == "chat":
        return encode_prompt(tokenizer, item.messages)
    return list(tokenizer(item.prompt, add_special_tokens=False)["input_ids"])


def rendered(task: TaskSection, item: Item) -> dict[str, Any]:
    """An item as people read it."""
    asked = {"form": task.form, "messages": as_dicts(item.messages)}
    if item.choices:
        return {**asked, "choices": list(item.choices), "gold": item.gold}
    return {**asked, "reference": item.reference}


def example_prompts() -> dict[str, dict[str, Any]]:
    """The items of all tasks' made-up records, behind one example where the task has any: what goldens hold."""
    found = {}
    for name in task_names():
        task = load_task(name)
        record = Record(f"{name}:example", task.example)
        values = checked(task, record)
        group = _group(task, values, record)
        shots = [Record(record.source, values)] if task.num_shots else []
        found[name] = rendered(task, make_item(task, Record(record.source, values), group, shots))
    return found
