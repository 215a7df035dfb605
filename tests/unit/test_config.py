"""Recipes: what loads, and what a person is told about what does not."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from dots_align.config import (
    RECIPES,
    AlgorithmName,
    AlgorithmSection,
    RewardSection,
    load_recipe,
    recipe_dict,
    recipe_differences,
    reward_names,
)

ROOT = Path(__file__).resolve().parents[2]
# Folders under recipes/ whose files belong to other programs.
FOREIGN = {"accelerate"}
SHIPPED = [p for p in sorted((ROOT / "recipes").rglob("*.yaml")) if not FOREIGN & set(p.parts)]

GRPO = """\
stage: grpo
output_dir: out
data:
  path: synthetic:prompts
rewards:
  - function: a:b
optim:
  learning_rate: 1.0e-4
"""
PARTIAL = ("rollout_correction.rollout_is=token", "rollout.partial={chunk_tokens: 8, extra_prompts: 4}")
PIPELINE = """\
stage: pipeline
output_dir: out
stages:
  - recipe: recipes/tiny/sft.yaml
  - recipe: recipes/tiny/grpo.yaml
    overrides: [train.max_steps=3]
"""


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def complaint(path: Path, *overrides: str, stage: str | None = None) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers look at the message
        load_recipe(path, overrides, stage)
    return str(caught.value)


def line_of(text: str, needle: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), start=1) if needle in line)


@pytest.mark.parametrize("path", SHIPPED, ids=[str(p.relative_to(ROOT)) for p in SHIPPED])
def test_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.stage == yaml.safe_load(path.read_text(encoding="utf-8"))["stage"]
    for stage in getattr(recipe, "stages", ()):
        assert load_recipe(ROOT / stage.recipe, stage.overrides).stage in RECIPES


def test_there_is_a_tiny_recipe_for_every_stage() -> None:
    stages = {load_recipe(p).stage for p in SHIPPED if p.parent.name == "tiny"}
    assert stages == set(RECIPES)


def test_defaults_are_filled_in_and_values_typed(write) -> None:
    recipe = load_recipe(write(GRPO))
    assert recipe.rewards[0].weight == 1.0
    assert recipe.rollout.group_size == 8
    assert recipe.optim.learning_rate == 1e-4
    plain = recipe_dict(recipe)
    assert json.loads(json.dumps(plain)) == plain
    assert load_recipe(write(yaml.safe_dump(plain))) == recipe


def test_a_recipe_cannot_be_changed_after_loading(write) -> None:
    recipe = load_recipe(write(GRPO))
    with pytest.raises(ValueError, match="frozen"):
        recipe.optim.learning_rate = 1.0


@pytest.mark.parametrize(
    ("added", "needle", "key", "nearest"),
    [
        ("modle:\n  preset: tiny\n", "modle", "modle", "model"),
        ("rollout:\n  group_sise: 4\n", "group_sise", "rollout.group_sise", "rollout.group_size"),
        ("learning_rate: 1.0\n", "learning_rate: 1.0\n", "learning_rate", "optim.learning_rate"),
        ("algorithm: {clip_ratio: 0.2}\n", "clip_ratio", "algorithm.clip_ratio", "algorithm.clip_ratio"),
    ],
)
def test_unknown_key_names_the_line_and_the_nearest(write, added: str, needle: str, key: str, nearest: str) -> None:
    path = write(GRPO + added)
    told = complaint(path)
    line = len(GRPO.splitlines()) + line_of(added, needle.strip())
    assert told.startswith(f"{path}:{line}: unknown key `{key}`; did you mean `{nearest}")


def test_unknown_key_in_a_list_item(write) -> None:
    text = GRPO.replace("a:b\n", "a:b\n    wieght: 2\n")
    path = write(text)
    first = complaint(path).splitlines()[0]
    assert first == (
        f"{path}:{line_of(text, 'wieght')}: unknown key `rewards.0.wieght`; did you mean `rewards.0.weight`?"
    )


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("lr=1", "optim.learning_rate"),
        ("epochs=1", "train.num_train_epochs"),
        ("optim.lr=1", "optim.learning_rate"),
        ("train.batch_size=4", "train.per_device_train_batch_size"),
        ("num_epochs=2", "train.num_train_epochs"),
        ("rank=8", "lora.r"),
        ("lora.rank=8", "lora.r"),
        ("trian.max_steps=1", "train"),
    ],
)
def test_other_programs_names_lead_to_ours(override: str, nearest: str) -> None:
    told = complaint(ROOT / "recipes" / "tiny" / "sft.yaml", override)
    assert told == f"override {override!r}: unknown key `{override.partition('=')[0].removesuffix('.max_steps')}`; " + (
        f"did you mean `{nearest}`?"
    )


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("rewards=a:b", "`rewards`: has to be a list, such as [a, b], found 'a:b'"),
        ("algorithm=gspo", "`algorithm`: has to be a group of keys, such as algorithm.name=…, found 'gspo'"),
        ("algorithm.name=gsp", "did you mean 'gspo'?"),
    ],
)
def test_values_of_another_shape(write, override: str, told: str) -> None:
    message = complaint(write(GRPO), override)
    assert message.startswith(f"override {override!r}: ")
    assert told in message


def test_a_recipe_in_no_text_encoding(write) -> None:
    path = write("")
    path.write_bytes(b"\xff\xfes\x00")
    assert complaint(path).startswith(f"{path}: not UTF-8")


def test_a_recipe_that_is_not_there_names_the_nearest(write, tmp_path: Path) -> None:
    path = write(GRPO)
    assert complaint(tmp_path / "recpie.yaml").endswith(f"did you mean {path}?")
    assert complaint(tmp_path).startswith(f"{tmp_path}: this is a directory")


def test_a_pipeline_finds_its_stages_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = load_recipe(Path("recipes/tiny/pipeline.yaml"))
    assert here.stages[0].recipe == "recipes/tiny/sft.yaml"
    monkeypatch.chdir(tmp_path)
    away = load_recipe(ROOT / "recipes" / "tiny" / "pipeline.yaml")
    assert [stage.recipe for stage in away.stages] == [str(ROOT / stage.recipe) for stage in here.stages]


def test_unknown_key_in_a_list_item_is_one_complaint(write) -> None:
    told = complaint(write(GRPO.replace("a:b\n", "a:b\n    wieght: 2\n")))
    assert len(told.splitlines()) == 1


def test_unknown_key_like_no_other_lists_its_neighbours(write) -> None:
    told = complaint(write(GRPO + "logging:\n  qqqq: 1\n"))
    assert "keys here are logging_steps" in told


def test_wrong_type_and_range_show_what_was_found(write) -> None:
    text = GRPO + "train:\n  max_steps: many\n  num_minibatches: 0\n"
    path = write(text)
    lines = complaint(path).splitlines()
    assert len(lines) == 2  # everything that is wrong at once
    assert lines[0].startswith(f"{path}:{line_of(text, 'max_steps')}: `train.max_steps`")
    assert "'many'" in lines[0]
    assert lines[1].startswith(f"{path}:{line_of(text, 'num_minibatches')}: `train.num_minibatches`")
    assert lines[1].endswith("found 0")


def test_wrong_choice_lists_the_choices(write) -> None:
    told = complaint(write(GRPO + "algorithm: {policy_loss: vanila}\n"))
    assert "`algorithm.policy_loss`" in told
    assert "'vanilla'" in told


def test_a_section_given_twice_is_refused(write) -> None:
    assert "train" in complaint(write(GRPO + "train: {max_steps: 3}\nlogging: {}\ntrain: {num_epochs: 2}\n"))


def test_an_unknown_dpo_loss_is_refused(write) -> None:
    text = "stage: dpo\noutput_dir: out\ndata: {path: synthetic:preference}\nloss_type: [sigmod]\n"
    assert "sigmod" in complaint(write(text))


def test_missing_keys_say_how_to_give_them(write) -> None:
    path = write("stage: grpo\noutput_dir: out\n")
    lines = complaint(path).splitlines()
    assert [line.split("`")[1] for line in lines] == ["data", "rewards"]
    assert "data=…" in lines[0]


@pytest.mark.parametrize(("text", "line"), [("stage: sft\noptim: {a: 1\nseed: 2\n", 3), ("stage: sft\n\tseed: 3\n", 2)])
def test_broken_yaml_names_the_line(write, text: str, line: int) -> None:
    path = write(text)
    assert complaint(path).startswith(f"{path}:{line}: not valid YAML")


@pytest.mark.parametrize(("text", "found"), [("", "NoneType"), ("- a\n- b\n", "list"), ("hello\n", "str")])
def test_a_file_that_is_no_mapping(write, text: str, found: str) -> None:
    assert complaint(write(text)).endswith(f"found {found}")


def test_no_such_file(tmp_path: Path) -> None:
    assert "no such recipe file" in complaint(tmp_path / "none.yaml")


def test_unknown_stage_lists_the_stages(write) -> None:
    path = write("stage: gpro\n")
    assert (
        complaint(path)
        == f"{path}:1: `stage` must be one of sft, dpo, rft, reward_model, grpo, ppo, eval, pipeline, release, "
        "found 'gpro'"
    )


def test_recipe_of_another_stage_says_what_to_run(write) -> None:
    path = write(GRPO)
    assert complaint(path, stage="sft") == (f"{path}: this is a recipe for stage 'grpo'; run `dots-align grpo {path}`")


def test_overrides_nested_list_index_null_and_new_section(write) -> None:
    recipe = load_recipe(
        write(GRPO + "save: {save_steps: 5}\n"),
        [
            "optim.learning_rate=2e-6",
            "rewards.0.weight=0.5",
            "save.save_steps=null",
            "train.max_steps=7",
            "data.system_prompt=a=b",
            "trackers=[tensorboard]",
        ],
    )
    assert recipe.optim.learning_rate == 2e-6
    assert (recipe.rewards[0].function, recipe.rewards[0].weight) == ("a:b", 0.5)
    assert recipe.save.save_steps is None
    assert recipe.train.max_steps == 7
    assert recipe.data.system_prompt == "a=b"
    assert recipe.trackers == ("tensorboard",)


def test_the_last_override_wins(write) -> None:
    assert load_recipe(write(GRPO), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["novalue", "=3", "optim.learning_rate"])
def test_override_without_a_key_or_value(write, override: str) -> None:
    assert complaint(write(GRPO), override).startswith(f"override {override!r}: write key=value")


def test_complaints_about_overrides_name_the_override(write) -> None:
    told = complaint(write(GRPO), "optim.learning_rat=1", "train.max_steps=0")
    assert (
        "override 'optim.learning_rat=1': unknown key `optim.learning_rat`; did you mean `optim.learning_rate`" in told
    )
    assert "override 'train.max_steps=0': `train.max_steps`" in told


def test_override_outside_a_list(write) -> None:
    assert complaint(write(GRPO), "rewards.3.weight=1") == (
        "override 'rewards.3.weight=1': rewards is a list of 1; '3' is not in it"
    )


@pytest.mark.parametrize(
    "override",
    [
        "rewards.3=1",
        "rewards.x=1",
    ],
)
def test_override_of_a_whole_item_outside_a_list(write, override: str) -> None:
    assert complaint(write(GRPO), override).startswith(f"override {override!r}")


def test_pipeline_overrides_go_to_their_stage(write) -> None:
    recipe = load_recipe(write(PIPELINE), ["grpo.rollout.top_k=5", "sft.seed=3", "start_from=best"])
    assert recipe.stages[0].overrides == ("seed=3",)
    assert recipe.stages[1].overrides == ("train.max_steps=3", "rollout.top_k=5")
    assert recipe.start_from == "best"
    stage = load_recipe(ROOT / recipe.stages[1].recipe, recipe.stages[1].overrides)
    assert (stage.train.max_steps, stage.rollout.top_k) == (3, 5)


def test_pipeline_override_for_no_stage_lists_the_stages(write) -> None:
    assert complaint(write(PIPELINE), "gpro.seed=1") == (
        "override 'gpro.seed=1': no stage 'gpro' in this pipeline; there are sft, grpo"
    )


def test_evaluate_without_an_evaluation_section(write) -> None:
    assert "no `evaluation:` section" in complaint(write(GRPO + "on_save: [evaluate]\n"))


def test_path_and_preset_exclude_each_other(write) -> None:
    path = write(GRPO + "model: {preset: tiny}\n")
    assert "exclude each other" in complaint(path, "model.path=somewhere")
    assert load_recipe(path, ["model.path=somewhere", "model.preset=null"]).model.path == "somewhere"


def test_a_vllm_back_end_needs_its_server_and_a_whole_model(write) -> None:
    path = write(GRPO)
    assert "go together; give both or none" in complaint(path, "rollout.backend=vllm")
    assert "go together; give both or none" in complaint(path, "rollout.vllm.base_url=http://localhost:8000")
    both = ["rollout.backend=vllm", "rollout.vllm.base_url=http://localhost:8000"]
    assert load_recipe(path, both).rollout.vllm.group_port == 51216
    assert "lora trains an adapter; use rollout.backend=local" in complaint(path, *both, "lora.r=4")
    assert "`rollout.vllm.base_url`: string should match" in complaint(path, *both, "rollout.vllm.base_url=localhost")


def test_recipe_differences_are_dotted_and_show_both_values(write) -> None:
    def plain(*overrides: str) -> dict[str, Any]:
        return recipe_dict(load_recipe(write(GRPO), overrides))

    assert recipe_differences(plain(), plain()) == []
    assert recipe_differences(plain(), plain("optim.learning_rate=2e-4", "data.system_prompt=你好", "seed=1")) == [
        'data.system_prompt: null -> "你好"',
        "optim.learning_rate: 0.0001 -> 0.0002",
        "seed: 0 -> 1",
    ]
    assert recipe_differences({"a": 1}, {"b": {"c": 2}}) == ["a: 1 -> null", 'b: null -> {"c": 2}']


def test_reading_a_recipe_imports_no_heavy_library() -> None:
    """`dots-align --help` and a typo in a recipe answer at once."""
    code = (
        "import sys, dots_align.config, dots_align.types, dots_align.cli\n"
        "print([m for m in ('torch', 'transformers', 'numpy', 'trl', 'verl', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Algorithm -> what it is known by: estimator, loss, clip range, aggregation.
KNOWN_BY = {
    "grpo": ("grpo", "vanilla", 0.2, 0.2, "seq-mean-token-mean"),
    "dr_grpo": ("grpo", "vanilla", 0.2, 0.2, "seq-mean-token-sum-norm"),
    "dapo": ("grpo", "vanilla", 0.2, 0.28, "token-mean"),
    "gspo": ("grpo", "gspo", 3e-4, 4e-4, "seq-mean-token-mean"),
    "cispo": ("grpo", "cispo", 10.0, 0.2, "token-mean"),
    "sapo": ("grpo", "sapo", 0.2, 0.2, "seq-mean-token-mean"),
    "gmpo": ("grpo", "geo_mean", 0.4, 0.4, "seq-mean-token-mean"),
    "clip_cov": ("grpo", "clip_cov", 0.2, 0.2, "token-mean"),
    "kl_cov": ("grpo", "kl_cov", 0.2, 0.2, "token-mean"),
    "rloo": ("rloo", "vanilla", 0.2, 0.2, "token-mean"),
    "reinforce_plus_plus": ("reinforce_plus_plus", "vanilla", 0.2, 0.2, "token-mean"),
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", "vanilla", 0.2, 0.2, "token-mean"),
    "remax": ("remax", "vanilla", 0.2, 0.2, "token-mean"),
    "gpg": ("gpg", "gpg", 0.2, 0.2, "token-mean"),
    "opo": ("opo", "vanilla", 0.2, 0.2, "token-mean"),
    "grpo_passk": ("grpo_passk", "vanilla", 0.2, 0.2, "token-mean"),
    "ppo": ("gae", "vanilla", 0.2, 0.2, "token-mean"),
}


@pytest.mark.parametrize("name", get_args(AlgorithmName))
def test_an_algorithm_by_name(name: str) -> None:
    found = AlgorithmSection(name=name)  # pyright: ignore[reportArgumentType]
    shape = found.advantage_estimator, found.policy_loss, found.clip_ratio_low, found.clip_ratio_high
    assert (*shape, found.loss_agg_mode) == KNOWN_BY[name]
    assert found.norm_adv_by_std == (name != "dr_grpo")
    assert (found.max_refill_rounds > 0) == (found.overlong_buffer > 0) == (name == "dapo")
    assert found.kl_coef == 0
    assert AlgorithmSection.model_validate(found.model_dump()) == found


def test_keys_of_the_recipe_win_over_the_algorithms(write) -> None:
    recipe = load_recipe(write(GRPO + "algorithm: {name: dapo, clip_ratio_high: 0.3}\n"), ["algorithm.kl_coef=0.1"])
    algorithm = recipe.algorithm
    assert (algorithm.clip_ratio_high, algorithm.kl_coef, algorithm.loss_agg_mode) == (0.3, 0.1, "token-mean")
    other = load_recipe(write(GRPO), ["algorithm.name=gspo", "algorithm.advantage_estimator=rloo"]).algorithm
    assert (other.advantage_estimator, other.policy_loss, other.clip_ratio_high) == ("rloo", "gspo", 4e-4)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["algorithm.name=gspo", "algorithm.clip_ratio_low=0.2"], "algorithm.name=gspo brings the range that fits"),
        (["algorithm.policy_loss=gspo"], "clips nothing at 0.2/0.2"),
        (["algorithm.tau_pos=2"], "algorithm.tau_pos=2.0 has no effect with algorithm.policy_loss=vanilla"),
        (["algorithm.name=gpg", "algorithm.clip_ratio_high=0.3"], "has no effect with algorithm.policy_loss=gpg"),
        (["algorithm.name=rloo", "algorithm.norm_adv_by_std=false"], "no effect with algorithm.advantage_estimator"),
        (["algorithm.name=gmpo", "algorithm.loss_agg_mode=token-mean"], "is a mean over sequences"),
        (["algorithm.kl_controller=adaptive"], "starts from algorithm.kl_coef, which is 0"),
        (["algorithm.name=clip_cov", "algorithm.clip_cov_lb=6"], "has to lie below clip_cov_ub=5"),
        (["algorithm.name=ppo"], "make it a recipe of stage `ppo`"),
        (["rollout.group_size=1"], "compares the answers to a prompt"),
        (["algorithm.name=gpg", "train.num_epochs=2"], "needs train.num_minibatches=1 and train.num_epochs=1"),
        (["rollout_correction.rollout_rs=[token_k1]"], "0 entries for 1 rollout_rs"),
        (
            ["rollout_correction.rollout_rs=[token_k1]", "rollout_correction.rollout_rs_threshold=[2]"],
            "k1 takes `lower_upper`",
        ),
        (["rollout_correction.rollout_is_threshold=0.5_2"], "YAML reads 0.5_2 as 0.52"),
        (["rollout_correction.rollout_is_threshold=2.0_0.5"], "is no threshold"),
        (["router.replay=R4"], "`router.replay`"),
        (["train.off_policy_steps=1"], "give rollout_correction.rollout_is=token"),
        (["rollout.partial={chunk_tokens: 8, extra_prompts: 4}"], "give rollout_correction.rollout_is=token"),
        ([*PARTIAL, "rollout.partial.extra_prompts=33"], "nobody could keep to max_staleness"),
        ([*PARTIAL, "train.off_policy_steps=1", "rollout.partial.max_staleness=1"], "give at least 2"),
        ([*PARTIAL, "environment=a:B"], "an environment's state cannot be"),
        (["environment=a:B", "algorithm.name=remax"], "=remax knows no turns"),
        (["environment=a:B", "rewards.0.name=environment"], "as the environment's own"),
        (["environment=a:B", "rollout.backend=vllm", "rollout.vllm.base_url=http://here:1"], "has spoken; use local"),
        ([*PARTIAL, "rollout.backend=vllm", "rollout.vllm.base_url=http://here:1"], "cannot; use local"),
    ],
)
def test_what_contradicts_itself_is_refused(write, overrides: list[str], told: str) -> None:
    assert told in complaint(write(GRPO), *overrides)


def test_ppo_has_its_algorithm_without_being_told(write) -> None:
    text = GRPO.replace("stage: grpo", "stage: ppo")
    assert load_recipe(write(text)).algorithm.advantage_estimator == "gae"
    assert load_recipe(write(text), ["algorithm.lam=0.9"]).algorithm.lam == 0.9
    assert "has no use for a critic" in complaint(write(text), "algorithm.name=rloo")
    assert "leaves the policy none of the 5" in complaint(write(text), "critic.warmup_steps=5", "train.max_steps=5")


def test_replay_is_for_rl_alone(write) -> None:
    text = GRPO.replace("stage: grpo", "stage: sft").replace("rewards:\n  - function: a:b\n", "")
    assert "unknown key `router.replay`" in complaint(write(text), "router.replay=R3")


GATED = """
stage: grpo
output_dir: runs/g
data: {path: p.jsonl}
rewards:
  - function: a.b:right
  - function: a.b:short
    weight: 0.1
    gate: {reward: right, at_least: 1.0}
  - {function: x.py:right, name: other, arguments: {n: 4}, timeout_seconds: 2, run_in: trainer}
