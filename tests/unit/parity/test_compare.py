"""What counts as agreement: rounding and near-ties do, anything else does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dots_align.parity.compare import compare
from dots_align.parity.observation import Asked, Observation, Question

TOKENS, LAYERS, CHOSEN, VOCABULARY, END = 6, 2, 2, 11, 7


@pytest.fixture
def asked() -> Asked:
    return Asked((Question("one", tuple(range(TOKENS)), text="abc"),), END, frozenset({END}))


@pytest.fixture
def reference() -> Observation:
    """Choices with wide gaps, but for one near-tie: token 3, first layer."""
    gaps = torch.full((TOKENS, LAYERS), 0.1)
    gaps[3, 0] = 1e-7
    logits = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    routes = torch.tensor([0, 1], dtype=torch.uint8).expand(TOKENS, LAYERS, CHOSEN).clone()
    return Observation([logits], routes=[routes], gaps=[gaps])


def changed(reference: Observation, token: int, by: float = 0.3) -> Observation:
    """The token goes to other experts in the first layer, and its logits move."""
    assert reference.logits is not None
    assert reference.routes is not None
    logits, routes = reference.logits[0].clone(), reference.routes[0].clone()
    logits[token] += by
    routes[token, 0, 1] = 5
    return Observation([logits], routes=[routes])


def test_a_near_tie_that_fell_the_other_way_is_counted_and_no_error(asked: Asked, reference: Observation) -> None:
    row = compare("engine", asked, reference, changed(reference, 3))
    assert row.problems == []
    assert (row.num_ties, row.num_other, row.num_changed, row.num_choices) == (1, 0, 1, TOKENS * LAYERS)
    assert (row.num_clean, row.num_tokens) == (3, TOKENS)  # the token and all that can see it are left out
    assert row.max_difference == 0
    assert row.mean_difference == pytest.approx(0.3 / TOKENS, rel=1e-4)


def test_another_choice_without_a_tie_is_an_error(asked: Asked, reference: Observation) -> None:
    row = compare("engine", asked, reference, changed(reference, 4, by=0.0))
    assert row.problems == ["1 tokens chose other experts where it is no near-tie"]


def test_an_engine_without_routes_may_differ_from_a_near_tie_on(asked: Asked, reference: Observation) -> None:
    behind = replace(changed(reference, 5), routes=None)
    before = replace(changed(reference, 2), routes=None)
    assert compare("engine", asked, reference, behind).problems == []
    assert len(compare("engine", asked, reference, before).problems) == 1


def test_ties_everywhere_prove_nothing(asked: Asked, reference: Observation) -> None:
    tied = replace(reference, gaps=[torch.full((TOKENS, LAYERS), 1e-7)])
    row = compare("engine", asked, tied, changed(reference, 0))
    assert row.logits_differ


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_an_error(asked: Asked, reference: Observation, broken: float) -> None:
    assert reference.logits is not None
    logits = reference.logits[0].clone()
    logits[2, 2] = broken
    assert compare("engine", asked, reference, Observation([logits])).problems


def test_rounded_weights_are_judged_by_the_median_logprob(asked: Asked, reference: Observation) -> None:
    assert reference.logits is not None
    noise = torch.randn(TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(1))
    for by, problems in ((0.01, 0), (1.0, 1)):
        found = Observation([reference.logits[0] + by * noise], precision="Q8_0")
        assert len(compare("engine", asked, reference, found).problems) == problems


@pytest.mark.parametrize(
    ("found", "cause", "said"),
    [
        ({"rendered": [[9, 0, 1, 2, 3, 4, 5]]}, "other tokenizer", "(a token is added in front)"),
        ({"rendered": [[0, 1, 2, 9, 4, 5]]}, "other tokenizer", "first at position 3"),
        ({"num_rendered": [7]}, "other tokenizer", "as 7 tokens"),
        ({"stop_ids": frozenset({1, 2})}, "wrong stop token", "stops at [1, 2], an answer ends with 7"),
        ({"stopped": False}, "wrong stop token", "goes on after token 7"),
    ],
)
def test_prompts_read_otherwise_and_turns_that_do_not_end_are_named(
    asked: Asked, reference: Observation, found: dict[str, Any], cause: str, said: str
) -> None:
    row = compare("engine", asked, reference, replace(reference, **found))
    assert row.causes == [cause]
    assert said in row.problems[0]
