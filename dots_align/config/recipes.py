"""The recipes: one class for each stage or command, over the sections they are made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from dots_align.config.algorithm import (
    WITHOUT_GROUPS,
    AlgorithmSection,
    MismatchSection,
    RolloutCorrectionSection,
)
from dots_align.config.hooks import HookSection
from dots_align.config.section import Section
from dots_align.config.sections import (
    ConversationTrainSection,
    CriticSection,
    DataSection,
    EnvironmentSection,
    EvaluationSection,
    LaunchSection,
    LoggingSection,
    LoraSection,
    MixSection,
    ModelSection,
    OptimSection,
    PairEvaluationSection,
    ParallelSection,
    RewardSection,
    RlRouterSection,
    RlTrainSection,
    RolloutSection,
    RouterSection,
    SaveSection,
    ScoringSection,
    SelectionSection,
    TrainSection,
    reward_names,
)


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
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        default=(),
        description="are told of all metrics; wandb and trackio, by their settings, may upload them",
    )
    on_save: tuple[HookSection, ...] = Field(default=(), description="what is done with every published checkpoint")
    evaluation: EvaluationSection | None = None

    @model_validator(mode="after")
    def _consistent(self):
        hooks = [section.hook for section in self.on_save]
        if "evaluate" in hooks and self.evaluation is None:
            raise ValueError("on_save names `evaluate`, but the recipe has no `evaluation:` section; add one")
        if hooks.count("keep_best") > 1:
            raise ValueError("on_save names `keep_best` twice; there is one best checkpoint, keep one of them")
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
    train: ConversationTrainSection = ConversationTrainSection()
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


class RewardModelRecipe(_StageRecipe):
    """A reward model from preferences: one number for an answer, by the Bradley-Terry model."""

    stage: Literal["reward_model"]
    train: TrainSection = TrainSection()
    lora: LoraSection | None = None
    center_rewards_coefficient: float | None = Field(
        default=None,
        gt=0,
        description="weight of a term that keeps scores around 0; preferences say nothing about that",
    )
    evaluation: PairEvaluationSection | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - frozen

    @model_validator(mode="after")
    def _in_torch(self):
        if self.parallel.backend != "fsdp":
            raise ValueError(
                f"parallel.backend={self.parallel.backend} trains SFT and DPO; use parallel.backend=fsdp for a reward "
                "model"
            )
        return self


class _SampledRecipe(_StageRecipe):
    """Of stages that learn from what the model itself says."""

    lora: LoraSection | None = None
    rollout: RolloutSection = RolloutSection()
    rewards: tuple[RewardSection, ...] = Field(min_length=1)
    scoring: ScoringSection = ScoringSection()
    launch: LaunchSection = LaunchSection()

    @model_validator(mode="after")
    def _rewards_have_names(self):
        names = reward_names(self.rewards)
        for name, reward in zip(names, self.rewards, strict=True):
            if names.count(name) > 1:
                raise ValueError(f"two rewards are called `{name}`; give one of them another `name`")
            if reward.gate is not None and (reward.gate.reward not in names or reward.gate.reward == name):
                raise ValueError(
                    f"the gate of reward `{name}` names `{reward.gate.reward}`, which is no other reward; there are "
                    f"{', '.join(n for n in names if n != name) or 'none'}"
                )
        return self


class RftRecipe(_SampledRecipe):
    """Rejection-sampling fine-tuning: the model's own right answers, selected, and SFT on them."""

    stage: Literal["rft"]
    train: ConversationTrainSection = ConversationTrainSection()
    selection: SelectionSection = SelectionSection()
    mix: MixSection | None = None

    @model_validator(mode="after")
    def _samples_here(self):
        if self.rollout.backend != "local" or self.parallel.backend != "fsdp":
            raise ValueError(
                "stage `rft` samples with the local engine: use rollout.backend=local and parallel.backend=fsdp"
            )
        for key in ("partial", "prefill_chunk_tokens"):
            if getattr(self.rollout, key) != RolloutSection.model_fields[key].default:
                raise ValueError(f"rollout.{key} has no effect in stage `rft`, which samples once; leave it out")
        return self


