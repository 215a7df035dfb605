"""What an engine is asked, and what it says: the protocol between parity and whatever runs a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dots_align.types import Message

EXACT = "F32"


@dataclass(frozen=True)
class Question:
    """One prompt. `token_ids` is how the checkpoint's own tokenizer reads it: `messages` rendered by the chat template,
    or `text` as it stands; with neither, the ids themselves are the prompt.
    """

    name: str
    token_ids: tuple[int, ...]
    messages: tuple[Message, ...] = ()
    text: str | None = None


@dataclass(frozen=True)
class Asked:
    """`questions`, the token `end_of_turn` that the chat template puts behind an answer, and the `stops` that the
    checkpoint's tokenizer knows.
    """

    questions: tuple[Question, ...]
    end_of_turn: int
    stops: frozenset[int]


@dataclass(frozen=True)
class Observation:
    """What an engine computed. A list has an entry for each question, of T tokens; None stands for what it cannot say.

    `logits` [T, V] fp32; `logprobs` [T - 1] of the given tokens but the first (what a server tells in place of
    logits); `routes` [T, MoE layers, k] uint8, the chosen experts; `gaps` [T, MoE layers] fp32, the distance in score
    between the last chosen expert and the next; `rendered`, its own reading of the question, or only the length of
    that, `num_rendered`; `stop_ids`, where it ends a turn; `stopped`, whether it did when the end of the turn was the
    likeliest token by far. `precision` is EXACT, or the format whose rounding explains differences. `late`: the
    log-probs are those of each token at its own position, not at the one before it.
    """

    logits: list[torch.Tensor] | None = None
    logprobs: list[torch.Tensor] | None = None
    routes: list[torch.Tensor] | None = None
    gaps: list[torch.Tensor] | None = None
    rendered: list[list[int] | None] = field(default_factory=list)
    num_rendered: list[int | None] = field(default_factory=list)
    stop_ids: frozenset[int] | None = None
    stopped: bool | None = None
    precision: str = EXACT
    late: bool = False


class Engine(Protocol):
    """Anything that runs the checkpoint."""

    name: str

    def observe(self, asked: Asked) -> Observation:
        """Answers all questions.

        Raises:
            ValueError: it cannot be run at all.
        """
        ...


def logprobs_of(logits: torch.Tensor, token_ids: Sequence[int], late: bool = False) -> torch.Tensor:
    """[T, V] -> [T - 1], of every token but the first; `late` as in `Observation`."""
    given = torch.tensor(token_ids[1:], device=logits.device)[:, None]
    rows = logits[1:] if late else logits[:-1]
    return rows.float().log_softmax(-1).gather(-1, given)[:, 0]
