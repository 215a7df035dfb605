"""How well the trainer's log-probabilities agree with those the rollout engine sampled under.

Same weights, same module: in fp32 the difference is rounding, about 1e-6. A near-tie between two experts may be
rounded one way in one forward and the other way in the other; the tokens behind such a flip differ by more, and are
counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Agreement:
    """Collects |trainer - rollout| over the response tokens of a step."""

    clean: list[torch.Tensor] = field(default_factory=list)
    flipped: list[torch.Tensor] = field(default_factory=list)
    num_flips: int = 0
    flip_gap: float = 0.0

    def add(self, differences: torch.Tensor, affected: torch.Tensor, num_flips: int, flip_gap: float) -> None:
        """Args: absolute differences [n] of one sequence's response tokens, which of them [n] lie behind a flip, and
        the flips.
        """
        self.clean.append(differences[~affected].cpu())
        self.flipped.append(differences[affected].cpu())
        self.num_flips += num_flips
        self.flip_gap = max(self.flip_gap, flip_gap)

    @staticmethod
    def merged(parts: list[Agreement]) -> Agreement:
        """What several processes collected, as one."""
        return Agreement(
            [t for part in parts for t in part.clean],
            [t for part in parts for t in part.flipped],
            sum(part.num_flips for part in parts),
            max(part.flip_gap for part in parts),
        )

    def metrics(self) -> dict[str, float]:
        """`max mean median` over tokens with equal routes; `flipped_tokens flipped_max` of the others; `flips
        flip_gap`.
        """
        clean, flipped = (torch.cat(parts) if parts else torch.empty(0) for parts in (self.clean, self.flipped))
        found = {
            "flips": float(self.num_flips),
            "flip_gap": self.flip_gap,
            "flipped_tokens": float(len(flipped)),
            "flipped_max": float(flipped.max()) if len(flipped) else 0.0,
        }
        if len(clean):
            found |= {"max": float(clean.max()), "mean": float(clean.mean()), "median": float(clean.median())}
        return found
