"""A reward model's score as a reward."""

import pytest

from dots_align.types import Message, Prompt, Response
from reward_models.preference import preference_score

PROMPT = Prompt([Message("user", "q")])


def test_scores_are_the_models_less_what_an_unfinished_answer_loses() -> None:
    responses = [Response(PROMPT, "whole"), Response(PROMPT, "half", finish_reason="length")]

    def model(given):
        assert list(given) == responses
        return [1.5, 1.5]

    assert preference_score(responses, model) == [1.5, 0.5]
    assert preference_score(responses, model, missing_eos_penalty=3.0) == pytest.approx([1.5, -1.5])
