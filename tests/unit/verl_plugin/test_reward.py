"""The reward manager, in front of the recipe's rewards; verl's loop is made here."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dots_align.config import GrpoRecipe
from dots_align.types import Message, Prompt, Response

reward: Any = pytest.importorskip("dots_align.verl_plugin.reward")


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """One whose rows are responses, which all are worth 1."""
    keys = {"output_dir": str(tmp_path), "data": {"path": "synthetic:prompts"}, "rewards": [{"function": "a:b"}]}
    found = reward.RewardManager.__new__(reward.RewardManager)
    found.recipe = GrpoRecipe.model_validate({"stage": "grpo", **keys})
    found.rewards = SimpleNamespace(score=lambda responses: [(1.0, {"b": 1.0})] * len(responses))
    found.waiting, found.task, found.scored = [], None, tmp_path / "scored.jsonl"
    monkeypatch.setattr(found, "_response", lambda row: row.response)
    return found


def test_one_who_gives_up_costs_the_others_nothing(manager: Any) -> None:
    response = Response(Prompt([Message("user", "q")], "a", "data.jsonl:4"), "yes", [5], "stop")
    row = SimpleNamespace(response=response, non_tensor_batch={"global_steps": 1})

    async def one_of_them() -> list[Any]:
        tasks = [asyncio.create_task(manager.run_single([row])) for _ in range(3)]
        await asyncio.sleep(reward.QUIET_SECONDS / 5)
        tasks[0].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(asyncio.wait_for(one_of_them(), 60))
    assert isinstance(first, asyncio.CancelledError)
    assert [found["reward_score"] for found in others] == [1.0, 1.0]
    assert len(manager.scored.read_text().splitlines()) == 3
