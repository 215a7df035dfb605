"""Means over prompts with their uncertainty, and pass@k."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959963984540054  # of a two-sided 95 % interval


def mean_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over prompts and its 95 % confidence interval: Wilson's of a share of zeros and ones, which is right at
    its ends too, else a normal one. Samples of one prompt are no independent draws: give their mean.
    """
    count = len(values)
    mean = math.fsum(values) / count
    if all(value in (0, 1) for value in values):
        middle, spread = mean + Z**2 / (2 * count), Z * math.sqrt(mean * (1 - mean) / count + Z**2 / (4 * count**2))
        scale = 1 + Z**2 / count
        return mean, max((middle - spread) / scale, 0.0), min((middle + spread) / scale, 1.0)
    if count == 1:
        return mean, mean, mean
    error = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1) / count)
    return mean, mean - Z * error, mean + Z * error


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The probability that of k samples, drawn from these without replacement, at least one is right: the unbiased
    estimate of Chen et al. (arXiv:2107.03374).
    """
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


def powers_of_two(most: int) -> list[int]:
    """1, 2, 4, … up to `most`, and `most`."""
    found = [1 << n for n in range(most.bit_length()) if 1 << n <= most]
    return found if found[-1] == most else [*found, most]
