"""Every recipe key, typed. A recipe loads completely or not at all; this file imports no torch.

A recipe is a YAML file for one stage. `key=value` overrides use dotted keys (`optim.learning_rate=2e-6`) and YAML
values. Where a key means the same as in TRL or transformers, it has the name it has there.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator


class Section(BaseModel):
    """A group of keys: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelSection(Section):
    """Where the weights come from: a checkpoint directory (`path`) or fresh weights of a `preset`."""

    path: str | None = None
    preset: Literal["tiny", "small"] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attn_implementation: Literal["packed", "sdpa", "eager", "flash_attention_2"] = "packed"
    experts_implementation: Literal["grouped", "grouped_mm", "batched_mm", "eager"] = Field(
        default="grouped", description="grouped: ours, the one that runs in parallel; the others are transformers' own"
    )


class RouterSection(Section):
    """What training does to the routing of tokens to experts."""

    bias_policy: Literal["frozen", "track", "update"] = Field(
        default="frozen",
        description="of e_score_correction_bias: left alone; left alone, the update it would get logged; or moved by "
        "bias_update_rate against each expert's load after every optimizer step (aux-loss-free balancing)",
    )
    bias_update_rate: float = Field(default=1e-3, gt=0)
    balance_loss_coef: float = Field(default=0.0, ge=0, description="weight of the sequence-wise balance loss")


class ParallelSection(Section):
    """How the model is spread over the processes of a launch.

    Everything is sharded over all processes (FSDP2); the routed experts are first split over `ep` of them, which are
    consecutive ranks and so lie inside a node.
    """

    backend: Literal["fsdp", "deepspeed"] = "fsdp"
    ep: int = Field(default=1, ge=1, description="processes that share one set of routed experts")
    dp_replicate: int = Field(default=1, ge=1, description="copies of the sharded model (HSDP), for several nodes")
    reshard_after_forward: bool = Field(default=True, description="false keeps gathered layers until backward")
    offload_optimizer: bool = Field(default=False, description="AdamW's states and fp32 masters in host memory")
    zero_stage: Literal[2, 3] = Field(default=3, description="of DeepSpeed")
    timeout_minutes: float = Field(default=10.0, gt=0, description="a process that waits longer for another one ends")


class DataSection(Section):
    """Where records come from.

    `path` is a JSONL or Parquet file, or `synthetic:sft`, `synthetic:preference`, `synthetic:prompts`,
    `synthetic:heldout`. Records hold `messages_field` (a list of {role, content}), or `prompt_field` with
    `response_field` (SFT), `chosen_field` and `rejected_field` (DPO) or `answer_field` (RL and evaluation): one field,
    or a list of those that a reward function needs, which it gets as a JSON object.
    """

    path: str
    messages_field: str = "messages"
    prompt_field: str = "prompt"
    response_field: str = "response"
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    answer_field: str | tuple[str, ...] = "answer"
    system_prompt: str | None = None
    max_samples: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, description="of the synthetic generator; the recipe's seed if not given")


class OptimSection(Section):
    """AdamW and its schedule."""

    learning_rate: float = Field(default=1e-5, gt=0)
    lr_scheduler_type: Literal["constant", "constant_with_warmup", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0)
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class TrainSection(Section):
    """How long and in what batches SFT and DPO train. `max_steps`, where given, wins over `num_train_epochs`."""

    num_train_epochs: float = Field(default=1.0, gt=0)
    max_steps: int | None = Field(default=None, ge=1)
    per_device_train_batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=1, ge=1)
    max_length: int = Field(
        default=1024, ge=8, description="tokens of a training sequence; longer ones are cut at the end"
    )
    packing: bool = True
    bf16: bool = False
    gradient_checkpointing: bool = False


class LoraSection(Section):
    """A LoRA adapter (PEFT). `target_modules` are suffixes of the names of linear layers (`q_proj`,
    `shared_experts.up_proj`), `target_parameters` those of the routed experts' weights (`mlp.experts.down_proj`).
    """

    r: int = Field(default=16, ge=1)
    lora_alpha: int = Field(default=32, ge=1)
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)
    target_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    target_parameters: tuple[str, ...] = ()


class SaveSection(Section):
    """When checkpoints are published, and how many are kept (`best` and the newest always are)."""

    save_steps: int | None = Field(default=None, ge=1, description="also at the end; null: only at the end")
    save_total_limit: int | None = Field(default=None, ge=1)


class LoggingSection(Section):
    logging_steps: int = Field(default=1, ge=1)
    report_to: tuple[Literal["tensorboard"], ...] = ()