class _RlRecipe(_SampledRecipe):
    train: RlTrainSection = RlTrainSection()
    router: RlRouterSection = RlRouterSection()  # pyright: ignore[reportIncompatibleVariableOverride] - frozen
    algorithm: AlgorithmSection = AlgorithmSection()
    mismatch: MismatchSection = MismatchSection()
    rollout_correction: RolloutCorrectionSection = RolloutCorrectionSection()
    environment: EnvironmentSection | None = None

    @model_validator(mode="after")
    def _algorithm_fits(self):
        algorithm, train = self.algorithm, self.train
        if self.rollout.group_size == 1 and algorithm.advantage_estimator not in WITHOUT_GROUPS:
            raise ValueError(
                f"rollout.group_size=1: algorithm.advantage_estimator={algorithm.advantage_estimator} compares the "
                "answers to a prompt; give it at least 2"
            )
        if self.rollout.group_size == 1 and algorithm.max_refill_rounds:
            raise ValueError(
                "rollout.group_size=1: a single answer never differs, so algorithm.max_refill_rounds would replace all"
            )
        if algorithm.policy_loss == "gpg" and train.num_minibatches * train.num_epochs > 1:
            raise ValueError(
                "algorithm.policy_loss=gpg takes no account of how far the policy has moved since it sampled; it needs "
                "train.num_minibatches=1 and train.num_epochs=1"
            )
        if self.router.replay == "R3" and self.rollout.backend != "local":
            raise ValueError(
                f"router.replay=R3 replays the rollout's routes, which rollout.backend={self.rollout.backend} does not "
                "tell; use local, or router.replay=R2"
            )
        return self

    @property
    def samples_ahead(self) -> bool:
        """Whether a step may train on what an older policy sampled."""
        return self.rollout.partial is not None or self.train.off_policy_steps > 0

    @model_validator(mode="after")
    def _stale_samples_are_corrected(self):
        partial, train = self.rollout.partial, self.train
        if self.samples_ahead and not self.rollout_correction.active:
            key = "rollout.partial" if partial else "train.off_policy_steps"
            raise ValueError(
                f"{key} trains on samples of an older policy, so it needs their weights corrected; give "
                "rollout_correction.rollout_is=token, or another of rollout_correction"
            )
        if partial is None:
            return self
        if partial.extra_prompts > train.num_prompts_per_step:
            raise ValueError(
                f"rollout.partial.extra_prompts={partial.extra_prompts}: with more than train.num_prompts_per_step="
                f"{train.num_prompts_per_step} nobody could keep to max_staleness"
            )
        if partial.max_staleness <= train.off_policy_steps:
            raise ValueError(
                f"rollout.partial.max_staleness={partial.max_staleness} leaves nothing to carry on when "
                f"train.off_policy_steps={train.off_policy_steps} takes that much; give at least "
                f"{train.off_policy_steps + 1}"
            )
        if self.rollout.backend != "local":
            raise ValueError(
                f"rollout.partial goes on with samples begun earlier, which rollout.backend={self.rollout.backend} "
                "cannot; use local"
            )
        return self

    @model_validator(mode="after")
    def _environment_fits(self):
        if self.environment is None:
            return self
        estimator = self.algorithm.advantage_estimator
        if estimator in ("reinforce_plus_plus", "remax"):
            raise ValueError(
                f"environment: algorithm.advantage_estimator={estimator} knows no turns (it would return nothing to "
                "those before the last, or compare with an answer that had no environment); use another one"
            )
        if self.rollout.partial is not None:
            raise ValueError(
                "rollout.partial carries samples from step to step and over a restart, which an environment's state "
                "cannot be; leave one of the two out"
            )
        if self.rollout.backend != "local":
            raise ValueError(
                f"environment: rollout.backend={self.rollout.backend} cannot go on with a sample after an environment "
                "has spoken; use local"
            )
        if "environment" in reward_names(self.rewards):
            raise ValueError("a reward is called `environment`, as the environment's own; give it another `name`")
        return self

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


class GrpoRecipe(_RlRecipe):
    """Reinforcement learning by the GRPO family: what an answer is worth is seen by comparing it with others."""

    stage: Literal["grpo"]

    @model_validator(mode="after")
    def _without_critic(self):
        if self.algorithm.advantage_estimator == "gae":
            raise ValueError(
                "algorithm.advantage_estimator=gae needs a critic, which stage `grpo` has none of; make it a recipe of "
                "stage `ppo`"
            )
        return self


class PpoRecipe(_RlRecipe):
    """Reinforcement learning by PPO: a critic says what each state is worth."""

    stage: Literal["ppo"]
    algorithm: AlgorithmSection = AlgorithmSection(name="ppo")
    critic: CriticSection = CriticSection()

    @model_validator(mode="before")
    @classmethod
    def _ppo_by_default(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("algorithm"), dict):
            given = {**given, "algorithm": {"name": "ppo", **given["algorithm"]}}
        return given

    @model_validator(mode="after")
    def _with_critic(self):
        if self.algorithm.advantage_estimator != "gae":
            raise ValueError(
                f"algorithm.advantage_estimator={self.algorithm.advantage_estimator} has no use for a critic; stage "
                "`ppo` takes gae, the others are for stage `grpo`"
            )
        if self.critic.warmup_steps >= self.train.max_steps:
            raise ValueError(
                f"critic.warmup_steps={self.critic.warmup_steps} leaves the policy none of the "
                f"{self.train.max_steps} of train.max_steps"
            )
        return self


class EvalRecipe(Section):
    """Evaluation of one checkpoint, outside training."""

    stage: Literal["eval"]
    seed: int = 0
    model: ModelSection
    parallel: ParallelSection = ParallelSection()
    evaluation: EvaluationSection
    output: str | None = Field(
        default=None,
        description="by default the checkpoint's eval.json, or a file under evals/ if that holds another evaluation",
    )


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


class ReleaseRecipe(Section):
    """What a checkpoint has to reach to be released, and as what."""

    stage: Literal["release"]
    seed: int = Field(default=0, ge=0)
    evaluation: EvaluationSection
    thresholds: dict[str, float] = Field(
        default={}, description="the least each metric of the evaluation may be, such as {exact_match: 0.9}"
    )
    min_stop_rate: float = Field(
        default=0.95, ge=0, le=1, description="share of answers that have to end by themselves"
    )
    targets: tuple[str, ...] = Field(
        default=("hf",), min_length=1, description="as `dots-align export --to`; hf is one"
    )

    @model_validator(mode="after")
    def _transformers_reads_it(self) -> ReleaseRecipe:
        if "hf" not in self.targets:
            raise ValueError("targets: hf has to be among them; the gates load the directory")
        return self


Recipe = Annotated[
    SftRecipe
    | DpoRecipe
    | RftRecipe
    | RewardModelRecipe
    | GrpoRecipe
    | PpoRecipe
    | EvalRecipe
    | PipelineRecipe
    | ReleaseRecipe,
    Field(discriminator="stage"),
]


RECIPES: dict[str, type[Section]] = {
    get_args(cls.model_fields["stage"].annotation)[0]: cls
    for cls in (
        SftRecipe,
        DpoRecipe,
        RftRecipe,
        RewardModelRecipe,
        GrpoRecipe,
        PpoRecipe,
        EvalRecipe,
        PipelineRecipe,
        ReleaseRecipe,
    )
}
