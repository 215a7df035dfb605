"""The RL objective as recipe keys: algorithms by name, and what keeps them safe on a mixture of experts.

A name is a row of `PRESETS`: the keys in which the algorithm differs from GRPO as published. Keys given in the recipe
win over the row. Estimators and losses are verl's registered functions, by their names there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from dots_align.config.section import Section

AlgorithmName = Literal[
    "grpo",
    "dr_grpo",
    "dapo",
    "gspo",
    "cispo",
    "sapo",
    "gmpo",
    "clip_cov",
    "kl_cov",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "gpg",
    "opo",
    "grpo_passk",
    "ppo",
]
AdvantageEstimator = Literal[
    "grpo",
    "rloo",
    "reinforce_plus_plus",
    "reinforce_plus_plus_baseline",
    "remax",
    "opo",
    "grpo_passk",
    "gpg",
    "gae",
]
PolicyLoss = Literal["vanilla", "gspo", "sapo", "cispo", "gpg", "geo_mean", "clip_cov", "kl_cov"]
LossAggregation = Literal[
    "token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"
]

PRESETS: dict[str, dict[str, Any]] = {
    "grpo": {},
    "dr_grpo": {"norm_adv_by_std": False, "loss_agg_mode": "seq-mean-token-sum-norm"},
    "dapo": {
        "clip_ratio_high": 0.28,
        "loss_agg_mode": "token-mean",
        "overlong_buffer": 0.2,
        "max_refill_rounds": 3,
    },
    "gspo": {"policy_loss": "gspo", "clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4},
    # No lower bound: the ratio is a weight here, and 1 - 10 is below all of them.
    "cispo": {"policy_loss": "cispo", "clip_ratio_low": 10.0, "loss_agg_mode": "token-mean"},
    "sapo": {"policy_loss": "sapo"},
    "gmpo": {"policy_loss": "geo_mean", "clip_ratio_low": 0.4, "clip_ratio_high": 0.4},  # of the ratio's logarithm
    "clip_cov": {"policy_loss": "clip_cov", "loss_agg_mode": "token-mean"},
    "kl_cov": {"policy_loss": "kl_cov", "loss_agg_mode": "token-mean"},
    "rloo": {"advantage_estimator": "rloo", "loss_agg_mode": "token-mean"},
    "reinforce_plus_plus": {
        "advantage_estimator": "reinforce_plus_plus",
        "loss_agg_mode": "token-mean",
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
    "reinforce_plus_plus_baseline": {
        "advantage_estimator": "reinforce_plus_plus_baseline",
        "loss_agg_mode": "token-mean",
        "kl_estimator": "k2",
    },
    "remax": {
        "advantage_estimator": "remax",
        "loss_agg_mode": "token-mean",
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
    "gpg": {"advantage_estimator": "gpg", "policy_loss": "gpg", "loss_agg_mode": "token-mean"},
    "opo": {"advantage_estimator": "opo", "loss_agg_mode": "token-mean"},
    "grpo_passk": {"advantage_estimator": "grpo_passk", "loss_agg_mode": "token-mean"},
    "ppo": {
        "advantage_estimator": "gae",
        "loss_agg_mode": "token-mean",
        "kl_in": "reward",
        "kl_estimator": "k1",
    },
}

# Which estimators or losses a key means something to; for the others it has to keep its default.
_READ_BY: dict[str, tuple[str, set[str]]] = {
    "norm_adv_by_std": ("advantage_estimator", {"grpo", "grpo_passk"}),
    "gamma": ("advantage_estimator", {"gae", "reinforce_plus_plus"}),
    "lam": ("advantage_estimator", {"gae"}),
    "clip_ratio_low": ("policy_loss", {"vanilla", "gspo", "cispo", "geo_mean", "clip_cov"}),
    "clip_ratio_high": ("policy_loss", {"vanilla", "gspo", "cispo", "geo_mean", "clip_cov"}),
    "clip_ratio_c": ("policy_loss", {"vanilla"}),
    "tau_pos": ("policy_loss", {"sapo"}),
    "tau_neg": ("policy_loss", {"sapo"}),
    "clip_cov_ratio": ("policy_loss", {"clip_cov"}),
    "clip_cov_lb": ("policy_loss", {"clip_cov"}),
    "clip_cov_ub": ("policy_loss", {"clip_cov"}),
    "kl_cov_ratio": ("policy_loss", {"kl_cov"}),
    "ppo_kl_coef": ("policy_loss", {"kl_cov"}),
}
# Losses of whole sequences: verl averages each over its sequence, whatever it is told.
_SEQUENCE_MEAN = ("sapo", "geo_mean")
WITHOUT_GROUPS = ("reinforce_plus_plus", "remax", "gae")
"""Estimators that need no second answer to the same prompt."""


class AlgorithmSection(Section):
    """The objective. `name` fills in the keys that the recipe does not give; the defaults are GRPO's."""

    name: AlgorithmName = "grpo"
    advantage_estimator: AdvantageEstimator = "grpo"
    norm_adv_by_std: bool = True
    gamma: float = Field(default=1.0, gt=0, le=1, description="discount of later rewards, per token")
    lam: float = Field(default=1.0, ge=0, le=1, description="lambda of generalised advantage estimation")
    policy_loss: PolicyLoss = "vanilla"
    clip_ratio_low: float = Field(default=0.2, gt=0)
    clip_ratio_high: float = Field(default=0.2, gt=0)
    clip_ratio_c: float = Field(default=3.0, gt=1, description="bound of the ratio where the advantage is negative")
    tau_pos: float = Field(default=1.0, gt=0, description="steepness of SAPO's gate for positive advantages")
    tau_neg: float = Field(default=1.05, gt=0, description="and for the others")
    clip_cov_ratio: float = Field(default=2e-4, gt=0, le=1, description="share of tokens that clip_cov leaves out")
    clip_cov_lb: float = Field(default=1.0, description="of those whose covariance lies between this")
    clip_cov_ub: float = Field(default=5.0, description="and this")
    kl_cov_ratio: float = Field(default=2e-4, gt=0, le=1, description="share of tokens that kl_cov holds back")
    ppo_kl_coef: float = Field(default=1.0, ge=0, description="by this much")
    loss_agg_mode: LossAggregation = "seq-mean-token-mean"
    kl_coef: float = Field(default=0.0, ge=0, description="weight of the KL term; 0 needs no reference model")
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = Field(
        default="loss", description="reward: taken off each token's reward, before advantages are made"
    )
    kl_controller: Literal["fixed", "adaptive"] = Field(
        default="fixed", description="adaptive: kl_coef moves so that the divergence comes to kl_target"
    )
    kl_target: float = Field(default=0.1, gt=0, description="nats per token")
    kl_horizon: int = Field(default=10_000, ge=1, description="responses in which kl_coef moves noticeably")
    overlong_buffer: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="last share of rollout.max_tokens in which a response's reward falls linearly",
    )
    overlong_penalty: float = Field(default=1.0, gt=0, description="by this much at its end")
    max_refill_rounds: int = Field(
        default=0,
        ge=0,
        description="dynamic sampling: groups whose rewards are all equal are replaced by other prompts, so many times",
    )

    @model_validator(mode="before")
    @classmethod
    def _from_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        name = given.get("name", "grpo")
        return {**(PRESETS[name] if name in get_args(AlgorithmName) else {}), **given}

    @model_validator(mode="after")
    def _consistent(self):
        for problem in self._contradictions():
            raise ValueError(problem)
        return self

    def _contradictions(self) -> Iterator[str]:
        for key, (reader, names) in _READ_BY.items():
            chosen, value = getattr(self, reader), getattr(self, key)
            if chosen not in names and value != type(self).model_fields[key].default:
                yield (
                    f"algorithm.{key}={value} has no effect with algorithm.{reader}={chosen}; leave it out, or use one "
                    f"of {', '.join(sorted(names))}"
                )
        if self.policy_loss == "gspo" and max(self.clip_ratio_low, self.clip_ratio_high) > 0.05:
            yield (
                f"algorithm.policy_loss=gspo clips nothing at {self.clip_ratio_low:g}/{self.clip_ratio_high:g}: the "
                "ratios of whole sequences stay within a thousandth of 1; algorithm.name=gspo brings the range that "
                "fits, 3e-4/4e-4"
            )
        if self.policy_loss in _SEQUENCE_MEAN and self.loss_agg_mode != "seq-mean-token-mean":
            yield (
                f"algorithm.policy_loss={self.policy_loss} is a mean over sequences; algorithm.loss_agg_mode="
                f"{self.loss_agg_mode} contradicts it, use seq-mean-token-mean"
            )
        if self.kl_controller == "adaptive" and not self.kl_coef:
            yield "algorithm.kl_controller=adaptive starts from algorithm.kl_coef, which is 0; give it a value"
        if self.clip_cov_lb >= self.clip_cov_ub:
            yield f"algorithm.clip_cov_lb={self.clip_cov_lb:g} has to lie below clip_cov_ub={self.clip_cov_ub:g}"