class EvaluationSection(Section):
    """Greedy answers to held-out prompts, scored by a reward function; `exact_match` is the share scored at least 1."""

    data: DataSection
    scorer: str = "reward_models.math:boxed_answer"
    num_prompts: int = Field(default=200, ge=1)
    max_tokens: int = Field(default=128, ge=1)
    num_samples_shown: int = Field(default=20, ge=0)


class RewardSection(Section):
    """A reward function, `module:function` or `path/to/file.py:function`, and its weight in the sum."""

    function: str
    weight: float = 1.0


class VllmSection(Section):
    """A vLLM server that generates in the local engine's place; TRL's client talks to it."""

    base_url: str = Field(pattern=r"^https?://", description="of the server, such as http://10.0.0.2:8000")
    group_port: int = Field(default=51216, ge=1, le=65535, description="on which weights are sent from here")
    connection_timeout: float = Field(default=120.0, ge=0, description="seconds to wait for the server to be up")
    max_concurrent_requests: int = Field(default=64, ge=1)


class RolloutSection(Section):
    """How the policy is sampled."""

    backend: Literal["local", "vllm"] = Field(default="local", description="local: our engine, on the same weights")
    vllm: VllmSection | None = None
    group_size: int = Field(default=8, ge=2)
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0, lt=1)
    max_tokens: int = Field(default=128, ge=1)
    max_num_sequences: int = Field(default=256, ge=1, description="sequences that decode at once in a process")
    kv_cache_gib: float | None = Field(
        default=None,
        gt=0,
        description="most memory of a process for keys and values; by default half of what is free",
    )
    prefill_chunk_tokens: int = Field(default=8192, ge=1, description="most prompt tokens of one forward")


AdvantageEstimator = Literal[
    "grpo", "rloo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "opo", "grpo_passk", "gpg"
]
# verl's clip_cov, kl_cov and geo_mean take statistics of the micro-batch: cutting a batch would change the result.
PolicyLoss = Literal["vanilla", "gspo", "sapo", "cispo", "gpg"]
LossAggregation = Literal[
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]


class AlgorithmSection(Section):
    """The objective. Estimators and losses are verl's registered functions, by their names there."""

    advantage_estimator: AdvantageEstimator = "grpo"
    norm_adv_by_std: bool = True
    policy_loss: PolicyLoss = "vanilla"
    clip_ratio_low: float = Field(default=0.2, gt=0)
    clip_ratio_high: float = Field(default=0.2, gt=0)
    loss_agg_mode: LossAggregation = "token-mean"
    kl_coef: float = Field(
        default=0.0, ge=0, description="weight of the KL term in the loss; 0 needs no reference model"
    )
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"


class RlTrainSection(Section):
    """How long and in what batches the RL loop trains."""

    max_steps: int = Field(default=100, ge=1)
    num_prompts_per_step: int = Field(default=32, ge=1)
    num_minibatches: int = Field(default=1, ge=1, description="optimizer updates per rollout")
    num_epochs: int = Field(default=1, ge=1, description="passes over each rollout")
    micro_batch_tokens: int = Field(
        default=8192, ge=1, description="most tokens of one forward; never changes a number"
    )
    bf16: bool = False
    gradient_checkpointing: bool = False


class _Recipe(Section):
    output_dir: str
    seed: int = Field(default=0, ge=0)
    overwrite: bool = Field(default=False, description="delete what another run left in output_dir")


class _StageRecipe(_Recipe):
    model: ModelSection = ModelSection()
    router: RouterSection = RouterSection()
    parallel: ParallelSection = ParallelSection()
    data: DataSection
    optim: OptimSection = OptimSection()
    save: SaveSection = SaveSection()
    logging: LoggingSection = LoggingSection()
    on_save: tuple[str, ...] = Field(
        default=(), description="`evaluate`, or `module:function` taking (checkpoint_dir, recipe)"
    )
    evaluation: EvaluationSection | None = None

    @model_validator(mode="after")
    def _consistent(self):
        if "evaluate" in self.on_save and self.evaluation is None:
            raise ValueError("on_save names `evaluate`, but the recipe has no `evaluation:` section; add one")
        if self.model.path is not None and self.model.preset is not None:
            raise ValueError("model.path and model.preset exclude each other; set one of them to null")
        if getattr(self, "lora", None) is not None and self.router.bias_policy == "update":
            raise ValueError(
                "router.bias_policy=update moves a bias of the base model, which an adapter's checkpoint does not "
                "hold; use frozen or track with lora"
            )
        return self


class SftRecipe(_StageRecipe):
    """Supervised fine-tuning on conversations; loss on the assistant's tokens only."""

    stage: Literal["sft"]
    train: TrainSection = TrainSection()
    lora: LoraSection | None = None


DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
]


