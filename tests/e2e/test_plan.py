"""`dots-align plan` through the real command line: the recipes of the released model, what they promise, bad input."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser

from dots_align import cli
from dots_align.planner.hardware import GPUS

RECIPES = ("sft_lora_1x8", "sft_full_4x8", "dpo_lora_1x8", "grpo_lora_1x8")
GIB = 2**30
# Runs the command and says what it took, on the last line: seconds of a core, and the peak of its memory in bytes. Not
# getrusage's, which survives exec, so that it would be that of the test's own process.
MEASURED = """
import sys, time
from dots_align import cli
cli.main(sys.argv[1:])
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(time.process_time(), int(peak.split()[1]) * 1024)
"""


@pytest.fixture(scope="session")
def released(repo_root: Path):
    return lambda name: repo_root / "recipes" / "dots_llm1" / f"{name}.yaml"


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str]):
    """What `dots-align plan … --json` prints."""

    def run(*arguments: Any) -> dict[str, Any]:
        cli.main(["plan", *map(str, arguments), "--json"])
        return json.loads(capsys.readouterr().out)

    return run


def _comment(path: Path) -> str:
    lines = path.read_text(encoding="utf-8").splitlines()
    return " ".join(
        line.lstrip("# ") for line in lines[: next(i for i, x in enumerate(lines) if not x.startswith("#"))]
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_of_the_released_model_fit_where_their_comment_says(plan, released, name):
    path = released(name)
    found = plan(path)
    nodes, gpus = (int(n) for n in name.rpartition("_")[2].split("x"))
    assert (found["nodes"], found["gpus_per_node"]) == (nodes, gpus)
    assert found["parameters"] == pytest.approx(142.8e9, rel=1e-3)
    assert found["active_parameters"] == pytest.approx(14.0e9, rel=2e-3)
    (needs,) = (sentence for sentence in _comment(path).split(". ") if sentence.startswith("Needs "))
    for gpu in GPUS:
        assert found["gpus"][gpu.name]["fits"] == (gpu.name in needs), gpu.name
    promised = (
        f"({found['peak']['bytes'] / GIB:.0f} GiB of each)",
        f"the peak is {found['peak']['bytes'] / GIB:.0f} GiB",
    )
    assert any(words in _comment(path) for words in promised)
    assert found["peak"]["bytes"] == max(sum(phase.values()) for phase in found["bytes"].values())


@pytest.mark.slow
def test_what_does_not_fit_comes_with_changes_that_do(plan, released, capsys):
    path = released("grpo_lora_1x8")
    nearest = plan(path)["gpus"]["H100-80"]["nearest"]
    changed = plan(path, *nearest["overrides"], "--nodes", nearest["nodes"])
    assert changed["gpus"]["H100-80"]["fits"]
    assert changed["peak"]["bytes"] == nearest["peak_bytes"]
    cli.main(["plan", str(path)])
    page = capsys.readouterr().out
    (line,) = (line for line in page.splitlines() if line.strip().startswith("change first: "))
    assert shlex.split(line.partition(": ")[2]) == nearest["overrides"]
    assert f"--nodes {nearest['nodes']}" in page
    assert "DOES NOT FIT" in page
    assert "ESTIMATED" in page
    assert "142.8 B parameters, 14.0 B active" in page


@pytest.mark.slow
def test_a_plan_takes_less_than_a_minute_of_a_core_and_four_gigabytes(released, repo_root: Path):
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, "plan", str(released("grpo_lora_1x8"))],
        cwd=repo_root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    seconds, peak = done.stdout.splitlines()[-1].split()
    assert float(seconds) < 60
    assert int(peak) < 4 * GIB


def test_a_small_model_is_planned_in_mebibytes(recipe, capsys):
    cli.main(["plan", recipe("sft"), "train.bf16=true", "on_save=[]", "--nodes", "1", "--gpus-per-node", "2"])
    page = capsys.readouterr().out
    assert "MiB on a GPU" in page
    assert "sft on 1 x 2 GPUs" in page
    assert page.count(": fits, ") == 2


@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("eval", [], "stage eval has no plan; give a recipe of stage sft, rft, dpo, reward_model, grpo, ppo"),
        ("pipeline", [], "stage pipeline has no plan"),
        ("sft", ["parallel.ep=3"], "parallel.ep=3 times parallel.dp_replicate=1 does not divide the 8 processes"),
        ("sft", ["parallel.ep=64", "--nodes", "8"], "does not divide the model's 32 routed experts"),
        ("sft", ["train.max_lenght=8"], "unknown key `train.max_lenght`; did you mean `train.max_length`?"),
        ("sft", ["parallel.backend=deepspeed"], "parallel.backend=deepspeed has no plan"),
        ("sft", ["model.attn_implementation=eager"], "model.attn_implementation=eager has no plan"),
        ("sft", ["model.experts_implementation=eager"], "model.experts_implementation=eager has no plan"),
        ("sft", ["model.preset=null"], "model.path is not set"),
        ("sft", ["--gpus-per-node", "0"], "1 x 0: a launch has at least one node with one GPU"),
        ("sft_lora", ["model.path=null", "model.preset=tiny", "lora.target_modules=[qkv]"], "matches no linear layer"),
    ],
)
def test_bad_input_is_one_line(fails, recipe, name, arguments, says):
    message = fails("plan", recipe(name), *arguments)
    assert says in message
    assert "\n" not in message


def test_a_directory_that_is_no_checkpoint_is_not_taken_for_the_released_model(fails, recipe, tmp_path: Path):
    message = fails("plan", recipe("sft_lora"), f"model.path={tmp_path}")
    assert f"{tmp_path}: not a checkpoint directory" in message


@pytest.mark.parametrize("nodes", [1, 2, 4])
def test_launch_files_start_eight_processes_on_each_node(repo_root: Path, nodes: int):
    path = repo_root / "recipes" / "accelerate" / f"{nodes}x8.yaml"
    options = ["--config_file", str(path), "--machine_rank", str(nodes - 1), "--main_process_ip", "10.0.0.7"]
    given = launch_command_parser().parse_args([*options, "-m", "dots_align", "plan"])
    launched, _, _ = _validate_launch_command(given)
    assert (launched.multi_gpu, launched.num_machines, launched.num_processes) == (True, nodes, 8 * nodes)
    assert (launched.machine_rank, launched.main_process_ip) == (nodes - 1, "10.0.0.7")
    assert not launched.use_fsdp
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
