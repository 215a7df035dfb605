"""How verl's agent loop asks our rollout for one sample: the prompt's tokens and random numbers come with its row."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopMetrics, AgentLoopOutput
from verl.utils.profiler import simple_timer


class SampleLoop(AgentLoopBase):
    """One prompt, one answer. What was sampled is never encoded again."""

    async def run(self, sampling_params: dict[str, Any], **kwargs: Any) -> AgentLoopOutput:
        row = kwargs["extra_info"]
        prompt_ids, num_samples = list(row["prompt_ids"]), int(self.rollout_config.n)
        sampling = {
            **sampling_params,
            "seed": int(row["seed"]),
            "sample": int(kwargs["session_id"]),
            "num_samples": num_samples,
            "prompt_length": len(prompt_ids),
            "stop_token_ids": list(row["stop_token_ids"]),
        }
        timing: dict[str, Any] = {}
        with simple_timer("generate_sequences", timing):
            found = await self.server_manager.generate(
                request_id=uuid4().hex, prompt_ids=prompt_ids, sampling_params=sampling
            )
        extra = {**found.extra_fields, "finish_reason": found.stop_reason, "turn_scores": [], "tool_rewards": []}
        return AgentLoopOutput(
            prompt_ids=prompt_ids,
            response_ids=found.token_ids,
            response_mask=[1] * len(found.token_ids),
            response_logprobs=found.log_probs,
            num_turns=2,
            metrics=AgentLoopMetrics(**timing),
            extra_fields=extra,
        )
