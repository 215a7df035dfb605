"""A reward model trained on preferences (`dots-align reward_model`), served in the training process."""

from __future__ import annotations

from dots_align.types import Response, RewardModel, uses_reward_model


@uses_reward_model
def preference_score(responses: list[Response], model: RewardModel, missing_eos_penalty: float = 1.0) -> list[float]:
    """How good the reward model finds each answer; unbounded, and only differences between answers to one prompt mean
    something.

    In a recipe: `arguments: {checkpoint: runs/tiny/reward_model/best}` and `run_in: trainer`.

    Args:
        missing_eos_penalty: taken off an answer that ran into its token limit. The model has seen whole answers only,
        so that its score of a half one means little.
    """
    scores = model(responses)
    return [
        score - missing_eos_penalty * (response.finish_reason != "stop")
        for score, response in zip(scores, responses, strict=True)
    ]
