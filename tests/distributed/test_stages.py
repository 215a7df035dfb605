"""Stages by the command line on several processes against one: same losses, gradient norms and weights."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from process_group import launch
from stage_cases import apart, assert_equal_with_a_seed, differences, run_command

from dots_align.checkpoint import check_whole, load_model
from dots_align.config import ModelSection
from dots_align.evals.benchmarks import Suite, run_suite

REPO = Path(__file__).resolve().parents[2]
REWARD = f"{Path(__file__).parent / 'stage_cases.py'}:even_tokens"
# Adam turns rounding in tiny gradients into steps of full size unless epsilon is above it.
COMMON = (
    "seed=1",
    "train.max_steps=3",
    "on_save=[]",
    "logging.logging_steps=1",
    "optim.warmup_steps=0",
    "optim.adam_epsilon=1e-4",
)
STAGES = {
    "sft": (("data.max_samples=120", "train.max_length=128"), ("sft/loss", "sft/grad_norm")),
    # TRL's `sft` term is a mean over the tokens of a process: with it, how a batch is divided shows.
    "dpo": (
        ("data.max_samples=64", "train.max_length=128", "loss_type=[sigmoid]", "loss_weights=null"),
        ("dpo/loss", "dpo/grad_norm"),
    ),
    "reward_model": (
        ("data.max_samples=64", "train.max_length=128", "on_save=[evaluate]", "evaluation.num_pairs=9"),
        ("reward_model/loss", "reward_model/grad_norm", "reward_model/margin"),
    ),
    # Few answers of an untrained model end; what is mixed in fills the batches.
    "rft": (
        (
            "data.max_samples=8",
            "rollout.group_size=16",
            "selection.min_reward=0.0",
            "mix.data.max_samples=120",
            "mix.ratio=1000",
            "train.max_length=128",
            f"rewards.0.function={REWARD}",
        ),
        ("rft/loss", "rft/grad_norm"),
    ),
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
STAGES["ppo"] = (
    (*STAGES["grpo"][0], "critic.warmup_steps=0", "critic.optim.adam_epsilon=1e-4"),
    ("ppo/loss", "ppo/grad_norm", "ppo/value_loss", "ppo/critic_grad_norm"),
)
RL = ("grpo", "ppo")
BATCH = 8


def arguments(stage: str, output_dir: Path, start: Path, world: int, *more: str) -> list[str]:
    keys, _ = STAGES[stage]
    size = () if stage in RL else (f"train.per_device_train_batch_size={BATCH // world}",)
    recipe = str(REPO / "recipes" / "tiny" / f"{stage}.yaml")
    model = (f"model.path={start}", "model.preset=null")
    return [stage, recipe, f"output_dir={output_dir}", *COMMON, *keys, *size, *model, *more]


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fresh tiny weights, as SFT makes them."""
    run_dir = tmp_path_factory.mktemp("start")
    recipe = str(REPO / "recipes" / "tiny" / "sft.yaml")
    launch(
        1,
        run_command,
        ["sft", recipe, f"output_dir={run_dir}/sft", "data.max_samples=40", "train.max_steps=1", "on_save=[]"],
    )
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


ADAPTERS = (
    "lora.r=8",
    "lora.lora_alpha=16",
    "lora.target_modules=[q_proj,v_proj,shared_experts.up_proj]",
    "lora.target_parameters=[mlp.experts.gate_up_proj,mlp.experts.down_proj]",
    "optim.adam_epsilon=1e-4",
)
VARIANTS = {
    "full": (),
    "lora": ADAPTERS,
    "accumulated_checkpointed_clipped": (
        "train.gradient_accumulation_steps=2",
        "train.gradient_checkpointing=true",
        "optim.max_grad_norm=0.05",
    ),
    "replayed": ("router.replay=R3", "train.num_epochs=2", "train.gradient_checkpointing=true"),
    # Prompts that wait for a later step, with the routes that one process knows, and a batch that was made ahead.
    "carried": (
        "router.replay=R3",
        "train.max_steps=3",
        "train.off_policy_steps=1",
        "rollout.partial={chunk_tokens: 4, extra_prompts: 4, max_staleness: 3}",
        "rollout_correction.rollout_is=token",
    ),
    # Their statistics are those of a minibatch, whoever holds which part of it.
    "whole_batch": ("algorithm.name=kl_cov", "algorithm.kl_cov_ratio=0.05", "algorithm.clip_ratio_high=0.2"),
    "balanced": ("router.balance_loss_coef=0.1", "router.bias_policy=update"),
}
# test_sharding runs steps of every layout, these are stages as a whole. DOTS_ALIGN_ALL_LAYOUTS=1 runs all, for an hour.
CASES = [
    ("sft", "full", 2, 2),
    ("dpo", "full", 2, 2),
    ("grpo", "full", 2, 2),
    ("sft", "full", 4, 2),
    ("dpo", "full", 4, 2),
    ("grpo", "carried", 4, 2),
    ("sft", "full", 8, 8),
    ("dpo", "full", 8, 2),
    ("grpo", "full", 8, 4),
    ("sft", "lora", 4, 2),
    ("dpo", "lora", 2, 2),
    ("grpo", "lora", 2, 2),
    ("sft", "accumulated_checkpointed_clipped", 2, 2),
    ("dpo", "accumulated_checkpointed_clipped", 2, 2),
    ("grpo", "accumulated_checkpointed_clipped", 2, 1),
    ("grpo", "replayed", 2, 2),
    ("grpo", "whole_batch", 2, 1),
    ("ppo", "full", 2, 2),
    ("reward_model", "lora", 2, 2),
    ("rft", "full", 2, 2),
    ("sft", "balanced", 4, 2),
    ("grpo", "balanced", 4, 2),
]
if os.environ.get("DOTS_ALIGN_ALL_LAYOUTS"):
    CASES = [
        (stage, variant, world, ep)
        for stage in STAGES
        for variant in VARIANTS
        if stage == "grpo" or variant not in ("replayed", "carried", "whole_batch")
        for world in (1, 2, 4, 8)
        for ep in (1, 2, 4, 8)
        if world % ep == 0
    ]