scoring: {num_workers: 3}
"""


def test_rewards_have_names_gates_and_arguments(write) -> None:
    recipe = load_recipe(write(GATED))
    assert reward_names(recipe.rewards) == ["right", "short", "other"]
    assert recipe.rewards[1].gate.at_least == 1.0
    assert recipe.rewards[2].arguments == {"n": 4}
    assert (recipe.scoring.num_workers, recipe.rewards[0].run_in) == (3, "worker")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["rewards.1.gate.reward=wrong"], "names `wrong`, which is no other reward; there are right, other"),
        (["rewards.1.gate.reward=short"], "names `short`, which is no other reward"),
        (["rewards.1.name=same", "rewards.2.name=same"], "two rewards are called `same`"),
        (["rewards.1.gate.at_most=1"], "unknown key `rewards.1.gate.at_most`"),
        (["rewards.0.timeout_seconds=0"], "greater than 0"),
    ],
)
def test_a_gate_that_leads_nowhere_is_refused(write, overrides: list[str], told: str) -> None:
    assert told in complaint(write(GATED), *overrides)


def test_functions_called_alike_have_their_full_names() -> None:
    alike = [RewardSection(function="a:f"), RewardSection(function="b:f")]
    assert reward_names(alike) == ["a:f", "b:f"]


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["optim.min_learning_rate=1.0", "optim.learning_rate=1e-3"], "lies above optim.learning_rate=0.001"),
        (["optim.min_learning_rate=1e-6", "optim.lr_scheduler_type=linear"], "linear has no such place"),
    ],
)
def test_a_floor_that_no_schedule_reaches_is_refused(overrides: list[str], told: str) -> None:
    assert told in complaint(ROOT / "recipes" / "tiny" / "sft.yaml", *overrides)


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["selection.pass_rate_bins=[0.5, 0.9]"], "have to rise from above 0 to 1"),
        (["mix.ratio=0"], "greater than 0"),
        (["rollout.backend=vllm", "rollout.vllm.base_url=http://a:1"], "stage `rft` samples with the local engine"),
        (["rollout.partial={chunk_tokens: 8, extra_prompts: 2}"], "rollout.partial has no effect in stage `rft`"),
        (["rewards=[]"], "`rewards`"),
    ],
)
def test_a_selection_that_cannot_be_is_refused(overrides: list[str], told: str) -> None:
    assert told in complaint(ROOT / "recipes" / "tiny" / "rft.yaml", *overrides)


def test_the_published_recipe_is_what_the_report_says(monkeypatch: pytest.MonkeyPatch) -> None:
    from dots_align.stages.pipeline import plan

    monkeypatch.chdir(ROOT)
    sft, rft = plan(load_recipe("recipes/dots_llm1/published_sft_then_rft.yaml"))
    assert (sft.stage, rft.stage) == ("sft", "rft")
    for stage in (sft, rft):
        assert (stage.optim.learning_rate, stage.optim.schedule) == (5e-6, ("cosine_with_min_lr", {"min_lr": 1e-6}))
        assert stage.train.num_train_epochs == 2
        assert stage.train.sessions_per_sample > 1
    assert rft.rewards[0].function == "reward_models.math:boxed_answer"
