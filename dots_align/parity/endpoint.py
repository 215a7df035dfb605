"""A server with OpenAI's completions API, such as vLLM, SGLang or llama.cpp's: it tells log-probs of prompt tokens."""

from __future__ import annotations

from typing import Any

import httpx
import torch
from transformers import PreTrainedTokenizerBase

from dots_align.data.chat import as_dicts
from dots_align.parity.observation import Asked, Observation, Question

TIMEOUT_SECONDS = 600.0
BIAS = 100.0  # the most that OpenAI's API takes


class Endpoint:
    """Asks `<url>/v1/completions` for the log-probs of each prompt (`echo`), and whether it ends a turn.

    Args:
        url: of the server, without /v1.
        precision: of its weights; a server that computes in fp32 is EXACT.
        model: its name for the model; the first that it lists, if not given.
    """

    def __init__(
        self, url: str, tokenizer: PreTrainedTokenizerBase, precision: str = "BF16", model: str | None = None
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.tokenizer, self.precision, self.model = tokenizer, precision, model
        self.name = f"server {self.url.partition('://')[2]}"

    def observe(self, asked: Asked) -> Observation:
        with httpx.Client(timeout=TIMEOUT_SECONDS) as client:
            self.model = self.model or self._call(client, "GET", "models")["data"][0]["id"]
            told = [self._logprobs(client, question) for question in asked.questions]
            lengths = [self._chat_length(client, question) for question in asked.questions]
            stopped = self._stops(client, asked)
        return Observation(
            logprobs=[t[0] for t in told],
            num_rendered=[a if a is not None else b for a, b in zip(lengths, (t[1] for t in told), strict=True)],
            stopped=stopped,
            precision=self.precision,
        )

    def _call(self, client: httpx.Client, method: str, path: str, **body: Any) -> Any:
        """The answer; ValueError with what the server says of it, if it is none."""
        url = f"{self.url}/v1/{path}"
        try:
            answer = client.request(method, url, json=body or None)
            answer.raise_for_status()
            return answer.json()
        except httpx.HTTPStatusError as error:
            text = error.response.text.strip()[:300]
            raise ValueError(f"{url}: status {error.response.status_code}: {text}") from None
        except (httpx.HTTPError, ValueError) as error:
            raise ValueError(f"{url}: {error or type(error).__name__}") from None

    def _complete(self, client: httpx.Client, question: Question, **options: Any) -> Any:
        """A completion of the ids; of their text, where the server takes no ids."""
        request = {"model": self.model, "temperature": 0, **options}
        try:
            return self._call(client, "POST", "completions", prompt=list(question.token_ids), **request)
        except ValueError:
            text = self._text(question)
            if text is None:
                raise
            return self._call(client, "POST", "completions", prompt=text, **request)

    def _text(self, question: Question) -> str | None:
        if question.messages:
            turns = as_dicts(question.messages)
            return str(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))
        return question.text

    def _logprobs(self, client: httpx.Client, question: Question) -> tuple[torch.Tensor, int | None]:
        """[T - 1] log-probs, NaN where they are not told, and how many tokens the prompt has for the server."""
        count = len(question.token_ids)
        unknown = torch.full((count - 1,), float("nan"))
        try:
            answer = self._complete(client, question, max_tokens=1, echo=True, logprobs=1)
        except ValueError:
            if question.messages or question.text is not None:
                raise
            return unknown, None
        told = (answer["choices"][0].get("logprobs") or {}).get("token_logprobs") or []
        seen = int((answer.get("usage") or {}).get("prompt_tokens") or len(told) - 1)
        if seen != count or len(told) < count:
            return unknown, seen
        return torch.tensor([float("nan") if p is None else float(p) for p in told[1:count]]), seen

    def _chat_length(self, client: httpx.Client, question: Question) -> int | None:
        if not question.messages:
            return None
        turns = as_dicts(question.messages)
        answer = self._call(client, "POST", "chat/completions", model=self.model, messages=turns, max_tokens=1)
        return (answer.get("usage") or {}).get("prompt_tokens")

    def _stops(self, client: httpx.Client, asked: Asked) -> bool:
        bias = {str(asked.end_of_turn): BIAS}
        answer = self._complete(client, asked.questions[0], max_tokens=3, logit_bias=bias)
        return answer["choices"][0]["finish_reason"] == "stop"
