"""Stages by the command line on several processes against one: same losses, gradient norms and weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from process_group import launch
from stage_cases import differences, run_command

REPO = Path(__file__).resolve().parents[2]
REWARD = f"{Path(__file__).parent / 'stage_cases.py'}:even_tokens"
# Adam turns rounding in tiny gradients into steps of full size unless epsilon is above it.
COMMON = ("train.max_steps=3", "on_save=[]", "logging.logging_steps=1", "optim.warmup_steps=0", "optim.adam_epsilon=1e-4")
STAGES = {
    "sft": (("data.max_samples=120", "train.max_length=128"), ("sft/loss", "sft/grad_norm")),
    "dpo": (("data.max_samples=64", "train.max_length=128"), ("dpo/loss", "dpo/grad_norm")),
    "grpo": (
        (
            "data.max_samples=16",
            "train.num_prompts_per_step=5",
            "rollout.group_size=4",
            "rollout.max_tokens=8",
            "train.micro_batch_tokens=128",
            "algorithm.kl_coef=0.01",
            "data.system_prompt=Answer.",
            f"rewards.0.function={REWARD}",
        ),
        ("grpo/loss", "grpo/grad_norm", "grpo/reward", "grpo/entropy"),
    ),
}
BATCH = 8


def arguments(stage: str, output_dir: Path, start: Path, world: int, *more: str) -> list[str]:
    keys, _ = STAGES[stage]
    size = () if stage == "grpo" else (f"train.per_device_train_batch_size={BATCH // world}",)
    recipe = str(REPO / "recipes" / "tiny" / f"{stage}.yaml")
    model = (f"model.path={start}", "model.preset=null")
    return [stage, recipe, f"output_dir={output_dir}", *COMMON, *keys, *size, *model, *more]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh tiny weights, as SFT makes them."""
    run_dir = tmp_path_factory.mktemp("start")
    recipe = str(REPO / "recipes" / "tiny" / "sft.yaml")
    launch(1, run_command, ["sft", recipe, f"output_dir={run_dir}/sft", "data.max_samples=40", "train.max_steps=1", "on_save=[]"])
    return run_dir / "sft" / "last"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, start: Path):
    """The run of a stage on one process, made once for each set of keys."""
    made: dict[tuple[str, ...], Path] = {}

    def run(stage: str, *more: str) -> Path:
        if (stage, *more) not in made:
            run_dir = tmp_path_factory.mktemp("alone") / stage
            launch(1, run_command, arguments(stage, run_dir, start, 1, *more))
            made[stage, *more] = run_dir
        return made[stage, *more]

    return run


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("world", "ep"), [(2, 1), (2, 2), (4, 2)])
def test_a_stage_computes_what_one_process_does(stage, world, ep, start, alone, tmp_path):
    run_dir = tmp_path / stage
    launch(world, run_command, arguments(stage, run_dir, start, world, f"parallel.ep={ep}"))
    found = differences(run_dir, alone(stage), start, *STAGES[stage][1])
    assert max(found.values()) < 1e-5 or print(found), found
