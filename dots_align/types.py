"""The records that travel between rooms: frozen dataclasses of plain lists, never tensors or trainers.

Every record that came from a file keeps `source` (`path:line`), so that whoever finds it wanting can say where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Conversation:
    """An SFT example. Invariant: at least one message is the assistant's."""

    messages: list[Message]
    source: str = ""


@dataclass(frozen=True)
class PreferencePair:
    """A DPO example: one prompt (its last message is the user's) and two answers, the better one first."""

    prompt: list[Message]
    chosen: str
    rejected: str
    source: str = ""


@dataclass(frozen=True)
class Prompt:
    """An RL or evaluation prompt (its last message is the user's) with the reference answer a verifier needs: text, or
    a JSON object of the fields it asked for.
    """

    messages: list[Message]
    answer: str | None = None
    source: str = ""


@dataclass(frozen=True)
class Response:
    """What a reward function sees: the prompt it answers, the decoded text, and how it ended.

    `response_ids` are the sampled tokens including the stop token, if there is one; `text` has no special tokens.
    `finish_reason` is `stop` (the model ended its turn) or `length` (it ran into `max_tokens`).

    Where it talked with an environment, `turns` is all that both said after the prompt, `text` the model's last turn,
    and `response_ids` the tokens of all its turns.
    """

    prompt: Prompt
    text: str
    response_ids: list[int] = field(default_factory=list)
    finish_reason: str = "stop"
    turns: tuple[Message, ...] = ()


@dataclass(frozen=True)
class Observation:
    """What an environment says to the model's turn: `messages` that the model gets to read (without any, or if `done`,
    the episode is over), and a reward.
    """

    messages: tuple[Message, ...] = ()
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """What a recipe's `environment` makes for every sample: the world, or the tools, that the model talks with."""

    def reset(self, prompt: Prompt) -> list[Message] | None:
        """Begins. Returns the conversation the model shall answer, if that is not the prompt's; for all samples of a
        prompt the same.
        """
        ...

    def step(self, response: Response) -> Observation:
        """The answer to a turn: `response` has its text and tokens, and all `turns` so far."""
        ...


Function = TypeVar("Function", bound=Callable[..., Any])


def reward_range(low: float, high: float) -> Callable[[Function], Function]:
    """Declares between which numbers a reward function answers; a value outside is a failure of the function."""

    def declare(function: Function) -> Function:
        function.reward_range = (low, high)  # type: ignore[attr-defined]
        return function

    return declare


RewardModel = Callable[[Sequence[Response]], list[float]]
"""A trained reward model, loaded: the score of each response, in order."""


def uses_reward_model(function: Function) -> Function:
    """Declares a reward function that scores many responses at once, with a trained reward model:
    `function(responses, model, **arguments)` returns the value of each. A recipe names the model's checkpoint as the
    argument `checkpoint` and says `run_in: trainer`; it is loaded once, when the run starts.
    """
    function.uses_reward_model = True  # type: ignore[attr-defined]
    return function


@dataclass(frozen=True)
class SamplingParams:
    """How to sample, in vLLM's names. `temperature` 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 switch the filters
    off. Filters apply in this order: `top_k`, `top_p` (the fewest tokens that reach the mass), `min_p` (at least this
    share of the likeliest token's probability).
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int = 128
    stop_token_ids: tuple[int, ...] = ()
    seed: int = 0


@dataclass(frozen=True)
class Episode:
    """What became of a sample in its environment.

    `own` has 1 for each response token that the policy sampled, 0 for those the environment said; `turns` is what both
    said, `num_turns` how often the policy spoke, `reward` the sum of the environment's. `error`: the environment failed
    and the episode ended there.
    """

    prompt_ids: list[int]
    own: list[int]
    turns: tuple[Message, ...]
    num_turns: int
    reward: float
    error: bool = False


@dataclass(frozen=True)
class Sample:
    """One sampled continuation.

    Invariant: `len(response_ids) == len(rollout_logprobs) == len(logprobs)`. `rollout_logprobs` are natural
    logarithms under the distribution that was sampled from (temperature and filters applied), `logprobs` under the
    model's own (temperature 1). `routes` (only if asked for) are the expert ids that each input token chose, uint8
    in the order [token][MoE layer][k]; the tokens are the prompt's and the response's but for the last, which was
    never fed.

    `finish_reason` is `stop` (a stop token, which is the last id), `length` (max_tokens) or `abort` (it was told to
    stop, and may go on as `GenerationRequest.started`).
    """

    response_ids: list[int]
    rollout_logprobs: list[float]
    logprobs: list[float]
    finish_reason: str
    routes: bytes | None = None
    episode: Episode | None = None


@dataclass(frozen=True)
class GenerationRequest:
    """`num_samples` continuations of one prompt; the prompt is prefilled once for all of them.

    `started` holds samples begun earlier, such as those an `abort` returned: the first entry is the first sample, and
    so on. A sample that had not ended goes on behind its last token, with the random numbers it would have had.
    """

    prompt_ids: list[int]
    num_samples: int = 1
    sampling: SamplingParams = SamplingParams()
    started: tuple[Sample, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """A sample with its prompt and score, as the update step of RL consumes it.

    Invariant: `len(response_ids) == len(rollout_logprobs)`; trajectories of one `group` answer the same prompt.
    `response_mask` has 1 for each response token that the policy sampled, 0 for those an environment said, from which
    nothing is learned; None: all are the policy's.
    """

    prompt_ids: list[int]
    response_ids: list[int]
    rollout_logprobs: list[float]
    group: int
    reward: float
    routes: bytes | None = None
    response_mask: list[int] | None = None

    @property
    def num_sampled(self) -> int:
        """Response tokens that the policy sampled."""
        return len(self.response_ids) if self.response_mask is None else sum(self.response_mask)
