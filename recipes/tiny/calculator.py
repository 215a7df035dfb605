"""A tool for the arithmetic task: a calculator that works out the first sum or difference the model writes down."""

import re

from dots_align.types import Message, Observation, Prompt, Response

EXPRESSION = re.compile(r"(\d+)\s*([+-])\s*(\d+)")
BOXED = re.compile(r"\\boxed\{(-?\d+)\}")


class Calculator:
    """Answers a turn with `27+45=72`, so that the model can mend what it said; an answer that agrees with it ends the
    episode. What a reward function sees is the model's last turn.

    Args:
        reward: for a turn with something to calculate.
    """

    def __init__(self, reward: float = 0.0) -> None:
        self.reward = reward

    def reset(self, prompt: Prompt) -> None:
        """The prompt stays as it is."""

    def step(self, response: Response) -> Observation:
        found = EXPRESSION.search(response.text)
        if found is None:
            return Observation((Message("user", "?"),))
        a, operation, b = int(found[1]), found[2], int(found[3])
        value = a + b if operation == "+" else a - b
        boxed = BOXED.findall(response.text)
        if boxed and int(boxed[-1]) == value:
            return Observation(reward=self.reward, done=True)
        return Observation((Message("user", f"{a}{operation}{b}={value}"),), self.reward)
