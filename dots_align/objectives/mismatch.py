"""How far the trainer's policy is from the one that was sampled from: the numbers, and the gate on them.

Both ought to be the same policy. Where another engine, another precision or a stale copy of the weights did the
sampling, they are not, and importance ratios that are meant to be 1 teach noise: the usual way in which RL on
mixtures of experts collapses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from dots_align.config import MismatchSection

RATIO_EDGES = (0.5, 0.8, 0.95, 0.99, 1.01, 1.05, 1.25, 2.0)
"""Between the bins of the histogram of probability ratios, trainer's over rollout's."""


class MismatchError(ValueError):
    """The gate has closed: the run stops before an update on responses that another policy sampled.

    `metrics` are those of `Mismatch`, which say how far apart the two are.
    """

    def __init__(self, message: str, metrics: dict[str, float]) -> None:
        super().__init__(message)
        self.metrics = metrics


@dataclass
class Mismatch:
    """Collects log-ratios (trainer minus rollout) of response tokens, and how often routes differ."""

    log_ratios: list[torch.Tensor] = field(default_factory=list)
    num_shifted: int = 0
    num_choices: int = 0

    def add(self, log_ratios: torch.Tensor, shifted: torch.Tensor | None) -> None:
        """Of one sequence: log-ratios [n] of its response tokens, and where the router's choice [tokens, layers] is
        not the rollout's; None if the rollout does not tell.
        """
        self.log_ratios.append(log_ratios.detach().float().cpu())
        if shifted is not None:
            self.num_shifted += int(shifted.sum())
            self.num_choices += shifted.numel()

    @staticmethod
    def merged(parts: list[Mismatch]) -> Mismatch:
        """What several processes collected, as one."""
        return Mismatch(
            [ratios for part in parts for ratios in part.log_ratios],
            sum(part.num_shifted for part in parts),
            sum(part.num_choices for part in parts),
        )

    def metrics(self) -> dict[str, float]:
        """`mean`, `max` of the absolute difference in nats; `k1`, `kl` (k3): estimates of KL(rollout, trainer) from
        tokens of the rollout; `ratio_*`: the share of tokens whose ratio lies below or between RATIO_EDGES;
        `router_shift`: the share of tokens and layers whose set of experts differs. Empty without tokens.
        """
        if not self.log_ratios:
            return {}
        ratios = torch.cat(self.log_ratios).double()
        counts = torch.bucketize(ratios.exp(), torch.tensor(RATIO_EDGES, dtype=torch.float64), right=True)
        shares = torch.bincount(counts, minlength=len(RATIO_EDGES) + 1) / len(ratios)
        edges = [0.0, *RATIO_EDGES]
        names = [f"ratio_{low:g}_{high:g}" for low, high in zip(edges, RATIO_EDGES, strict=False)]
        names.append(f"ratio_above_{RATIO_EDGES[-1]:g}")
        shift = {"router_shift": self.num_shifted / self.num_choices} if self.num_choices else {}
        return {
            "mean": float(ratios.abs().mean()),
            "max": float(ratios.abs().max()),
            "k1": float(-ratios.mean()),
            "kl": float((ratios.exp() - ratios - 1).mean()),
            **dict(zip(names, shares.tolist(), strict=True)),
            **shift,
        }

    def check(self, gate: MismatchSection, step: int) -> None:
        """Raises MismatchError, with the evidence, if the recipe's measure lies above its threshold or is no number."""
        found = self.metrics()
        if gate.stop_above is None or not found or found[gate.measure] <= gate.stop_above:
            return
        evidence = ", ".join(f"{name} {value:.3g}" for name, value in found.items() if value)
        tokens = sum(map(len, self.log_ratios))
        raise MismatchError(
            f"step {step}: the trainer's log-probs do not agree with those that were sampled under: mismatch.measure="
            f"{gate.measure} is {found[gate.measure]:.3g}, above mismatch.stop_above={gate.stop_above:g} "
            f"({tokens} tokens: {evidence}). No update was made. Look for stale or wrong weights in the rollout, "
            "another precision, or lost router biases; router.replay=R3 and rollout_correction make small differences "
            "harmless",
            found,
        )
