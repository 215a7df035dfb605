"""The DeepSpeed back end by the command line, on gloo: it computes, saves and resumes as one process does."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from deepspeed_cases import run_command_in_bf16
from process_group import free_port, launch
from stage_cases import assert_equal_with_a_seed, differences, run_command, weights
from test_stages import REPO, STAGES, alone, arguments, start  # noqa: F401 - fixtures
from transformers import Dots1ForCausalLM

from dots_align.config import load_recipe
from dots_align.stages.zero import check_deepspeed, check_resume

needs_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++")), reason="DeepSpeed compiles its CPU code; there is no C++ compiler"
)
EVERYTHING = (
    "train.gradient_accumulation_steps=2",
    "train.gradient_checkpointing=true",
    "optim.max_grad_norm=0.05",
    "optim.weight_decay=0.1",
)
ATTENTION = ("lora.r=8", "lora.target_modules=[q_proj,v_proj,shared_experts.up_proj]")
EXPERTS = (*ATTENTION, "lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]")
BALANCED = ("router.balance_loss_coef=0.1", "router.bias_policy=update")
OFFLOAD = ("parallel.offload_optimizer=true",)
# name: (stage, processes, ZeRO stage, ep, keys of both runs, keys of the DeepSpeed run)
CASES = {
    "sft-zero2-experts_lora": ("sft", 2, 2, 1, EXPERTS, ()),
    "sft-zero2-ep2-everything-offload": ("sft", 2, 2, 2, EVERYTHING, OFFLOAD),
    "sft-zero3-balanced": ("sft", 2, 3, 1, BALANCED, ()),
    "sft-zero3-lora-checkpointed": ("sft", 2, 3, 1, (*ATTENTION, "train.gradient_checkpointing=true"), ()),
    "sft-zero3-ep2-everything-offload": ("sft", 2, 3, 2, EVERYTHING, OFFLOAD),
    "sft-zero3-ep2-of-4": ("sft", 4, 3, 2, (), ()),
    "dpo-zero2-ep2": ("dpo", 2, 2, 2, (), ()),
    "dpo-zero3-lora": ("dpo", 2, 3, 1, ATTENTION, ()),
    "dpo-zero3-ep2": ("dpo", 2, 3, 2, (), ()),
}


def on_deepspeed(zero: int, ep: int) -> tuple[str, ...]:
    return ("parallel.backend=deepspeed", f"parallel.zero_stage={zero}", f"parallel.ep={ep}")


@needs_compiler
@pytest.mark.parametrize("case", CASES)
def test_deepspeed_computes_what_one_process_does(case, start, alone, tmp_path):  # noqa: F811
    stage, world, zero, ep, keys, own = CASES[case]

    def measure(seed: str) -> dict[str, float]:
        run_dir = tmp_path / seed / stage
        launch(world, run_command, arguments(stage, run_dir, start, world, *keys, *own, seed, *on_deepspeed(zero, ep)))
        return differences(run_dir, alone(stage, *keys, seed), start, *STAGES[stage][1])

    assert_equal_with_a_seed(measure)


@pytest.fixture(scope="module")
def biased(start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    """The start weights in bfloat16, with correction biases that have no exact bfloat16."""
    directory = tmp_path_factory.mktemp("biased") / "start"
    shutil.copytree(start, directory)
    model = Dots1ForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.linspace(-0.1, 0.1, len(buffer)))
    (directory / "manifest.json").unlink()
    model.save_pretrained(directory)
    return directory


@needs_compiler
@pytest.mark.parametrize(("zero", "ep"), [(2, 2), (3, 1), (3, 2)])
def test_every_expert_is_saved_to_the_bit(zero, ep, biased, tmp_path):
    """Steps too small for any weight leave a checkpoint that transformers reads as the start itself."""
    keys = ("model.dtype=bfloat16", "optim.learning_rate=1e-30", "train.max_steps=2")
    launch(2, run_command_in_bf16, arguments("sft", tmp_path / "run", biased, 2, *keys, *on_deepspeed(zero, ep)))
    found, expected = weights(tmp_path / "run" / "last"), weights(biased)
    assert found.keys() == expected.keys()
    wrong = [n for n in expected if found[n].dtype != expected[n].dtype or not torch.equal(found[n], expected[n])]
    assert wrong == []
    saved, begun = (Dots1ForCausalLM.from_pretrained(d, dtype="auto") for d in (tmp_path / "run" / "last", biased))
    assert saved.dtype == torch.bfloat16
    assert all(torch.equal(tensor, begun.state_dict()[name]) for name, tensor in saved.state_dict().items())


@needs_compiler
@pytest.mark.parametrize(("zero", "ep"), [(2, 2), (3, 2)])
def test_a_run_resumes_where_it_was(zero, ep, start, alone, tmp_path):  # noqa: F811
    keys = ("save.save_steps=2", "optim.lr_scheduler_type=linear", "optim.warmup_steps=1")
    hooked = ("on_save=[evaluate]", "evaluation.num_prompts=2", "evaluation.max_tokens=4")

    def measure(seed: str) -> dict[str, float]:
        run_dir = tmp_path / seed / "sft"
        command = arguments("sft", run_dir, start, 2, *keys, *hooked, seed, *on_deepspeed(zero, ep))
        launch(2, run_command, command)
        shutil.rmtree(run_dir / "checkpoint-3")
        with pytest.raises(ValueError, match="is of 2 processes, this launch has 4; launch 2 to resume"):
            check_resume(run_dir / "checkpoint-2", 4)
        launch(2, run_command, command)
        assert (run_dir / "checkpoint-2" / "eval.json").is_file()
        return differences(run_dir, alone("sft", *keys, seed), start, *STAGES["sft"][1])

    assert_equal_with_a_seed(measure)


ACCELERATE = """
compute_environment: LOCAL_MACHINE
distributed_type: DEEPSPEED
deepspeed_config: {gradient_clipping: 7.0, zero_stage: 2}
num_machines: 1
num_processes: 2
machine_rank: 0
mixed_precision: "no"
"""


@needs_compiler
def test_an_accelerate_config_of_type_deepspeed_only_launches(start, alone, tmp_path):  # noqa: F811
    (tmp_path / "accelerate.yaml").write_text(ACCELERATE, encoding="utf-8")
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(tmp_path / "accelerate.yaml")]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO), "DOTS_ALIGN_DEVICE": "cpu"}

    def measure(seed: str) -> dict[str, float]:
        run_dir = tmp_path / seed / "sft"
        command = ["-m", "dots_align", *arguments("sft", run_dir, start, 2, seed, *on_deepspeed(3, 2))]
        done = subprocess.run(
            [sys.executable, *launcher, "--main_process_port", str(free_port()), *command],
            env=environment,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return differences(run_dir, alone("sft", seed), start, *STAGES["sft"][1])

    assert_equal_with_a_seed(measure)


REFUSED = {
    "rollouts of grpo": ("grpo", ()),
    "parallel.dp_replicate is not offered": ("sft", ("parallel.dp_replicate=2",)),
    "parallel.reshard_after_forward=false": ("sft", ("parallel.reshard_after_forward=false",)),
    "set model.dtype=bfloat16, or train.bf16=false": ("sft", ("train.bf16=true",)),
    "the experts cannot be frozen": ("sft", ("parallel.ep=2", "lora.r=4")),
    "would do nothing": ("dpo", ("parallel.ep=2", "router.bias_policy=update")),
    "does not gather adapters of the routed experts": ("sft", ("lora.target_parameters=[mlp.experts.down_proj]",)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_deepspeed_cannot_do_is_refused_in_one_line(message, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    stage, keys = REFUSED[message]
    recipe = load_recipe(REPO / "recipes" / "tiny" / f"{stage}.yaml", ["parallel.backend=deepspeed", *keys])
    with pytest.raises(ValueError, match=message) as refused:
        check_deepspeed(recipe, 2)
    assert "\n" not in str(refused.value)
    assert "parallel.backend=deepspeed" in str(refused.value)


def test_a_start_without_a_launcher_is_refused(monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    recipe = load_recipe(REPO / "recipes" / "tiny" / "sft.yaml", ["parallel.backend=deepspeed"])
    with pytest.raises(ValueError, match="needs a launcher, for one process too"):
        check_deepspeed(recipe, 1)
