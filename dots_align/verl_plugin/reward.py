"""The recipe's rewards as verl's reward manager: the same functions, processes, time limits, weights and gates."""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

from dots_align.evals.preference import load_preference_model
from dots_align.objectives.advantages import overlong_penalty
from dots_align.scoring import RewardSum
from dots_align.types import Message, Prompt, Response
from dots_align.verl_plugin.recipe import recipe_of

QUIET_SECONDS = 0.05
FINISH_REASONS = {"completed": "stop", "length": "length"}


class RewardManager(RewardManagerBase):
    """Scores responses that come in together in one go, and keeps a line about each for the run's logs.

    Args:
        config: verl's; the recipe is in the run's run.json, which it names as its data.
    """

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **_: Any) -> None:
        super().__init__(config, tokenizer, compute_score)
        self.tokenizer: Any = tokenizer
        record = Path(config.data.train_files)
        self.recipe = recipe_of(record)
        self.rewards = RewardSum(self.recipe.rewards, self.recipe.scoring.num_workers, load_preference_model)
        self.waiting: list[tuple[Response, int, asyncio.Future[dict[str, Any]]]] = []
        self.task: asyncio.Task[None] | None = None
        self.scored = record.parent / "verl" / "scored" / f"{os.getpid()}.jsonl"
        self.scored.parent.mkdir(parents=True, exist_ok=True)

    async def run_single(self, data: Any) -> dict[str, Any]:
        """The reward of the last row of `data`."""
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        item = data[-1]
        response = self._response(item)
        self.waiting.append((response, int(item.non_tensor_batch["global_steps"]), future))
        if self.task is None or self.task.done():
            self.task = asyncio.create_task(self._score())
        return await future

    def _response(self, item: Any) -> Response:
        row = item.non_tensor_batch
        length = int(row["response_len"])
        ids = item.batch["responses"][:length].tolist()
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        messages = [Message(m["role"], m["content"]) for m in row["raw_prompt"]]
        prompt = Prompt(messages, row["reward_model"]["ground_truth"], row["extra_info"]["source"])
        finish_reason = FINISH_REASONS.get(row["tool_extra_fields"].get("finish_reason"), "length")
        return Response(prompt, text, ids, finish_reason)

    async def _score(self) -> None:
        while self.waiting:
            seen = -1
            while seen != len(self.waiting):
                seen = len(self.waiting)
                await asyncio.sleep(QUIET_SECONDS)
            batch, self.waiting = self.waiting, []
            try:
                scores = await asyncio.to_thread(self.rewards.score, [response for response, _, _ in batch])
            except Exception as error:  # noqa: BLE001 - told to everyone who waits
                for _, _, future in batch:
                    if not future.done():  # given up by who asked
                        future.set_exception(error)
                continue
            lines = []
            for (response, step, future), (reward, values) in zip(batch, scores, strict=True):
                if not future.done():
                    future.set_result(self._result(response, reward))
                lines.append(json.dumps(_shown(response, step, reward, values), ensure_ascii=False))
            with self.scored.open("a", encoding="utf-8") as out:
                out.write("".join(f"{line}\n" for line in lines))

    def _result(self, response: Response, reward: float) -> dict[str, Any]:
        """What teaches: the sum, less what an overlong response loses."""
        lost = overlong_penalty(len(response.response_ids), self.recipe.rollout.max_tokens, self.recipe.algorithm)
        return {"reward_score": reward + lost, "reward_extra_info": {"reward": reward}}


def _shown(response: Response, step: int, reward: float, values: dict[str, float]) -> dict[str, Any]:
    return {
        "step": step,
        "prompt": response.prompt.messages[-1].content,
        "response": response.text,
        "answer": response.prompt.answer,
        "reward": reward,
        "rewards": values,
        "finish_reason": response.finish_reason,
        "num_tokens": len(response.response_ids),
    }
