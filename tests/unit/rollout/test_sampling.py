"""Sampling: the right distribution, the right log-probabilities, and randomness that depends on nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dots_align.rollout.sampling import SamplingTable, sample, sample_keys, uniforms

LOGITS = torch.tensor([2.0, -1.0, 0.5, 1.0, 0.0, -3.0, 1.5, float("-inf")])


def table(
    rows: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0, seed: int = 0
) -> SamplingTable:
    return SamplingTable(
        torch.full((rows,), temperature),
        torch.full((rows,), top_p),
        torch.full((rows,), top_k),
        torch.full((rows,), min_p),
        sample_keys(torch.full((rows,), seed), torch.arange(rows)),
    )


def draw(rows: int = 20_000, **keys) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return sample(LOGITS.expand(rows, -1), table(rows, **keys), torch.zeros(rows, dtype=torch.long))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    tokens, *_ = draw(temperature=temperature)
    wanted = (LOGITS / temperature).softmax(-1)
    found = torch.bincount(tokens, minlength=8) / len(tokens)
    assert float((found - wanted).abs().max()) < 0.012  # three standard deviations and a bit
    assert found[7] == 0


def test_logprobs_are_of_the_sampling_and_of_the_models_own_distribution() -> None:
    tokens, sampled, own = draw(2000, temperature=0.5, top_k=3)
    kept = torch.full((8,), float("-inf"))
    kept[[0, 6, 3]] = LOGITS[[0, 6, 3]] / 0.5
    torch.testing.assert_close(sampled, kept.log_softmax(-1)[tokens])
    torch.testing.assert_close(own, LOGITS.log_softmax(-1)[tokens])


@pytest.mark.parametrize(("top_k", "kept"), [(1, {0}), (2, {0, 6}), (4, {0, 6, 3, 2}), (100, {0, 1, 2, 3, 4, 5, 6})])
def test_top_k_keeps_the_k_likeliest(top_k: int, kept: set[int]) -> None:
    assert set(draw(top_k=top_k)[0].tolist()) == kept


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, {0}), (0.3, {0}), (0.5, {0, 6}), (0.75, {0, 6, 3})])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p: float, kept: set[int]) -> None:
    probabilities = LOGITS.softmax(-1)
    assert float(probabilities[list(kept)].sum()) >= top_p
    tokens, sampled, _ = draw(top_p=top_p)
    assert set(tokens.tolist()) == kept
    torch.testing.assert_close(sampled.exp(), (probabilities / probabilities[list(kept)].sum())[tokens])


@pytest.mark.parametrize(("min_p", "kept"), [(1.0, {0}), (0.6, {0, 6}), (0.3, {0, 6, 3}), (0.2, {0, 6, 3, 2})])
def test_min_p_keeps_what_has_that_share_of_the_likeliest(min_p: float, kept: set[int]) -> None:
    probabilities = LOGITS.softmax(-1)
    assert kept == {i for i, p in enumerate(probabilities.tolist()) if p >= min_p * float(probabilities.max())}
    tokens, sampled, _ = draw(min_p=min_p)
    assert set(tokens.tolist()) == kept
    torch.testing.assert_close(sampled.exp(), (probabilities / probabilities[list(kept)].sum())[tokens])


def test_a_row_of_nan_is_told_by_its_logprobs() -> None:
    logits = torch.stack([LOGITS, torch.full_like(LOGITS, float("nan")), LOGITS])
    for temperature in (0.0, 1.0, 0.5):
        _, sampled, own = sample(logits, table(3, temperature=temperature), torch.zeros(3, dtype=torch.long))
        assert torch.isfinite(own).tolist() == torch.isfinite(sampled).tolist() == [True, False, True]


def test_top_p_stops_where_the_mass_is_reached_exactly() -> None:
    tokens, *_ = sample(torch.zeros(5000, 4), table(5000, top_p=0.5), torch.zeros(5000, dtype=torch.long))
    assert set(tokens.tolist()) == {0, 1}


def test_top_p_applies_after_temperature_and_top_k() -> None:
    # Among the three likeliest at temperature 0.5 the first has 0.67, the first two 0.91 of the mass.
    assert set(draw(temperature=0.5, top_k=3, top_p=0.9)[0].tolist()) == {0, 6}
    assert set(draw(temperature=0.5, top_k=3, top_p=0.95)[0].tolist()) == {0, 6, 3}


def test_equal_logits_are_cut_to_exactly_k() -> None:
    logits = torch.zeros(5000, 6)
    tokens, *_ = sample(logits, table(5000, top_k=2), torch.zeros(5000, dtype=torch.long))
    assert set(tokens.tolist()) == {0, 1}


def test_greedy_takes_the_likeliest_with_certainty() -> None:
    tokens, sampled, own = draw(50, temperature=0.0)
    assert set(tokens.tolist()) == {0}
    assert sampled.tolist() == [0.0] * 50
    torch.testing.assert_close(own, LOGITS.log_softmax(-1)[0].expand(50))


def test_rows_have_their_own_parameters() -> None:
    mixed = table(3)
    mixed.temperature[0], mixed.top_k[1] = 0.0, 1
    for position in range(50):
        tokens, sampled, own = sample(LOGITS.expand(3, -1), mixed, torch.full((3,), position))
        assert tokens[:2].tolist() == [0, 0]
        assert sampled[:2].tolist() == [0.0, 0.0]
        assert sampled[2] == own[2]


def test_a_row_draws_the_same_whatever_else_is_in_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 64, generator=generator)
    full, positions = table(40, temperature=0.8, top_p=0.95), torch.arange(40)
    wanted = sample(logits, full, positions)
    rows = torch.randperm(40, generator=generator)[:11]
    found = sample(logits[rows], full[rows], positions[rows])
    assert torch.equal(found[0], wanted[0][rows])
    # Filters of other rows switch the filtering code on, which changes nothing for rows without one.
    plain = table(40)
    wanted = sample(logits, plain, positions)
    plain.top_k[5] = 1
    found = sample(logits, plain, positions)
    others = torch.arange(40) != 5
    assert torch.equal(found[0][others], wanted[0][others])


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=50), st.integers(0, 10**6))
def test_uniforms_are_at_least_zero_and_below_one(seeds: list[int], position: int) -> None:
    keys = sample_keys(torch.tensor(seeds), torch.arange(len(seeds)))
    found = uniforms(keys, torch.full((len(seeds),), position))
    assert found.dtype == torch.float64
    assert ((found >= 0) & (found < 1)).all()


def test_uniforms_are_spread_evenly_over_seeds_samples_and_positions() -> None:
    count = 20_000
    many, zero = torch.arange(count), torch.zeros(count, dtype=torch.long)
    for keys, positions in (
        (sample_keys(many, zero), zero),
        (sample_keys(zero, many), zero),
        (sample_keys(zero, zero), many),
    ):
        found = uniforms(keys, positions)
        assert len(found.unique()) == count
        ordered = found.sort().values
        steps = torch.arange(1, count + 1, dtype=torch.float64) / count
        assert float((ordered - steps).abs().max()) < 1.7 / count**0.5  # Kolmogorov-Smirnov, far beyond 1 %
        assert abs(float(torch.corrcoef(torch.stack([found[:-1], found[1:]]))[0, 1])) < 0.03


def test_splitmix64_reference_values() -> None:
    """The first outputs of Vigna's splitmix64.c for the seed 1234567, whose state advances by the golden ratio."""
    from dots_align.rollout.sampling import _GOLDEN, _splitmix64

    state = torch.tensor([1234567]) + torch.arange(5) * _GOLDEN
    found = [value % 2**64 for value in _splitmix64(state).tolist()]
    assert found == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