@pytest.mark.parametrize(("stage", "variant", "world", "ep"), CASES)
def test_a_stage_computes_what_one_process_does(stage, variant, world, ep, start, alone, tmp_path):
    keys = [k for k in VARIANTS[variant] if stage not in RL or "accumulation" not in k]
    if (stage, variant) == ("dpo", "lora"):  # on an adapter, which every rank folds into what it keeps of the base
        keys.append(f"model.path={alone('sft', *ADAPTERS, 'seed=1') / 'last'}")

    def measure(seed: str) -> dict[str, float]:
        run_dir, expected = tmp_path / seed / stage, alone(stage, *keys, seed)
        launch(world, run_command, arguments(stage, run_dir, start, world, *keys, seed, f"parallel.ep={ep}"))
        written = ("last/eval.json", "rft/selected.jsonl", "rft/counts.json")
        found = {name: apart(_read(run_dir / name), _read(expected / name)) for name in written}
        return {**found, **differences(run_dir, expected, start, *STAGES[stage][1])}

    assert_equal_with_a_seed(measure)


def _read(path: Path) -> list[Any]:
    text = path.read_text() if path.is_file() else ""
    return [json.loads(text)] if path.suffix == ".json" and text else [json.loads(line) for line in text.splitlines()]


def test_a_run_goes_on_with_other_processes(start, alone, tmp_path):
    """Saved by 4 processes with ep=4, resumed by 2 with ep=2, saved again, resumed by one."""
    keys = ("save.save_steps=1", "train.max_steps=3", "optim.lr_scheduler_type=constant")

    def measure(seed: str) -> dict[str, float]:
        run_dir = tmp_path / seed / "sft"
        for world, ep, last in ((4, 4, 1), (2, 2, 2), (1, 1, 3)):
            launch(world, run_command, arguments("sft", run_dir, start, world, *keys, seed, f"parallel.ep={ep}"))
            for later in range(last + 1, 4):
                shutil.rmtree(run_dir / f"checkpoint-{later}")
        return differences(run_dir, alone("sft", *keys, seed), start, "sft/loss", "sft/grad_norm")

    assert_equal_with_a_seed(measure)


def test_hooks_of_adapters_on_several_processes(start: Path, tmp_path: Path) -> None:
    """Evaluated by all of the trainer's processes and by one beside them: the same. Others fail in every way."""
    run_dir, hooks = tmp_path / "sft", tmp_path / "hooks.py"
    hooks.write_text(
        "import os, time\n\n\ndef hang(checkpoint, recipe):\n    time.sleep(600)\n\n\n"
        "def killed(checkpoint, recipe):\n    os.kill(os.getpid(), 9)\n"
    )
    failing = f"{{hook: '{hooks}:hang', in: trainer, timeout_seconds: 1}}, '{hooks}:killed'"
    asked = f"on_save=[evaluate, {failing}, {{hook: evaluate, in: process}}]"
    for name in ("lambada/a.jsonl", "c3/dev.jsonl"):
        (tmp_path / name).parent.mkdir()
        rows = (
            {"text": f"{n} and {n}", "context": f"{n}", "question": "?", "choice": ["a", "ab"], "answer": "a"}
            for n in range(5)
        )
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = f"evaluation.tasks={{names: [lambada, c3], data: {tmp_path}}}"
    quick = ("train.max_steps=1", "evaluation.num_prompts=5", "evaluation.max_tokens=4", "parallel.ep=2", asked, tasks)
    launch(2, run_command, arguments("sft", run_dir, start, 2, *ADAPTERS, *quick))
    found = {line["hook"]: line for line in map(json.loads, (run_dir / "hooks.jsonl").read_text().splitlines())}
    assert {name: line["status"] for name, line in found.items()} == {
        "evaluate": "done",
        "hang": "timed_out",
        "killed": "killed",
        "evaluate_4": "done",
    }
    assert found["evaluate"]["metrics"] == found["evaluate_4"]["metrics"]
    model, tokenizer = load_model(ModelSection(path=str(run_dir / "last")))
    alone = run_suite(model, tokenizer, Suite(("lambada", "c3"), tmp_path), "merged", tmp_path / "alone")
    spread = json.loads((run_dir / "last" / "eval.json").read_text())["tasks"]
    assert spread["lambada"]["loss"] == pytest.approx(alone["lambada"]["metrics"]["loss"], rel=1e-4)
    assert spread["c3"] == alone["c3"]["metrics"]
    check_whole(run_dir / "last")
