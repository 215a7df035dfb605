"""A trained reward model at work: scores of answers, and how often it prefers what people preferred."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dots_align.checkpoint import check_whole, load_state, load_trainable, stored_dtype
from dots_align.config import ModelSection, PairEvaluationSection, ParallelSection
from dots_align.data.chat import encode_conversation
from dots_align.data.sources import data_hash, load_preference_pairs
from dots_align.evals.suite import held_out
from dots_align.model.expert_parallel import is_sharded, reshard
from dots_align.model.heads import sequence_scores
from dots_align.model.lora import adapter_base, is_reward_adapter, stored_lora
from dots_align.model.packed import micro_batches, pack
from dots_align.model.sharded_io import SCORE_HEAD, HubFiles
from dots_align.runtime import gather_objects, logger, rank, world_size
from dots_align.types import Message, Response

MAX_BATCH_TOKENS = 16384


class PreferenceModel:
    """Scores answers, batches of about equally long ones at a time. Scores are fp32, unbounded, and only their
    differences mean something.

    Args:
        model: a reward model; it is put into evaluation mode. Where it is sharded every process has to score at the
        same time, each its own answers or none.
        tokenizer: the reward model's own.
        max_batch_tokens: the most tokens of one forward; a longer conversation stands alone.
    """

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, max_batch_tokens: int = MAX_BATCH_TOKENS
    ) -> None:
        self.model, self.tokenizer, self.max_batch_tokens = model.eval(), tokenizer, max_batch_tokens
        self.context = model.config.max_position_embeddings

    def __call__(self, responses: Sequence[Response]) -> list[float]:
        """The score of each response. One that ran into its token limit is read without the end of turn it never gave.

        Raises:
            ValueError: a conversation is longer than the model's context.
        """
        return self.score([self._encode(response) for response in responses])

    def _encode(self, response: Response) -> list[int]:
        messages = [*response.prompt.messages, Message("assistant", response.text)]
        ids = encode_conversation(self.tokenizer, messages).input_ids
        if response.finish_reason != "stop":
            ids = ids[:-1]
        if len(ids) > self.context:
            raise ValueError(
                f"{response.prompt.source}: prompt and response have {len(ids)} tokens, the reward model's context "
                f"{self.context}"
            )
        return ids

    @torch.no_grad()
    def score(self, conversations: Sequence[list[int]]) -> list[float]:
        """The score of each tokenized conversation, in order."""
        sharded = is_sharded(self.model)
        device = next(self.model.parameters()).device
        batches = micro_batches([len(ids) for ids in conversations], self.max_batch_tokens)
        found = [0.0] * len(conversations)
        most = max(gather_objects(len(batches))) if sharded else len(batches)
        for number in range(most):
            members = batches[number] if number < len(batches) else []  # a sharded forward is everybody's
            scores = sequence_scores(self.model, pack([conversations[i] for i in members] or [[0]], device))
            for index, score in zip(members, scores.tolist(), strict=False):
                found[index] = score
        if sharded:
            reshard(self.model)
        return found


def load_preference_model(
    path: str | Path, parallel: ParallelSection | None = None, bf16: bool = False
) -> PreferenceModel:
    """A checkpoint of the `reward_model` stage, full or adapter, on this process's device, in the dtype it is stored
    in.

    Args:
        parallel: spread it over the processes; None: whole on each.

    Raises:
        ValueError: no such checkpoint, not whole, or not a reward model's.
    """
    directory = Path(path)
    check_whole(directory)
    base = adapter_base(directory)
    if not (is_reward_adapter(directory) if base else SCORE_HEAD in HubFiles(directory).file_of):
        raise ValueError(
            f"{directory}: this is no reward model, it has no {SCORE_HEAD}; `dots-align reward_model` trains one"
        )
    section = ModelSection(path=str(base or directory), dtype=stored_dtype(directory))
    lora = stored_lora(directory) if base else None
    model, tokenizer = load_trainable(section, parallel, bf16, lora, scalar_head=True)
    if base:
        load_state(model, directory)
    logger.info("reward model: %s", directory)
    return PreferenceModel(model, tokenizer)


def evaluate_pairs(
    checkpoint: Path, evaluation: PairEvaluationSection, seed: int, parallel: ParallelSection, bf16: bool
) -> dict[str, Any]:
    """How a reward model's checkpoint judges held-out pairs. Every process scores its share and gets the whole result.

    Returns:
        the content of `eval.json`: `metrics` (`accuracy`: share of pairs whose chosen answer scores higher, a tie
        counts half; `margin`: mean difference of the scores), and what was asked.
    """
    pairs = held_out(load_preference_pairs, evaluation.data, evaluation.num_pairs, seed)
    model = load_preference_model(checkpoint, parallel, bf16)
    stride = world_size() if is_sharded(model.model) else 1
    mine = pairs[rank() if stride > 1 else 0 :: stride]
    answers = [[*pair.prompt, Message("assistant", text)] for pair in mine for text in (pair.chosen, pair.rejected)]
    scores = model.score([encode_conversation(model.tokenizer, messages).input_ids for messages in answers])
    own = [chosen - rejected for chosen, rejected in zip(scores[::2], scores[1::2], strict=True)]
    margins = [margin for part in (gather_objects(own) if stride > 1 else [own]) for margin in part]
    return {
        "metrics": {
            "accuracy": sum((margin > 0) + 0.5 * (margin == 0) for margin in margins) / len(margins),
            "margin": sum(margins) / len(margins),
        },
        "num_pairs": len(margins),
        "data": evaluation.data.path,
        "data_hash": data_hash(pairs),
        "samples": [],
    }
