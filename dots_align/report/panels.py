"""Which metrics are drawn together, under which heading: a stage's headline charts, and groups of all the others."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from dots_align.report.curves import Series


@dataclass
class Panel:
    """A chart, by series names. `scale` is linear, log or percent; `kind` is lines or stack (shares of a whole)."""

    title: str
    names: list[str]
    scale: str = "linear"
    kind: str = "lines"
    note: str = ""


@dataclass(frozen=True)
class _Spec:
    """`patterns` are for the name behind `<stage>/`; with `first_only` the first pattern that hits is the only one."""

    title: str
    patterns: tuple[str, ...]
    scale: str = "linear"
    kind: str = "lines"
    note: str = ""
    first_only: bool = False


# Phases that follow each other, the finest that a run logs; what runs beside them would be counted twice.
PHASES = (
    ("rollout_wait_seconds", "update_seconds"),
    ("sampling_seconds", "score_seconds", "update_seconds"),
    ("rollout_seconds", "update_seconds"),
)
SPECS: tuple[_Spec, ...] = (
    _Spec("Reward", (r"reward|reward[_/]mean|mean_reward", r"reward_(?!errors).+|greedy_reward|overlong_penalty")),
    _Spec("Implicit rewards", (r"rewards/(chosen|rejected|margins)",)),
    _Spec(
        "Accuracy",
        (r"exact_match|accuracy|accuracies|rewards/accuracies|mean_token_accuracy|token_accuracy|pass@\d+|avg@\d+",),
        "percent",
    ),
    _Spec(
        "Answer length",
        (r"(\w+/)?(mean_)?(response_|completion_)?(mean_)?length([_/]mean)?", r"response_length_(correct|wrong)"),
        note="tokens",
    ),
    _Spec("Loss", (r"loss|eval_loss", r"(?!balance)\w+_loss"), first_only=True),
    _Spec("Entropy", (r"entropy",), note="nats per token"),
    _Spec("Clip fractions", (r"\w*clipfrac\w*|rejected_tokens|clip_fraction",), "percent", note="share of tokens"),
    _Spec("KL", (r"ppo_kl|kl",), note="nats"),
    _Spec(
        "Mismatch",
        (r"mismatch_(mean|kl|router_shift)|agreement_(max|median)",),
        "log",
        note="trainer against rollout, nats",
    ),
    _Spec("Gradient norm", (r"grad_norm|critic_grad_norm",), "log"),
    _Spec(
        "Groups and graders", (r"zero_variance_groups|dropped_groups|reward_errors|refill_rounds",), note="count a step"
    ),
    _Spec("Ends by itself", (r"stop_rate",), "percent"),
    _Spec("Staleness", (r"staleness(_max)?",), note="steps behind the trainer"),
    _Spec("Router", (r"router_(entropy|score_entropy)",), note="entropy, 1 = even"),
    *(_Spec("Time per phase", ("|".join(names),), kind="stack", note="seconds a step") for names in PHASES),
)
AGREEMENT = "Train/rollout agreement"


def choose_panels(series: Mapping[str, Series]) -> tuple[list[Panel], list[Panel]]:
    """(headline panels, groups of every other metric) for the metrics of one stage."""
    names = sorted(series)
    headline: list[Panel] = []
    for spec in SPECS:
        panel = _panel(spec, names, series)
        whole = spec.kind == "lines" or (panel is not None and len(panel.names) == spec.patterns[0].count("|") + 1)
        if panel is not None and whole and all(panel.title != earlier.title for earlier in headline):
            headline.append(panel)
    shown = {name for panel in headline for name in panel.names}
    groups: dict[str, list[str]] = {}
    for name in names:
        if name not in shown:
            groups.setdefault(_group(name), []).append(name)
    ordered = sorted(groups.items(), key=lambda item: (item[0] != AGREEMENT, item[0]))
    return headline, [Panel(title, members) for title, members in ordered]


def _panel(spec: _Spec, names: Iterable[str], series: Mapping[str, Series]) -> Panel | None:
    hits: list[str] = []
    for pattern in spec.patterns:
        if not (hits and spec.first_only):
            hits += [name for name in names if re.fullmatch(pattern, name.partition("/")[2] or name)]
    if not hits:
        return None
    hits = _distinct(sorted(dict.fromkeys(hits), key=lambda name: name.startswith("eval/")), series)
    scale = spec.scale
    if scale == "percent" and not all(_is_share(series[name]) for name in hits):
        scale = "linear"
    if scale == "log" and not any(_is_positive(series[name]) for name in hits):
        scale = "linear"
    return Panel(spec.title, hits, scale, spec.kind, spec.note)


def _distinct(names: list[str], series: Mapping[str, Series]) -> list[str]:
    """Without parts that only repeat the whole, as the one reward function of a run does."""
    whole = series[names[0]]
    repeated = [name for name in names[1:] if name.startswith(f"{names[0]}_") and series[name] == whole]
    return [name for name in names if name not in repeated]


def _is_share(series: Series) -> bool:
    return all(0 <= value <= 1 for value in series.values if value is not None)


def _is_positive(series: Series) -> bool:
    """Whether a logarithmic axis can show most of it; zeros, and what rounding put below, leave gaps."""
    values = [value for value in series.values if value is not None]
    return not values or 2 * sum(value > 0 for value in values) > len(values)


def _group(name: str) -> str:
    room, _, tail = name.partition("/")
    return AGREEMENT if tail.startswith(("agreement_", "mismatch_")) else (room if tail else "other")
