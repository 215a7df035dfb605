"""`dots-align chat`: a conversation with a checkpoint in the terminal, or one answer per line for a script.

In a terminal the answer appears as it is made. With piped input there are no decorations: one message per input line,
one answer per output line (line breaks inside an answer become spaces), everything else on stderr.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from dots_align.checkpoint import check_whole, load_model, stored_dtype
from dots_align.config import ModelSection
from dots_align.data.chat import encode_prompt, stop_token_ids
from dots_align.runtime import device, seed_everything
from dots_align.types import Message

HELP = "/reset forgets the conversation, /exit or Ctrl-D ends it, Ctrl-C stops an answer."
INCOMPLETE = "\ufffd"  # what the bytes of half a character decode to


def chat(directory: Path, *, system: str | None, temperature: float, max_tokens: int, seed: int) -> None:
    """Talks with a checkpoint or export directory until the input ends.

    Args:
        directory: a full, adapter or exported checkpoint.
        system: the system message; the model's default if None.
        temperature: 0 is greedy.
        max_tokens: longest answer, in tokens.
        seed: of the sampling; the same seed and messages give the same answers.

    Raises:
        ValueError: the directory is no whole checkpoint, or an argument is out of range.
        SystemExit: status 130, where Ctrl-C ends a piped conversation.
    """
    if temperature < 0:
        raise ValueError(f"temperature={temperature:g} must not be negative; 0 is greedy")
    path = Path(directory)
    check_whole(path)
    model, tokenizer = load_model(ModelSection(path=str(path), dtype=stored_dtype(path)), device())
    context = model.config.max_position_embeddings
    if not 1 <= max_tokens < context:
        raise ValueError(
            f"max_tokens={max_tokens} must be at least 1 and leave room in the context of {context} tokens"
        )
    seed_everything(seed)
    talk = Conversation(model.eval(), tokenizer, system, temperature, max_tokens)
    if sys.stdin.isatty() and sys.stdout.isatty():
        _in_terminal(talk, path)
    else:
        _piped(talk)


class Conversation:
    """A model and what has been said. Invariant: after the system message, `history` alternates user and assistant."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        system: str | None,
        temperature: float,
        max_tokens: int,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.temperature, self.max_tokens = temperature, max_tokens
        self.system = [Message("system", system)] if system else []
        self.history: list[Message] = []

    def reset(self) -> None:
        self.history.clear()

    def fit(self, message: str) -> tuple[list[int], int]:
        """Makes room for a message and its answer by forgetting the oldest turns.

        Returns:
            token ids of the prompt, and how many turns (a message and its answer) were forgotten.

        Raises:
            ValueError: the message is too long on its own; nothing is forgotten then.
        """
        room = self.model.config.max_position_embeddings - self.max_tokens
        ids: list[int] = []
        for start in range(0, len(self.history) + 1, 2):
            ids = encode_prompt(self.tokenizer, [*self.system, *self.history[start:], Message("user", message)])
            if len(ids) <= room:
                del self.history[:start]
                return ids, start // 2
        raise ValueError(
            f"the message takes {len(ids)} tokens with its system message, and {room} are left beside an answer "
            f"of up to {self.max_tokens}; shorten it, or lower max_tokens"
        )

    def answer(self, message: str, prompt_ids: list[int], write: Callable[[str], None]) -> str:
        """Generates the answer to `message`, hands its text to `write` as it comes, and remembers the turn.

        Ctrl-C stops the answer; what was said so far is remembered, and KeyboardInterrupt goes on to the caller.
        """
        streamer = CharacterStreamer(self.tokenizer, write)
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature > 0:
            # transformers filters the 50 best by default; nobody asked for that here.
            sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0, "top_p": 1.0}
        inputs = torch.tensor([prompt_ids], device=self.model.device)
        model: Any = self.model  # the stubs of generate() do not accept the class they belong to
        try:
            model.generate(
                inputs,
                # Without a mask generate() takes every token that equals the padding id for padding.
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=self.max_tokens,
                eos_token_id=list(stop_token_ids(self.tokenizer)),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=streamer,
                **sampling,
            )
        finally:
            streamer.end()
            self.history += [Message("user", message), Message("assistant", streamer.text)]
        return streamer.text


class CharacterStreamer(BaseStreamer):
    """Hands on text as soon as its characters are whole: a Chinese character may take several byte-level tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, write: Callable[[str], None]) -> None:
        self.tokenizer, self.write = tokenizer, write
        self.tokens: list[int] = []
        self.text = ""
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt first, [1, P], which is not shown; then each new token, [1]."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.tokens += value.flatten().tolist()
        self._show(self._decoded().rstrip(INCOMPLETE))

    def end(self) -> None:
        """Shows the rest, even if it is half a character. May be called twice."""
        self._show(self._decoded())

    def _decoded(self) -> str:
        return str(self.tokenizer.decode(self.tokens, skip_special_tokens=True))

    def _show(self, text: str) -> None:
        if len(text) > len(self.text):
            self.write(text[len(self.text) :])
            self.text = text


def _in_terminal(talk: Conversation, directory: Path) -> None:
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and a history
    print(f"{directory}: {HELP}")

    def write(text: str) -> None:
        print(text, end="", flush=True)

    while True:
        try:
            message = input("\n> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
        try:
            if message.strip() == "/exit":
                return
            _turn(talk, message, write)
        except KeyboardInterrupt:
            print(" [stopped]", end="")
        print()


def _piped(talk: Conversation) -> None:
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        for message in _lines():
            if message.strip() == "/exit":
                return
            answer = _turn(talk, message, lambda _: None)
            if answer is not None:
                print(" ".join(answer.splitlines()), flush=True)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except BrokenPipeError:
        # Whoever read the answers is gone (`| head -1`); closing here keeps Python from complaining at its exit.
        with contextlib.suppress(BrokenPipeError):
            sys.stdout.close()


def _lines() -> Iterator[str]:
    for line in sys.stdin:
        yield line.rstrip("\r\n")


def _turn(talk: Conversation, message: str, write: Callable[[str], None]) -> str | None:
    """One message: a command (no answer: None), an empty line (the same), or something to answer.

    A message that cannot be answered gets an error on stderr and the empty answer: output lines match input lines.
    """
    command = message.strip()
    if not command:
        return None
    if command == "/reset":
        talk.reset()
        print("[forgot the conversation]", file=sys.stderr)
        return None
    try:
        prompt_ids, forgotten = talk.fit(message)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return ""
    if forgotten:
        turns = "turn" if forgotten == 1 else f"{forgotten} turns"
        print(f"[the context is full: forgot the oldest {turns}; /reset starts afresh]", file=sys.stderr)
    return talk.answer(message, prompt_ids, write)
