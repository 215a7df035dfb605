"""The gates of a release. Each gives figures, and a reason where it does not let a checkpoint pass."""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig

from dots_align.config import ModelSection, ReleaseRecipe
from dots_align.data.chat import CHAT_TEMPLATE, as_dicts
from dots_align.evals.on_save import evaluate_directory, metrics_of
from dots_align.export.template import portable_template
from dots_align.export.verify import CONVERSATIONS
from dots_align.parity.check import Sources, parity
from dots_align.parity.questions import end_of_turn
from dots_align.release.leaks import find_leaks

STOP_RATE = "stop_rate"
SHARES = ("exact_match", STOP_RATE)


@dataclass(frozen=True)
class Gate:
    """`reasons` is empty where the checkpoint passes."""

    name: str
    reasons: list[str] = field(default_factory=list)
    figures: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.reasons

    def as_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, "reasons": self.reasons, **self.figures}


def reload_gate(exported: Path) -> Gate:
    """What the fresh processes said that loaded the export before it was published."""
    manifest = json.loads((exported / "manifest.json").read_text(encoding="utf-8"))
    figures = {name: manifest[name] for name in ("verification", "gguf") if name in manifest}
    reasons = [] if "verification" in manifest else ["no fresh process has loaded it"]
    reasons += [
        f"gguf:{name}: {proof['skipped']}" for name, proof in figures.get("gguf", {}).items() if "skipped" in proof
    ]
    return Gate("reload", reasons, figures)


def parity_gate(checkpoint: Path, exported: Path) -> Gate:
    """The checkpoint against its export, and the GGUF files in it."""
    found = parity(checkpoint, sources=Sources(exported=exported))
    return Gate("parity", [] if found.ok else [found.verdict], found.as_dict())


def evaluation_gates(exported: Path, recipe: ReleaseRecipe, output: Path) -> list[Gate]:
    """The evaluation of the exported files, against the thresholds; how often a turn ends is a gate of its own."""
    model = ModelSection(path=str(exported))
    measured = evaluate_directory(exported, model, recipe.evaluation, recipe.seed, output)
    metrics = {name.removeprefix("eval/"): value for name, value in measured.items()}
    asked = {k: v for k, v in json.loads(output.read_text(encoding="utf-8")).items() if k != "samples"}
    stop = {STOP_RATE: recipe.thresholds.get(STOP_RATE, recipe.min_stop_rate)}
    others = {name: value for name, value in recipe.thresholds.items() if name != STOP_RATE}
    gates = [Gate("evaluation", _below(metrics, others), {**asked, "thresholds": others})]
    return [
        *gates,
        Gate("stop_rate", _below(metrics, stop), {"metrics": {STOP_RATE: metrics.get(STOP_RATE)}, "thresholds": stop}),
    ]


def check_thresholds(recipe: ReleaseRecipe) -> None:
    """Raises ValueError for a threshold that no checkpoint could be held to, before any gate has run."""
    measured = metrics_of(recipe.evaluation)
    for name, least in recipe.thresholds.items():
        key = f"thresholds.{name}"
        if name not in measured:
            near = difflib.get_close_matches(name, measured, n=1)
            told = f"did you mean {near[0]}?" if near else f"there are {', '.join(measured)}"
            raise ValueError(f"{key}: the evaluation has no such metric; {told}")
        if not math.isfinite(least):
            raise ValueError(f"{key}={least:g}: give the number that {name} has to reach")
        if name in SHARES and not 0 <= least <= 1:
            raise ValueError(f"{key}={least:g}: {name} is a share; give a number from 0 to 1, such as 0.9 for 90 %")


def _below(metrics: Mapping[str, float], thresholds: Mapping[str, float]) -> list[str]:
    reasons = []
    for name, least in thresholds.items():
        if not metrics[name] >= least:
            reasons.append(f"{name} is {metrics[name]:.4g}, at least {least:g} is asked for")
    return reasons


def template_gate(exported: Path) -> Gate:
    """The chat template renders the dots layout, everywhere it is stored, and ends with a token that stops."""
    tokenizer = AutoTokenizer.from_pretrained(exported, local_files_only=True, trust_remote_code=False)
    reasons = []
    stored = {
        "chat_template.jinja": (exported / "chat_template.jinja").read_text(encoding="utf-8"),
        "tokenizer_config.json": json.loads((exported / "tokenizer_config.json").read_text(encoding="utf-8")).get(
            "chat_template"
        ),
    }
    rendered = 0
    for name, template in stored.items():
        if not template:
            reasons.append(f"{name} holds no chat template")
            continue
        for conversation in CONVERSATIONS:
            turns, options = as_dicts(conversation), {"add_generation_prompt": True, "tokenize": False}
            ours = tokenizer.apply_chat_template(turns, chat_template=portable_template(CHAT_TEMPLATE), **options)
            theirs = tokenizer.apply_chat_template(turns, chat_template=template, **options)
            rendered += ours == theirs
            if ours != theirs:
                reasons.append(f"{name} renders {conversation[-1].content!r} other than the dots layout: {theirs!r}")
                break
    end = end_of_turn(tokenizer)
    stops = GenerationConfig.from_pretrained(exported, local_files_only=True).eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    if end not in stops:
        reasons.append(f"generation_config.json stops at {stops}, an answer ends with {end}")
    return Gate("template", reasons, {"num_rendered_alike": rendered, "end_of_turn": end, "stop_token_ids": stops})


def leak_gate(exported: Path) -> Gate:
    found = find_leaks(exported)
    return Gate("leaks", found, {"num_files": sum(p.is_file() for p in exported.rglob("*"))})
