"""The terminal chat: through a pipe, in a terminal, and what happens when the context is full."""

from __future__ import annotations

import json
import os
import pty
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dots_align.checkpoint import load_model, save_model, staged
from dots_align.config import ModelSection
from dots_align.data import synthetic
from dots_align.data.chat import encode_prompt, stop_token_ids
from dots_align.data.tokenizer import train_tokenizer
from dots_align.model.dots1 import create_model, preset_config
from dots_align.rollout.engine import RolloutEngine
from dots_align.terminal_chat import CharacterStreamer, Conversation, chat
from dots_align.types import GenerationRequest, Message, SamplingParams

MAX_TOKENS = 10
SCRIPT = """
import sys
from pathlib import Path
from dots_align.terminal_chat import chat
chat(Path(sys.argv[1]), system=sys.argv[2] or None, temperature=float(sys.argv[3]), max_tokens=int(sys.argv[4]), seed=3)
"""


@pytest.fixture(scope="module", autouse=True)
def single_threaded() -> Iterator[None]:
    """A tiny model gains nothing from threads and, on a busy machine, waits for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a context of 200 tokens that, greedily, never ends its turn (stop logits are 0)."""
    tokenizer = train_tokenizer(synthetic.corpus(400), 512, 200)
    config = preset_config(
        "tiny",
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_position_embeddings=200,
    )
    model = create_model(config, 0, stop_token_ids(tokenizer))
    model.lm_head.weight.data[list(stop_token_ids(tokenizer))] = 0
    final = tmp_path_factory.mktemp("chat") / "model"
    with staged(final, {"stage": "init", "step": 0, "recipe": {}}) as staging:
        save_model(model, tokenizer, staging)
    return final


@pytest.fixture
def talk(checkpoint: Path) -> Conversation:
    return Conversation(*load_model(ModelSection(path=str(checkpoint))), None, 0.0, MAX_TOKENS)


def command(checkpoint: Path, system: str = "", temperature: float = 0.0, max_tokens: int = MAX_TOKENS) -> list[str]:
    return [sys.executable, "-c", SCRIPT, str(checkpoint), system, str(temperature), str(max_tokens)]


def piped(arguments: list[str], text: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(arguments, input=text.encode(), capture_output=True, check=True, timeout=600)


def engine_says(checkpoint: Path, messages: list[Message]) -> str:
    """The greedy answer of the rollout engine: what the chat has to say, too."""
    model, tokenizer = load_model(ModelSection(path=str(checkpoint)))
    sampling = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, stop_token_ids=stop_token_ids(tokenizer))
    ((sample,),) = RolloutEngine(model).generate([GenerationRequest(encode_prompt(tokenizer, messages), 1, sampling)])
    return str(tokenizer.decode(sample.response_ids, skip_special_tokens=True))


def one_line(text: str) -> str:
    return " ".join(text.splitlines())


def test_piped_conversation_remembers_and_forgets(checkpoint: Path) -> None:
    system = "你是助手"
    done = piped(
        command(checkpoint, system), "What is 2 plus 3?\n\n小明有3个苹果\r\n/reset\nWhat is 2 plus 3?\n/exit\nno\n"
    )
    start = [Message("system", system), Message("user", "What is 2 plus 3?")]
    first = engine_says(checkpoint, start)
    second = engine_says(checkpoint, [*start, Message("assistant", first), Message("user", "小明有3个苹果")])
    assert done.stdout.decode().split("\n") == [one_line(first), one_line(second), one_line(first), ""]
    assert second != engine_says(checkpoint, [start[0], Message("user", "小明有3个苹果")])
    assert b"[forgot the conversation]" in done.stderr


def test_piped_sampling_repeats_with_the_seed_and_survives_any_input(checkpoint: Path) -> None:
    arguments = command(checkpoint, temperature=1.0)
    both = [
        subprocess.run(arguments, input=b"hi\n\xff\xfe broken \xe4\xbd\nhi", capture_output=True, check=True).stdout
        for _ in range(2)
    ]
    assert both[0] == both[1]
    assert both[0].count(b"\n") == 3


def test_full_context_drops_the_oldest_turns_and_long_messages_are_refused(checkpoint: Path) -> None:
    lines = ["a b c " * 12, "d e f " * 12, "g h i " * 12, "x " * 300, "ok?"]
    done = piped(command(checkpoint), "\n".join(lines) + "\n")
    answers = done.stdout.decode().split("\n")
    assert len(answers) == len(lines) + 1
    assert answers[3] == ""
    errors = done.stderr.decode()
    assert "[the context is full: forgot the oldest turn; /reset starts afresh]" in errors
    assert "error: the message takes" in errors
    assert "Traceback" not in errors


def test_fit_forgets_no_more_than_needed(talk: Conversation) -> None:
    room = 200 - MAX_TOKENS
    for number in range(8):
        talk.history += [Message("user", f"question {number} " * 3), Message("assistant", f"answer {number}")]
    before = list(talk.history)
    ids, forgotten = talk.fit("and now?")
    assert talk.history == before[2 * forgotten :]
    assert 0 < forgotten < 8
    assert len(ids) <= room
    longer = [*before[2 * (forgotten - 1) :], Message("user", "and now?")]
    assert len(encode_prompt(talk.tokenizer, longer)) > room
    with pytest.raises(ValueError, match="shorten it, or lower max_tokens"):
        talk.fit("x " * 300)
    assert talk.history == before[2 * forgotten :]


