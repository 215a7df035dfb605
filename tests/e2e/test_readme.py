"""Every command in the README runs, in order, in one directory, with fewer steps: those of `dots-align` in processes
that have imported it already, but for one that is started as it is installed.
"""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from forked import Forked, program

from tests.e2e.browser import BROWSER, Browser
from tests.e2e.conftest import QUICK_GRPO

SHORT = {
    "sft": ("data.max_samples=120", "train.max_steps=2", "evaluation.num_prompts=4"),
    "dpo": ("data.max_samples=16", "train.per_device_train_batch_size=8", "evaluation.num_prompts=4"),
    "rft": (
        *("data.max_samples=16", "rollout.group_size=16", "selection.min_reward=0.0"),
        *("train.max_steps=2", "evaluation.num_prompts=4"),
    ),
    "reward_model": ("data.max_samples=16", "train.per_device_train_batch_size=8", "evaluation.num_pairs=4"),
    "grpo": (*QUICK_GRPO, "evaluation.num_prompts=4"),
    "ppo": (*QUICK_GRPO, "evaluation.num_prompts=4", "critic.warmup_steps=1"),
    "eval": ("evaluation.num_prompts=4", "evaluation.max_tokens=8"),
    "pipeline": (
        *(f"sft.{key}" for key in ("data.max_samples=120", "train.max_steps=2", "evaluation.num_prompts=4")),
        *(f"dpo.{key}" for key in ("data.max_samples=16", "evaluation.num_prompts=4")),
        *(f"grpo.{key}" for key in QUICK_GRPO),
    ),
}


def commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if line]


def shortened(command: list[str]) -> list[str]:
    """The same command with fewer steps; overrides given last win, but what the README itself says stays in."""
    stage = next((word for word in command if word in SHORT and "--tasks" not in command), None)
    extra = SHORT.get("pipeline" if command[0].endswith("quickstart.sh") else stage or "", ())
    return [*command, *extra]


@pytest.mark.slow
def test_every_readme_command_runs(repo_root: Path, tmp_path: Path):
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    found = commands(readme)
    tools = {Path(command[0]).name for command in found}
    assert tools == {"quickstart.sh", "test.sh", "dots-align", "accelerate", "torchrun"}
    for name in ("recipes", "reward_models", "dots_align"):
        (tmp_path / name).symlink_to(repo_root / name)
    gsm8k = tmp_path / "data" / "gsm8k"
    gsm8k.mkdir(parents=True)
    row = '{{"question": "Tom has {0} pens and buys {0} more. How many?", "answer": "{0}+{0}={1}\\n#### {1}"}}\n'
    for split in ("train", "test"):
        (gsm8k / f"{split}.jsonl").write_text("".join(row.format(n, 2 * n) for n in range(2, 42)))
    venv = repo_root / ".venv" / "bin"
    path = f"{venv}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    for command in found:
        if command[0].startswith("scripts/"):
            continue  # test.sh runs these tests; quickstart.sh has a test of its own below
        if command[0] == "dots-align" and command[1] != "report":
            said = "12加30等于多少？\n" if command[1] == "chat" else ""
            options = {"output": tmp_path / "said.txt", "cwd": tmp_path, "text": said, "OMP_NUM_THREADS": "1"}
            process = Forked(program, shortened(command)[1:], **options)
            assert process.wait() == 0, f"{shlex.join(command)}\n{process.said()}"
            continue
        done = subprocess.run(shortened(command), cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    assert (tmp_path / "runs" / "tiny" / "report.html").is_file()


@pytest.mark.slow
def test_quickstart_ends_with_where_things_are_and_how_to_talk(repo_root: Path, tmp_path: Path):
    if not (repo_root / ".venv" / ".setup-done").is_file():
        pytest.skip("the environment was not made by scripts/setup_env.sh")
    keys = [*SHORT["pipeline"], f"output_dir={tmp_path / 'tiny'}"]
    done = subprocess.run(
        [repo_root / "scripts" / "quickstart.sh", *keys], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr
    tail = (done.stdout + done.stderr).strip().splitlines()
    text = "\n".join(tail)
    export, report = tmp_path / "tiny" / "export", tmp_path / "tiny" / "report.html"
    assert f"chat checkpoint: {export}" in text
    assert f"report:          {report}" in text
    assert f"dots-align chat {export}" in text
    assert (export / "model.safetensors").is_file()
    assert report.is_file()
    assert report.stat().st_size < 3_000_000
    if BROWSER:
        with Browser(tmp_path / "profile") as browser:
            browser.open(report)
            assert browser.complaints == []
            assert browser.run("document.documentElement.dataset.errors || null") is None
            assert browser.run("document.querySelectorAll('.samples .list [role=option]').length") > 0
    record = (tmp_path / "tiny" / "pipeline.json").read_text()
    again = subprocess.run(
        [repo_root / "scripts" / "quickstart.sh", *keys], capture_output=True, text=True, stdin=subprocess.DEVNULL
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "tiny" / "pipeline.json").read_text().count('"name"') == record.count('"name"')
