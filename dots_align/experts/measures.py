"""What counts of routed slots say: balance within a domain, and how differently domains are routed. Pure numpy.

Shares are [..., layers, experts] and sum to 1 over experts; domains weigh the same, however many tokens each has.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

MIN_LOAD = 0.5  # of an expert's fair share, in the domain it is said to be a specialist of


@dataclass(frozen=True)
class Specialist:
    """An expert that one domain uses far more than the others.

    `load` and `elsewhere` are multiples of the fair share (1 / experts), in `domain` and on average in the others;
    `weight` is what it adds, in nats, to the divergence between its domain and the mean.
    """

    layer: int
    expert: int
    domain: int
    load: float
    elsewhere: float
    weight: float


def shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(-1, keepdims=True), 1)


def max_violation(share: np.ndarray) -> np.ndarray:
    """[..., layers]: the busiest expert's load over the mean load, minus 1; 0 is perfect balance."""
    return share.max(-1) * share.shape[-1] - 1


def entropy(share: np.ndarray) -> np.ndarray:
    """[..., layers] in units of log(experts): 1 is even, 0 is one expert for everything."""
    return _entropy(share) / np.log(share.shape[-1])


def _entropy(share: np.ndarray) -> np.ndarray:
    return -(share * np.log(np.where(share > 0, share, 1.0))).sum(-1)


def divergence(share: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence between domains, [domains, layers, experts] -> [layers], in units of its largest value:
    0 where all domains use the same experts, 1 where no two share one.
    """
    if len(share) < 2:
        return np.zeros(share.shape[1])
    return (_entropy(share.mean(0)) - _entropy(share).mean(0)) / np.log(len(share))


def similarity(share: np.ndarray) -> np.ndarray:
    """[domains, domains]: 1 minus the divergence of each pair, mean over layers."""
    count = len(share)
    pairs = [[1.0 if a == b else 1 - divergence(share[[a, b]]).mean() for b in range(count)] for a in range(count)]
    return np.array(pairs)


def specialists(share: np.ndarray, limit: int = 20) -> list[Specialist]:
    """The experts that tell domains apart best, by `weight`; each once. `layer` counts rows, not the model's layers."""
    domains, _, experts = share.shape
    if domains < 2:
        return []
    mean = share.mean(0)
    others = (share.sum(0)[None] - share) / (domains - 1)
    safe = np.where((share > 0) & (mean > 0), share / np.where(mean > 0, mean, 1.0), 1.0)
    weight = np.where(share * experts >= MIN_LOAD, share * np.log(safe), 0.0)
    best = weight.argmax(0)  # [layers, experts]
    order = np.argsort(-weight.max(0), axis=None, kind="stable")[:limit]
    found = []
    for place in order:
        layer, expert = divmod(int(place), experts)
        domain = int(best[layer, expert])
        if weight[domain, layer, expert] > 0:
            load, elsewhere = share[domain, layer, expert] * experts, others[domain, layer, expert] * experts
            found.append(
                Specialist(layer, expert, domain, float(load), float(elsewhere), float(weight[domain, layer, expert]))
            )
    return found