class MismatchSection(Section):
    """How far the trainer's log-probabilities may be from those that were sampled under, before an update."""

    measure: Literal["kl", "mean", "max"] = Field(
        default="kl", description="per response token: KL divergence (k3), mean or largest difference of log-probs"
    )
    stop_above: float | None = Field(
        default=0.1, gt=0, description="nats; the run stops before such an update. null: never"
    )


RejectionOption = Literal[
    "token_k1",
    "token_k2",
    "token_k3",
    "seq_sum_k1",
    "seq_sum_k2",
    "seq_sum_k3",
    "seq_mean_k1",
    "seq_mean_k2",
    "seq_mean_k3",
    "seq_max_k2",
    "seq_max_k3",
]


class RolloutCorrectionSection(Section):
    """Corrects for rollouts sampled under other probabilities than the trainer's (verl's rollout correction).

    Denominators go on counting what is rejected, as tokens that taught nothing.
    """

    rollout_is: Literal["token", "sequence"] | None = Field(
        default=None, description="weights tokens by the ratio of probabilities, trainer's over rollout's"
    )
    rollout_is_threshold: float | str = Field(
        default=2.0, description="a number truncates weights (TIS); `0.5_2` drops those outside (IcePop)"
    )
    rollout_rs: tuple[RejectionOption, ...] = Field(default=(), description="rejects tokens or sequences that differ")
    rollout_rs_threshold: tuple[float | str, ...] = Field(
        default=(), description="one for each of rollout_rs: `0.99_1.01` (of the ratio) for k1, a number for k2 and k3"
    )

    @field_validator("rollout_is_threshold")
    @classmethod
    def _bounds(cls, value: float | str) -> float | str:
        bounds = _range(value)
        if bounds[-1] < 1:
            raise ValueError(
                f"rollout_correction.rollout_is_threshold={value} lies below 1, the weight of a token about which "
                "trainer and rollout agree; a range goes in quotes, YAML reads 0.5_2 as 0.52"
            )
        return value

    @model_validator(mode="after")
    def _one_threshold_each(self):
        if len(self.rollout_rs) != len(self.rollout_rs_threshold):
            raise ValueError(
                f"rollout_correction.rollout_rs_threshold has {len(self.rollout_rs_threshold)} entries for "
                f"{len(self.rollout_rs)} rollout_rs; give one each"
            )
        for option, threshold in zip(self.rollout_rs, self.rollout_rs_threshold, strict=True):
            if option.endswith("k1") != (len(_range(threshold)) == 2):
                raise ValueError(
                    f"rollout_correction.rollout_rs_threshold: {threshold!r} for {option}; k1 takes `lower_upper`, k2 "
                    "and k3 take a number"
                )
        return self

    @property
    def active(self) -> bool:
        return self.rollout_is is not None or bool(self.rollout_rs)


def _range(value: float | str) -> list[float]:
    """`2.0` -> [2.0], `"0.5_2"` -> [0.5, 2.0]."""
    try:
        bounds = [float(part) for part in str(value).split("_")]
    except ValueError:
        bounds = []
    if not 1 <= len(bounds) <= 2 or bounds != sorted(bounds) or bounds[0] <= 0:
        raise ValueError(f"rollout_correction: {value!r} is no threshold; give a positive number or `lower_upper`")
    return bounds