def test_answer_ends_at_the_stop_token(checkpoint: Path, tmp_path: Path) -> None:
    """The head's row of the second greedy token is given to the stop token, which then comes in its place."""
    directory = Path(shutil.copytree(checkpoint, tmp_path / "stops"))
    model, tokenizer = load_model(ModelSection(path=str(checkpoint)))
    prompt = encode_prompt(tokenizer, [Message("user", "hi")])
    sampling = SamplingParams(temperature=0.0, max_tokens=3)
    ((sample,),) = RolloutEngine(model).generate([GenerationRequest(prompt, 1, sampling)])
    first, second, _ = sample.response_ids
    assert first != second
    tensors, stop = load_file(directory / "model.safetensors"), tokenizer.eos_token_id
    tensors["lm_head.weight"][[second, stop]] = tensors["lm_head.weight"][[stop, second]]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    talk = Conversation(*load_model(ModelSection(path=str(directory))), None, 0.0, MAX_TOKENS)
    shown: list[str] = []
    assert talk.answer("hi", prompt, shown.append) == "".join(shown) == tokenizer.decode([first])
    assert talk.history == [Message("user", "hi"), Message("assistant", tokenizer.decode([first]))]


def test_stopped_answer_is_remembered_as_far_as_it_came(talk: Conversation) -> None:
    shown: list[str] = []

    def write(text: str) -> None:
        shown.append(text)
        if len(shown) == 2:
            raise KeyboardInterrupt

    ids, _ = talk.fit("What is 2 plus 3?")
    with pytest.raises(KeyboardInterrupt):
        talk.answer("What is 2 plus 3?", ids, write)
    assert talk.history[0] == Message("user", "What is 2 plus 3?")
    assert talk.history[1].content.startswith(shown[0])
    assert len(talk.history) == 2


def test_characters_are_shown_whole(talk: Conversation) -> None:
    text = "好的, 龘 \U0001f600!\n完<|endofresponse|>"
    tokens = talk.tokenizer(text)["input_ids"]
    shown: list[str] = []
    streamer = CharacterStreamer(talk.tokenizer, shown.append)
    streamer.put(torch.tensor([[1, 2, 3]]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert "".join(shown) == streamer.text == text.removesuffix("<|endofresponse|>")
    assert not any("\ufffd" in part for part in shown)
    assert len(shown) > 5
    half = CharacterStreamer(talk.tokenizer, shown.append)
    half.put(torch.tensor([[1]]))
    half.put(torch.tensor(talk.tokenizer("龘")["input_ids"][:1]))
    assert half.text == ""
    half.end()
    assert half.text == "\ufffd"


def test_arguments_out_of_range_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="temperature=-1 must not be negative"):
        chat(checkpoint, system=None, temperature=-1.0, max_tokens=5, seed=0)
    with pytest.raises(ValueError, match="max_tokens=200 must be at least 1 and leave room in the context of 200"):
        chat(checkpoint, system=None, temperature=0.0, max_tokens=200, seed=0)
    with pytest.raises(ValueError, match="no such checkpoint directory"):
        chat(tmp_path / "none", system=None, temperature=0.0, max_tokens=5, seed=0)


class Terminal:
    """A child process on a pseudo-terminal."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # tests that run in the background have it ignored
            os.execv(arguments[0], arguments)
        self.output = b""

    def wait_for(self, text: bytes, seconds: float = 300) -> None:
        """Reads until `text` came (any output, if empty), and forgets everything up to it."""
        deadline = time.monotonic() + seconds
        while not self.output or text not in self.output:
            assert select.select([self.descriptor], [], [], max(deadline - time.monotonic(), 0))[0], self.output
            try:
                self.output += os.read(self.descriptor, 4096)
            except OSError:
                pytest.fail(f"the terminal closed before {text!r}: {self.output!r}")
        self.output = self.output.partition(text)[2] if text else self.output

    def send(self, text: bytes) -> None:
        os.write(self.descriptor, text)

    def exit_code(self) -> int:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                return os.waitstatus_to_exitcode(status)
            if select.select([self.descriptor], [], [], 0.1)[0]:
                try:
                    self.output += os.read(self.descriptor, 4096)
                except OSError:
                    time.sleep(0.1)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        pytest.fail(f"still running: {self.output!r}")


@pytest.fixture
def roomy(checkpoint: Path, tmp_path: Path) -> Path:
    """The same with a context of 8000 tokens, so that its answers take long enough to be stopped."""
    directory = Path(shutil.copytree(checkpoint, tmp_path / "roomy"))
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 8000}))
    (directory / "manifest.json").unlink()  # it has the hash of what was there
    return directory


def test_terminal_conversation_ends_cleanly(roomy: Path) -> None:
    terminal = Terminal(command(roomy, max_tokens=7000))
    terminal.wait_for(b"Ctrl-C stops an answer.")
    terminal.wait_for(b"> ")
    terminal.send("你好\n".encode())
    terminal.wait_for("你好\r\n".encode())
    terminal.wait_for(b"")  # the answer has begun
    terminal.send(b"\x03")  # stops it, not the program
    terminal.wait_for(b"[stopped]")
    terminal.wait_for(b"\n> ")
    terminal.send(b"/reset\n")
    terminal.wait_for(b"[forgot the conversation]")
    terminal.wait_for(b"> ")
    terminal.send(b"\x04")
    assert terminal.exit_code() == 0
    assert b"Traceback" not in terminal.output
