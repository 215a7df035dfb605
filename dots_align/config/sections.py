"""The sections that recipes are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator

from dots_align.config.section import Section


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


class RlRouterSection(RouterSection):
    """And, in RL, whose choice of experts an update follows."""

    replay: Literal["none", "R2", "R3"] = Field(
        default="none",
        description="R3: the experts that the rollout chose; R2: those of the policy before the update. Gate values "
        "are the current router's all the same",
    )


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

    `path` is a JSONL or Parquet file, or `synthetic:sft`, `synthetic:preference`, `synthetic:heldout_preference`,
    `synthetic:prompts`, `synthetic:heldout`. Records hold `messages_field` (a list of {role, content}, or
    ShareGPT's {from, value}), or `prompt_field` with `response_field` (SFT), `chosen_field` and `rejected_field` (DPO,
    reward models; where they are whole conversations, no prompt is needed) or `answer_field` (RL and evaluation): one
    field, or a list of those that a reward function needs, which it gets as a JSON object.
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
    min_learning_rate: float | None = Field(default=None, gt=0, description="where a cosine ends, instead of at 0")

    @model_validator(mode="after")
    def _ends_below_its_start(self):
        if self.min_learning_rate is None:
            return self
        if self.lr_scheduler_type != "cosine":
            raise ValueError(
                f"optim.min_learning_rate is where a cosine ends, and optim.lr_scheduler_type={self.lr_scheduler_type} "
                "has no such place; leave one of them out"
            )
        if self.min_learning_rate > self.learning_rate:
            raise ValueError(
                f"optim.min_learning_rate={self.min_learning_rate:g} lies above optim.learning_rate="
                f"{self.learning_rate:g}, where the schedule starts"
            )
        return self

    @property
    def schedule(self) -> tuple[str, dict[str, float]]:
        """The schedule's name in transformers, and its keyword arguments."""
        if self.min_learning_rate is None:
            return self.lr_scheduler_type, {}
        return "cosine_with_min_lr", {"min_lr": self.min_learning_rate}


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


class ConversationTrainSection(TrainSection):
    """And how conversations are put together."""

    sessions_per_sample: int = Field(
        default=1,
        ge=1,
        description="so many conversations, as far as they fit, become one of several sessions, whose later ones read "
        "the earlier ones. Packing fills rows without that, and goes on filling them with what this makes",
    )


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


class SuiteSection(Section):
    """Tasks of the evaluation suite (`dots_align/evals/tasks`, or your own .yaml files)."""

    names: tuple[str, ...] = Field(min_length=1)
    data: str | None = Field(default=None, description="folder under which the tasks' files lie")
    limit: int | None = Field(default=None, ge=1, description="at most so many records of each")
    hub: bool = Field(default=False, description="read from the Hugging Face hub what is not in the folder")


class EvaluationSection(Section):
    """Greedy answers to held-out prompts, scored by a reward function; `exact_match` is the share scored at least 1.
    Tasks, where given, are asked as well.
    """

    data: DataSection
    tasks: SuiteSection | None = None
    scorer: str = "reward_models.math:boxed_answer"
    num_prompts: int = Field(default=200, ge=1)
    max_tokens: int = Field(default=128, ge=1)
    num_samples_shown: int = Field(default=20, ge=0)


class PairEvaluationSection(Section):
    """Held-out preference pairs; `accuracy` is the share in which the chosen answer gets the higher score."""

    data: DataSection
    num_pairs: int = Field(default=200, ge=1)


class GateSection(Section):
    """Where a reward counts: for responses that another one gave at least so much."""

    reward: str = Field(description="name of the other reward")
    at_least: float


class RewardSection(Section):
    """A reward function, `module:function` or `path/to/file.py:function`, and its weight in the sum."""

    function: str
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments of the function")
    name: str | None = Field(default=None, min_length=1, description="in metrics and gates; the function's by default")
    weight: float = 1.0
    gate: GateSection | None = None
    timeout_seconds: float = Field(default=30.0, gt=0, description="for one response; what takes longer counts as 0")
    max_concurrency: int = Field(default=16, ge=1, description="responses at a time that an async function is given")
    run_in: Literal["worker", "trainer"] = Field(
        default="worker", description="trainer: in its own process, one after the other, without a time limit"
    )


class ScoringSection(Section):
    """The processes that run reward functions beside a training process."""

    num_workers: int | None = Field(default=None, ge=1, description="by default one for each core, at most 8")


def reward_names(rewards: Sequence[RewardSection]) -> list[str]:
    """What metrics and gates call each reward: its `name`, or its function's, in full where two are called alike."""
    short = [reward.name or reward.function.rpartition(":")[2] for reward in rewards]
    return [s if short.count(s) == 1 or r.name else r.function for s, r in zip(short, rewards, strict=True)]


class VllmSection(Section):
    """A vLLM server that generates in the local engine's place; TRL's client talks to it."""

    base_url: str = Field(pattern=r"^https?://", description="of the server, such as http://10.0.0.2:8000")
    group_port: int = Field(default=51216, ge=1, le=65535, description="on which weights are sent from here")
    connection_timeout: float = Field(default=120.0, ge=0, description="seconds to wait for the server to be up")
    max_concurrent_requests: int = Field(default=64, ge=1)


class PartialRolloutSection(Section):
    """Rollouts that do not wait for the longest responses: a step ends its rollout when as many prompts as it wants are
    done, keeps the rest as they stand, and later steps go on with them.
    """

    chunk_tokens: int = Field(
        ge=1, description="by so many tokens all responses go on before it is seen whether enough prompts are done"
    )
    extra_prompts: int = Field(ge=1, description="prompts in work beyond train.num_prompts_per_step")
    max_staleness: int = Field(
        default=4, ge=1, description="a prompt is waited for rather than trained on more steps after it was begun"
    )


