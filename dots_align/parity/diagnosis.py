"""Names the mistake behind logits that deviate: the known ones are computed, and the one that gives them is it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from dots_align.parity.compare import TOLERANCE, Comparison, differences, distance, tolerance_of
from dots_align.parity.definition import Rules, observe
from dots_align.parity.observation import EXACT, Asked, Observation

# What configurations lose theirs to, and what other models have.
THETAS = (1e4, 1e5, 5e5, 1e6, 1e7)
# A mistake explains an engine if computing it leaves this share of the distance from the definition: rounding in fp32
# leaves a thousandth, that of quantised weights much more.
EXPLAINED, EXPLAINED_ROUNDED = 0.05, 0.5


@dataclass(frozen=True)
class Mistake:
    """`aspect` is the column of the table that it spoils."""

    name: str
    aspect: str
    rules: dict[str, Any]
    meaning: str


MISTAKES = (
    Mistake(
        "biased gate values",
        "bias",
        {"biased_gates": True},
        "e_score_correction_bias is in the gate values; it may only choose experts",
    ),
    Mistake("lost correction bias", "bias", {"biased_choice": False}, "experts are chosen without their bias"),
    Mistake("double scaling", "routed", {"routed_scalings": 2}, "routed_scaling_factor is applied twice"),
    Mistake("missing scaling", "routed", {"routed_scalings": 0}, "routed_scaling_factor is not applied"),
    Mistake(
        "scaled shared experts",
        "shared",
        {"shared_scalings": 1},
        "routed_scaling_factor is applied to the shared experts, too",
    ),
    Mistake("softmax scores", "routed", {"softmax": True}, "scores are a softmax; they are sigmoids"),
    Mistake("unnormalised gate values", "routed", {"normalised": False}, "norm_topk_prob is not honoured"),
    *(Mistake("wrong rope_theta", "rope", {"rope_theta": theta}, f"rope_theta is {theta:g}") for theta in THETAS),
)


class Diagnosis:
    """Computes each mistake once, however many engines deviate."""

    def __init__(self, model: Any, asked: Asked, reference: Observation) -> None:
        self.model, self.asked, self.reference = model, asked, reference
        theta = float((model.config.rope_parameters or {})["rope_theta"])
        self.mistakes = [m for m in MISTAKES if m.rules.get("rope_theta") != theta]
        self.theta = theta
        self._singles: dict[str, Observation] = {}  # by meaning

    def _observed(self, mistakes: tuple[Mistake, ...]) -> Observation:
        if len(mistakes) == 1 and mistakes[0].meaning in self._singles:
            return self._singles[mistakes[0].meaning]
        rules: dict[str, Any] = {}
        for mistake in mistakes:
            rules |= mistake.rules
        found = Observation(logits=observe(self.model, self.asked.questions, Rules(**rules)).logits)
        if len(mistakes) == 1 and mistakes[0] in self.mistakes:
            self._singles[mistakes[0].meaning] = found
        return found

    def sensitivity(self) -> dict[str, float]:
        """How far each mistake would move the logits of this checkpoint (median): what it does not move, parity cannot
        exclude.
        """
        found: dict[str, float] = {}
        for mistake in self.mistakes:
            moved = distance(self.asked, self.reference, self._observed((mistake,)))
            found[mistake.name] = min(moved, found.get(mistake.name, moved))
        return found

    def explain(self, row: Comparison, found: Observation) -> None:
        """Adds the cause of differing logits to a row."""
        right = distance(self.asked, self.reference, found)
        share = EXPLAINED if row.precision == EXACT else EXPLAINED_ROUNDED
        for candidates in (self._single(), self._pairs(), self._fitted_theta(found)):
            scored = [(distance(self.asked, self._observed(mistakes), found), mistakes) for mistakes in candidates]
            left, mistakes = min(scored, key=lambda entry: entry[0])
            if left < max(share * right, TOLERANCE if row.precision == EXACT else 0.0):
                row.causes += [mistake.name for mistake in mistakes]
                meaning = "; ".join(mistake.meaning for mistake in mistakes)
                row.problems.append(f"{meaning} (computed so, {left:.2g} is left of {right:.2g})")
                return
        row.causes.append("unknown")
        row.problems.append(self._where(found))

    def _single(self) -> list[tuple[Mistake, ...]]:
        return [(mistake,) for mistake in self.mistakes]

    def _pairs(self) -> Iterator[tuple[Mistake, ...]]:
        for one, other in itertools.combinations(self.mistakes, 2):
            if not one.rules.keys() & other.rules.keys():
                yield one, other

    def _fitted_theta(self, found: Observation) -> Iterator[tuple[Mistake, ...]]:
        """The rotary base that comes closest: a grid over its logarithm, then finer ones around the best."""

        def mistake(exponent: float) -> Mistake:
            theta = 10**exponent
            return Mistake("wrong rope_theta", "rope", {"rope_theta": theta}, f"rope_theta is about {theta:.3g}")

        def left(exponent: float) -> float:
            return distance(self.asked, self._observed((mistake(exponent),)), found)

        best, step = min((2 + n / 4 for n in range(29)), key=left), 0.25
        for _ in range(8):
            step /= 2
            best = min((best - step, best, best + step), key=left)
        yield (mistake(best),)

    def _where(self, found: Observation) -> str:
        """What can be said of a mistake nobody made before."""
        by_question = differences(self.asked, self.reference, found)
        if found.logits is None:
            return "no known mistake gives these log-probs"
        first = max(float(d[0]) for d in by_question)
        later = float(torch.cat([d[1:] for d in by_question]).median())
        if first <= TOLERANCE < later:
            return (
                "no known mistake gives these logits; a prompt's first position is right and later ones are not: "
                "look at attention, mask, cache and rotary embedding, not at the experts"
            )
        worst = max(range(len(by_question)), key=lambda n: float(by_question[n].max()))
        return f"no known mistake gives these logits; the largest difference is in {self.asked.questions[worst].name}"


def aspects(mistakes: list[Mistake], row: Comparison, sensitivity: dict[str, float]) -> dict[str, str]:
    """For each aspect `ok`, `wrong`, or `?` where this engine's rounding or this checkpoint's weights hide mistakes."""
    visible = 10 * TOLERANCE if row.precision == EXACT else 2 * tolerance_of(row.precision)
    seen: dict[str, set[str]] = {}
    for mistake in mistakes:
        hidden = row.logits_differ or row.mean_difference is None or sensitivity[mistake.name] < visible
        verdict = "wrong" if mistake.name in row.causes else "?" if hidden else "ok"
        seen.setdefault(mistake.aspect, set()).add(verdict)
    return {aspect: next(v for v in ("wrong", "?", "ok") if v in verdicts) for aspect, verdicts in seen.items()}
