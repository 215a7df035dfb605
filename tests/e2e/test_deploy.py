"""The servers of recipes/deploy/, started for real and asked by the OpenAI client: do they say what generate says?"""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dots_align.checkpoint import save_model
from dots_align.data import synthetic
from dots_align.data.chat import stop_token_ids
from dots_align.data.tokenizer import train_tokenizer
from dots_align.export.gguf import write_gguf
from dots_align.export.hf import export_hf
from dots_align.model.dots1 import create_model, preset_config
from dots_align.parity.check import compare_all
from dots_align.parity.endpoint import Endpoint
from dots_align.parity.questions import asked, fixed_questions
from tests.distributed.process_group import free_port

PATIENCE_SECONDS = 600
MAX_TOKENS = 12
MESSAGES = [{"role": "user", "content": "What is 2 plus 3? 二加三？"}]


def needs(*modules: str) -> None:
    for name in modules:
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -c constraints.txt -e '.[llama,serve]'")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("deploy")
    tokenizer = train_tokenizer(synthetic.corpus(400), 512, 512)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = preset_config("tiny", num_hidden_layers=2, max_position_embeddings=512, **ends)
    save_model(create_model(config, 0, stop_token_ids(tokenizer)), tokenizer, root / "checkpoint")
    return export_hf(root / "checkpoint", root / "export")


@pytest.fixture(scope="module")
def expected(exported: Path) -> str:
    """What plain `generate` answers."""
    tokenizer, model = AutoTokenizer.from_pretrained(exported), AutoModelForCausalLM.from_pretrained(exported)
    options: Any = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    inputs = tokenizer.apply_chat_template(MESSAGES, **options)
    output = model.generate(**inputs, do_sample=False, max_new_tokens=MAX_TOKENS)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@contextmanager
def serving(script: Path, model: Path) -> Iterator[str]:
    """The address of a server that a script of recipes/deploy started, once it listens."""
    port = free_port()
    named = {"MODEL": str(model), "PORT": str(port), "PYTHON": sys.executable}
    environment = {**os.environ, **named, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    log = model.parent / f"{script.stem}.log"
    with log.open("w") as stream:
        server = subprocess.Popen([script], env=environment, stdout=stream, stderr=subprocess.STDOUT)
    try:
        give_up = time.monotonic() + PATIENCE_SECONDS
        while True:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < give_up, f"{script.name} does not listen:\n{log.read_text()}"
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(timeout=120)


def answer(url: str, model: str | None = None, **options: Any) -> str:
    from openai import OpenAI  # pyright: ignore[reportMissingImports] - optional: the extra `serve`

    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_SECONDS)
    model = model or client.models.list().data[0].id
    messages: Any = MESSAGES
    greedy: Any = {"temperature": 0, "max_tokens": MAX_TOKENS, "extra_body": options}
    found = client.chat.completions.create(model=model, messages=messages, **greedy)
    return str(found.choices[0].message.content)


@pytest.mark.slow
def test_transformers_serve_answers_like_generate(repo_root: Path, exported: Path, expected: str) -> None:
    needs("openai", "fastapi", "uvicorn")
    with serving(repo_root / "recipes" / "deploy" / "transformers_serve.sh", exported) as url:
        assert answer(url, str(exported)) == expected
    assert expected


@pytest.mark.slow
def test_llama_cpp_server_answers_like_generate_and_has_parity(
    repo_root: Path, exported: Path, expected: str, tmp_path: Path
) -> None:
    needs("llama_cpp", "openai", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings")
    if shutil.which("llama-server"):
        pytest.skip("llama-server is on the path, whose version nobody here knows")
    gguf = write_gguf(exported, tmp_path / "model-F32.gguf", "F32")
    tokenizer = AutoTokenizer.from_pretrained(exported)
    questions = asked(fixed_questions(tokenizer, 512)[1:7:2], tokenizer)
    with serving(repo_root / "recipes" / "deploy" / "llama_cpp_server.sh", gguf) as url:
        said, ours = answer(url, repeat_penalty=1.0), expected.replace("\ufffd", "")
        endpoint = Endpoint(url, tokenizer, precision="BF16")  # its keys and values are in float16
        model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
        found = compare_all("export", model, questions, [endpoint])
    # It leaves out bytes that are no characters, and may stop before or behind half a one.
    assert min(len(said), len(ours)) >= 4
    assert said.startswith(ours) or ours.startswith(said)
    assert found.ok, found.rows[0].problems
    assert found.rows[0].num_tokens > 80
    assert found.rows[0].stopped


def test_every_script_wants_a_model(repo_root: Path) -> None:
    scripts = sorted((repo_root / "recipes" / "deploy").glob("*.sh"))
    assert len(scripts) == 4
    for script in scripts:
        environment = {name: value for name, value in os.environ.items() if name != "MODEL"}
        done = subprocess.run([script], env=environment, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert "MODEL: is not set; give " in done.stderr
