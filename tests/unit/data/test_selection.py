"""Right answers, each once, balanced by difficulty."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dots_align.config import SelectionSection
from dots_align.data.selection import Answer, bin_limits, distinct, normalised, select

PROMPTS = ["What is 1+1?", "Hard?", "what is  1 + 1 ？", "Easy?"]


def answers(prompt: int, *texts: str) -> list[Answer]:
    """Wrong are those that begin with `no`."""
    return [Answer(prompt, i, text, not text.startswith("no")) for i, text in enumerate(texts)]


def kept(found: list[Answer]) -> list[tuple[int, int]]:
    return [(a.prompt, a.sample) for a in found]


def test_an_answer_is_kept_once_to_the_letter_and_in_meaning() -> None:
    given_answers = answers(0, "2", "2", "２", " 2\n", "It is 2", "it is  2", "no", "no") + answers(2, "2", "It is two")
    left, exact, same = distinct(PROMPTS, given_answers)
    assert kept(left) == [(0, 0), (0, 4), (2, 1)]
    assert (exact, same) == (1, 4)


def test_the_same_words_to_another_prompt_are_no_duplicate() -> None:
    left, exact, same = distinct(PROMPTS, answers(1, "2") + answers(3, "2"))
    assert (len(left), exact, same) == (2, 0, 0)


def test_normalised_keeps_what_carries_meaning() -> None:
    assert normalised("Ｘ = 3，\n则…") == normalised("x=3,则...")
    assert len({normalised(t) for t in ("12+3", "12-3", "1 2.3", "1,23", "-12", "12!")}) == 6
    assert len({normalised(t) for t in ("5²", "52", "5 2", "5^2")}) == 3
    assert normalised("the  answer\nis 5 .") == normalised("The answer is 5.") != normalised("theanswer is 5.")


def test_prompts_are_sorted_by_pass_rate_and_capped_by_their_bin() -> None:
    given_answers = [
        *answers(0, "a", "b", "c", "d"),  # all right
        *answers(1, "no", "no", "no", "e"),  # a quarter
        *answers(2, "f", "no", "g", "no"),  # half
        *answers(3, "no", "no", "no", "no"),
    ]
    section = SelectionSection(pass_rate_bins=(0.25, 0.5, 1.0), max_per_prompt=(4, 1, 2))
    found = select(["p", "q", "r", "s"], given_answers, section, 0)
    assert kept(found.answers) == [(0, 0), (0, 1), (1, 3), (2, 0)]
    assert found.pass_rates == {0: 1.0, 1: 0.25, 2: 0.5, 3: 0.0}
    assert [(b.high, b.prompts, b.right, b.kept) for b in found.bins] == [
        (0.25, 1, 1, 1),
        (0.5, 1, 2, 1),
        (1.0, 1, 4, 2),
    ]
    assert found.never_right == 1


def test_a_bin_gives_no_more_than_its_share_and_the_seed_decides_what() -> None:
    easy = [a for p in range(40) for a in answers(p, f"{p}a", f"{p}b")]
    hard = [a for p in range(40, 50) for a in answers(p, f"{p}a", "no")]
    prompts = [str(p) for p in range(50)]
    section = SelectionSection(pass_rate_bins=(0.5, 1.0), max_bin_share=0.6)
    found = select(prompts, easy + hard, section, 0)
    assert [b.kept for b in found.bins] == [10, 15]
    assert found == select(prompts, easy + hard, section, 0)
    assert kept(found.answers) != kept(select(prompts, easy + hard, section, 1).answers)


def test_nothing_right_is_nothing_selected() -> None:
    found = select(PROMPTS, answers(0, "no", "no"), SelectionSection(), 0)
    assert (found.answers, found.never_right) == ([], 1)


@given(st.lists(st.integers(0, 60), min_size=1, max_size=6), st.floats(0.05, 1))
def test_limits_are_the_largest_that_respect_the_share(sizes: list[int], share: float) -> None:
    limits = bin_limits(sizes, share)
    filled = [n for n in sizes if n]
    assert all(0 <= limit <= size for limit, size in zip(limits, sizes, strict=True))
    if not filled:
        return
    bound = max(share, 1 / len(filled)) * sum(limits)
    assert max(limits) <= max(bound + 1e-6, min(filled))
    cap = max(limits)
    if any(size > limit for size, limit in zip(sizes, limits, strict=True)):
        larger = [min(size, cap + 1) for size in sizes]
        assert max(larger) > max(share, 1 / len(filled)) * sum(larger) - 1e-6


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pass_rate_bins": (0.5, 0.25, 1.0)}, "have to rise from above 0 to 1"),
        ({"pass_rate_bins": (0.5,)}, "have to rise from above 0 to 1"),
        ({"max_per_prompt": (1, 2)}, "2 entries for 4 pass_rate_bins"),
        ({"max_per_prompt": 0}, "keeps nothing"),
    ],
)
def test_sections_that_make_no_sense_are_refused(keys, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SelectionSection(**keys)