class RolloutSection(Section):
    """How the policy is sampled."""

    backend: Literal["local", "vllm"] = Field(default="local", description="local: our engine, on the same weights")
    vllm: VllmSection | None = None
    group_size: int = Field(default=8, ge=1, description="responses to each prompt")
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
    partial: PartialRolloutSection | None = None


class LaunchSection(Section):
    """What runs an RL recipe: the loop of ours in the processes of this launch, or verl's trainer over Ray.

    The keys below `backend` are for verl.
    """

    backend: Literal["embedded", "verl"] = "embedded"
    num_nodes: int = Field(default=1, ge=1)
    processes_per_node: int = Field(default=8, ge=1, description="one for each GPU; without GPUs, as many as asked for")
    ray_address: str | None = Field(
        default=None, description="of a Ray cluster that is up (`auto` or host:port); null: one is started, here"
    )
    object_store_gib: float | None = Field(default=None, gt=0, description="of a Ray that is started; null: Ray's own")
    mode: Literal["sync", "colocate_async"] = Field(
        default="sync",
        description="colocate_async: what is unfinished at an update goes on after it, and prompts are asked for ahead",
    )
    warmup_batches: float = Field(default=1.0, ge=0, description="of colocate_async: steps that are asked for ahead")


class EnvironmentSection(Section):
    """What samples talk with, in turns: tools, or a world. One is made for every sample."""

    factory: str = Field(description="class, `module:Class` or `path/to/file.py:Class`, with `reset` and `step`")
    arguments: dict[str, Any] = Field(default={}, description="keyword arguments of the class")
    max_turns: int = Field(default=4, ge=1, description="of the policy, in an episode of rollout.max_tokens tokens")
    weight: float = Field(default=1.0, description="of the environment's own reward, beside the other rewards")
    timeout_seconds: float = Field(default=30.0, gt=0, description="for one step; an episode that waits longer ends")
    max_concurrency: int = Field(default=32, ge=1, description="environments that are at work at a time")

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, given: Any) -> Any:
        return {"factory": given} if isinstance(given, str) else given


class RlTrainSection(Section):
    """How long and in what batches the RL loop trains."""

    max_steps: int = Field(default=100, ge=1)
    num_prompts_per_step: int = Field(default=32, ge=1)
    num_minibatches: int = Field(default=1, ge=1, description="optimizer updates per rollout")
    num_epochs: int = Field(default=1, ge=1, description="passes over each rollout")
    micro_batch_tokens: int = Field(
        default=8192, ge=1, description="most tokens of one forward; never changes a number"
    )
    share_prompts: bool = Field(
        default=True, description="compute a prompt once for all responses to it; never changes a number"
    )
    off_policy_steps: int = Field(
        default=0, ge=0, le=1, description="1: a step's rollout is made while the step before trains, by older weights"
    )
    bf16: bool = False
    gradient_checkpointing: bool = False


class CriticSection(Section):
    """The critic of PPO: a dots1 of its own whose head gives the value of a state."""

    path: str | None = Field(
        default=None,
        description="checkpoint it starts from, such as a smaller model's (with the same tokenizer) or `critic/` of an "
        "earlier run's; null: the policy's own",
    )
    optim: OptimSection = OptimSection()
    warmup_steps: int = Field(default=0, ge=0, description="first steps, in which only the critic learns")
    cliprange_value: float = Field(
        default=0.5, gt=0, description="how far an update may take a value from the one before"
    )


class SelectionSection(Section):
    """Which of the answers are learned from: right ones, each once, neither too many of a prompt nor of a difficulty.

    A prompt's difficulty is its pass rate, the share of its answers that are right; a prompt none of whose answers is
    right teaches nothing.
    """

    min_reward: float = Field(default=1.0, description="an answer is right if its reward is at least this")
    pass_rate_bins: tuple[float, ...] = Field(
        default=(0.25, 0.5, 0.75, 1.0), min_length=1, description="upper edges of the bins of difficulty"
    )
    max_per_prompt: int | tuple[int, ...] = Field(
        default=4, description="most answers that are kept to a prompt: one number, or one for each bin"
    )
    max_bin_share: float = Field(
        default=1.0, gt=0, le=1, description="most of the kept answers that prompts of one bin may give"
    )

    @model_validator(mode="after")
    def _bins_fit(self):
        bins, caps = self.pass_rate_bins, self.max_per_prompt
        if list(bins) != sorted(set(bins)) or bins[0] <= 0 or bins[-1] != 1:
            raise ValueError(f"selection.pass_rate_bins={list(bins)} have to rise from above 0 to 1")
        if isinstance(caps, tuple) and len(caps) != len(bins):
            raise ValueError(
                f"selection.max_per_prompt has {len(caps)} entries for {len(bins)} pass_rate_bins; give one each"
            )
        if min(self.caps) < 0 or max(self.caps) < 1:
            raise ValueError(f"selection.max_per_prompt={caps} keeps nothing; give at least one bin 1 or more")
        return self

    @property
    def caps(self) -> tuple[int, ...]:
        """`max_per_prompt` of each bin."""
        caps = self.max_per_prompt
        return caps if isinstance(caps, tuple) else (caps,) * len(self.pass_rate_bins)


class MixSection(Section):
    """Conversations that are learned from beside the selected answers."""

    data: DataSection
    ratio: float = Field(gt=0, description="of them for each selected answer, as far as there are so many")