class DpoRecipe(_StageRecipe):
    """Direct preference optimisation. `loss_type` and `loss_weights` are TRL's; `beta` is the strength of the KL
    anchor.
    """

    stage: Literal["dpo"]
    train: TrainSection = TrainSection()
    lora: LoraSection | None = None
    beta: float = Field(default=0.1, gt=0)
    loss_type: tuple[DpoLoss, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None

    @model_validator(mode="after")
    def _one_weight_each(self):
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"loss_weights has {len(self.loss_weights)} entries for {len(self.loss_type)} loss_type; give one each"
            )
        return self


class GrpoRecipe(_StageRecipe):
    """Reinforcement learning from verifiable rewards, by the GRPO family."""

    stage: Literal["grpo"]
    train: RlTrainSection = RlTrainSection()
    lora: LoraSection | None = None
    rollout: RolloutSection = RolloutSection()
    algorithm: AlgorithmSection = AlgorithmSection()
    rewards: tuple[RewardSection, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _vllm_can_serve(self):
        if (self.rollout.backend == "vllm") != (self.rollout.vllm is not None):
            raise ValueError(
                "rollout.backend=vllm and a `rollout.vllm:` section with its base_url go together; give both or none"
            )
        if self.rollout.backend == "vllm" and self.lora is not None:
            raise ValueError(
                "rollout.backend=vllm takes whole models, and lora trains an adapter; use rollout.backend=local"
            )
        return self


class EvalRecipe(Section):
    """Evaluation of one checkpoint, outside training."""

    stage: Literal["eval"]
    seed: int = 0
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection
    output: str | None = Field(default=None, description="file for the result; <checkpoint>/eval.json if not given")


class PipelineStage(Section):
    """One step of a pipeline: a recipe file, and `key=value` overrides to it."""

    recipe: str
    overrides: tuple[str, ...] = ()


class PipelineRecipe(_Recipe):
    """Stages in order, each starting from the checkpoint of the one before; then export and report."""

    stage: Literal["pipeline"]
    stages: tuple[PipelineStage, ...] = Field(min_length=1)
    start_from: Literal["last", "best"] = Field(
        default="last", description="which checkpoint of a stage the next one starts from"
    )
    export: bool = True


Recipe = Annotated[SftRecipe | DpoRecipe | GrpoRecipe | EvalRecipe | PipelineRecipe, Field(discriminator="stage")]
RECIPES: dict[str, type[Section]] = {
    get_args(cls.model_fields["stage"].annotation)[0]: cls
    for cls in (SftRecipe, DpoRecipe, GrpoRecipe, EvalRecipe, PipelineRecipe)
}


def load_recipe(path: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Any:
    """Reads a recipe file, applies `key=value` overrides and validates every key.

    Args:
        path: the YAML file.
        overrides: like `optim.learning_rate=1e-5`; values are YAML, `key=null` unsets.
        stage: the stage the caller is about to run; a recipe of another stage is refused.

    Raises:
        ValueError: one line for each thing that is wrong, with file, line or override, key, and what to do.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe file; the recipes that come with dots_align are under recipes/")
    text = path.read_text(encoding="utf-8")
    try:
        values = yaml.safe_load(text)
        lines = _key_lines(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ValueError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: a recipe is a mapping of keys, found {type(values).__name__}")
    origins = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        if values.get("stage") == "pipeline":
            override = _stage_override(values, override)
        apply_override(values, override, origins)
    found = values.get("stage")
    if not isinstance(found, str) or found not in RECIPES:
        where = origins.get(("stage",), str(path))
        raise ValueError(f"{where}: `stage` must be one of {', '.join(RECIPES)}, found {found!r}")
    if stage is not None and found != stage:
        raise ValueError(f"{path}: this is a recipe for stage {found!r}; run `dots-align {found} {path}`")
    try:
        return RECIPES[found].model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        # A list whose only item is wrong is also called too short; the item is what to mend.
        deeper = {e["loc"][:n] for e in problems for n in range(len(e["loc"]))}
        problems = [e for e in problems if e["type"] != "too_short" or e["loc"] not in deeper]
        raise ValueError("\n".join(explain(e, RECIPES[found], origins, path) for e in problems)) from None


def recipe_dict(recipe: Section) -> dict[str, Any]:
    """The recipe with every default filled in, as plain JSON values."""
    return recipe.model_dump(mode="json")


def recipe_differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys in which two recipes differ, as `key: old -> new`."""
    found = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            found += recipe_differences(before, after, f"{prefix}{key}.")
        elif before != after:
            found.append(
                f"{prefix}{key}: {json.dumps(before, ensure_ascii=False)} -> {json.dumps(after, ensure_ascii=False)}"
            )
    return found


def _key_lines(text: str) -> dict[tuple[str, ...], int]:
    """Line number of every key path in a YAML document; list items appear as their index."""
    lines: dict[tuple[str, ...], int] = {}

    def walk(node: yaml.Node | None, at: tuple[str, ...]) -> None:
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                line = key.start_mark.line + 1
                if (first := lines.get((*at, str(key.value)))) is not None:
                    raise ValueError(f"line {line}: `{key.value}` is given twice, first in line {first}; keep one")
                lines[(*at, str(key.value))] = line
                walk(value, (*at, str(key.value)))
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                lines[(*at, str(index))] = value.start_mark.line + 1
                walk(value, (*at, str(index)))

    walk(yaml.compose(text, Loader=yaml.SafeLoader), ())
    return lines


def _stage_override(values: dict[str, Any], override: str) -> str:
    """`grpo.train.max_steps=5` given to a pipeline goes to the stage whose recipe file is called grpo."""
    name, dot, rest = override.partition(".")
    if not dot or name in PipelineRecipe.model_fields:
        return override
    names = [Path(str(stage.get("recipe"))).stem for stage in values.get("stages", []) if isinstance(stage, dict)]
    if name not in names:
        raise ValueError(f"override {override!r}: no stage {name!r} in this pipeline; there are {', '.join(names)}")
    index = names.index(name)
    given = [*values["stages"][index].get("overrides", []), rest]
    return f"stages.{index}.overrides={json.dumps(given)}"


def apply_override(values: dict[str, Any], override: str, origins: dict[tuple[str, ...], str]) -> None:
    """Puts `key=value` into `values`, and where it came from into `origins`, by key path."""
    key, equals, raw = override.partition("=")
    if not equals or not key:
        raise ValueError(f"override {override!r}: write key=value, for example optim.learning_rate=1e-5")
    try:
        value = yaml.safe_load(raw)
    except yaml.YAMLError:
        value = raw  # such as {a: b with a stray brace: the user means the string
    path = tuple(key.split("."))
    here: Any = values
    for depth, part in enumerate(path):
        inner = depth < len(path) - 1
        if isinstance(here, list):
            if not part.isdigit() or int(part) > len(here):
                raise ValueError(
                    f"override {override!r}: {'.'.join(path[:depth])} is a list of {len(here)}; {part!r} is not in it"
                )
            if int(part) == len(here):
                here.append({})  # one past the end adds an item
            place: Any = int(part)
        else:
            place = part
            if inner and not isinstance(here.get(part), dict | list):
                here[part] = {}
        if inner:
            here = here[place]
        else:
            here[place] = value
    origins[path] = f"override {override!r}"


def explain(error: Any, recipe: type[Section], origins: dict[tuple[str, ...], str], path: Path) -> str:
    """One line for a person: where, which key, what is wrong, what to do."""
    location = tuple(str(part) for part in error["loc"])
    where = next((origins[location[:n]] for n in range(len(location), 0, -1) if location[:n] in origins), str(path))
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_suggestion(recipe, location)}"
    if error["type"] == "missing":
        return f"{where}: the key `{key}` is missing; add it to the recipe or give it as {key}=…"
    if error["type"] == "value_error":
        return f"{where}: {error['ctx']['error']}"
    return f"{where}: `{key}`: {error['msg'][0].lower()}{error['msg'][1:]}, found {error['input']!r}"


def _all_keys(section: type[Section], prefix: str = "") -> list[str]:
    keys = []
    for name, info in section.model_fields.items():
        keys.append(prefix + name)
        for candidate in (info.annotation, *get_args(info.annotation)):
            if isinstance(candidate, type) and issubclass(candidate, Section):
                keys += _all_keys(candidate, f"{prefix}{name}.")
    return keys


def _suggestion(recipe: type[Section], location: tuple[str, ...]) -> str:
    """The nearest existing key: by the whole path, or by the last part wherever it lives."""
    keys, wanted = _all_keys(recipe), ".".join(location)
    near = difflib.get_close_matches(wanted, keys, n=1, cutoff=0.75)
    if not near:
        by_leaf = {k.rsplit(".", 1)[-1]: k for k in reversed(keys)}
        near = [by_leaf[leaf] for leaf in difflib.get_close_matches(location[-1], list(by_leaf), n=1, cutoff=0.7)]
    return f"; did you mean `{near[0]}`?" if near else f"; keys here are {', '.join(_siblings(keys, location))}"


def _siblings(keys: list[str], location: tuple[str, ...]) -> list[str]:
    prefix = ".".join(location[:-1])
    prefix = f"{prefix}." if prefix else ""
    return [k[len(prefix) :] for k in keys if k.startswith(prefix) and "." not in k[len(prefix) :]] or ["stage"]
