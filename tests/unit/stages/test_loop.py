"""The order of prompts and the minibatches of the RL loop."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dots_align.stages.loop import PromptSampler, split_groups


@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 3))
def test_every_epoch_sees_each_prompt_once(num_prompts: int, per_step: int, seed: int) -> None:
    sampler = PromptSampler(num_prompts, per_step, seed)
    drawn = [pair for step in range(2 * num_prompts) for pair in sampler.draw(step)]
    assert [position for position, _ in drawn] == list(range(len(drawn)))
    for start in range(0, len(drawn) - num_prompts + 1, num_prompts):
        assert sorted(index for _, index in drawn[start : start + num_prompts]) == list(range(num_prompts))


def test_the_order_depends_on_seed_and_step_alone() -> None:
    sampler = PromptSampler(50, 7, 3)
    wanted = [sampler.draw(step) for step in range(20)]
    assert [PromptSampler(50, 7, 3).draw(step) for step in reversed(range(20))] == wanted[::-1]
    assert PromptSampler(50, 7, 4).draw(0) != wanted[0]
    epochs = [[index for step in wanted for _, index in step][start : start + 50] for start in (0, 50)]
    assert epochs[0] != epochs[1]


@given(st.integers(1, 20), st.integers(1, 5), st.integers(1, 8))
def test_minibatches_hold_whole_groups_in_even_numbers(num_groups: int, group_size: int, count: int) -> None:
    groups = [g for g in range(num_groups) for _ in range(group_size)]
    batches = split_groups(groups, count)
    assert [i for batch in batches for i in batch] == list(range(len(groups)))
    assert len(batches) == min(count, num_groups)
    sizes = [len({groups[i] for i in batch}) for batch in batches]
    assert sum(sizes) == num_groups  # no group is torn apart
    assert max(sizes) - min(sizes) <= 1
