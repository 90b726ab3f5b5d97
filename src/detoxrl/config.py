"""What can be set, and what values are allowed?"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from detoxrl.errors import InputError, require


def _positive(name: str, value: float) -> None:
    require(value > 0, name, value, "must be above 0", "give a larger value")


def _not_negative(name: str, value: float) -> None:
    require(value >= 0, name, value, "must be 0 or more", "give 0 or a larger value")


def _unit(name: str, value: float) -> None:
    require(0 <= value <= 1, name, value, "must lie in [0, 1]", "give a value between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts: where dialogues come from and how one becomes a prompt."""

    source: str = "embedded"
    """`embedded`: generated dialogues in DialogSum's shape."""
    train_rows: int = 24_000
    """Dialogues to learn from."""
    validation_rows: int = 256
    """Dialogues on which checkpoints are compared."""
    test_rows: int = 400
    """Held-out dialogues for the evaluation."""
    template: str = "Summarize the following conversation.\n\n{dialogue}\n\nSummary:"
    """The prompt; `{dialogue}` is replaced."""

    def __post_init__(self) -> None:
        known = self.source == "embedded"
        require(known, "data.source", self.source, "is not a known source", "use 'embedded'")
        for name in ("train_rows", "validation_rows", "test_rows"):
            rows = getattr(self, name)
            require(rows >= 2, f"data.{name}", rows, "must be 2 or more", "ask for more rows")
        has_slot = "{dialogue}" in self.template
        require(has_slot, "data.template", self.template, "must contain {dialogue}", "add {dialogue} where it belongs")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The text generator and its adapter."""

    base: str = "scratch"
    """Folder or hub id of an encoder-decoder model; `scratch`: a small T5 that the sft stage trains."""
    adapter: str | None = None
    """LoRA folder to start from; it is also the reference."""
    lora_rank: int = 32
    """Rank of a fresh adapter."""
    lora_alpha: int = 32
    """Scale of a fresh adapter is alpha / rank."""
    lora_targets: tuple[str, ...] = ("q", "v")
    """Names of the linear layers that a fresh adapter changes."""
    lora_encoder: bool = False
    """Also adapt the encoder; without it every prompt is encoded once."""

    def __post_init__(self) -> None:
        _positive("policy.lora_rank", self.lora_rank)
        _positive("policy.lora_alpha", self.lora_alpha)
        require(len(self.lora_targets) > 0, "policy.lora_targets", (), "must name a layer", "say q v, for example")
        scratch_adapter = self.base == "scratch" and self.adapter is not None
        require(
            not scratch_adapter, "policy.adapter", self.adapter, "needs the base it was trained on", "set policy.base"
        )


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """Supervised fine-tuning: the warm start, and the baseline on civil references."""

    steps: int = 2000
    """Optimizer steps of the warm start; 0 skips it."""
    batch_size: int = 32
    """Dialogues per step."""
    lr: float = 3e-3
    """Peak learning rate; linear warm-up, then linear decay to 0."""
    warmup_steps: int = 40
    """Steps of warm-up."""
    full_weights: bool = True
    """Train all weights; otherwise a LoRA adapter."""
    bf16: bool = True
    """Compute in bfloat16 where the processor has it; weights, optimizer and losses stay in fp32."""
    baseline_steps: int = 150
    """Steps of the baseline: LoRA on the civil references; 0 skips it."""
    baseline_lr: float = 1e-3
    """Peak learning rate of the baseline."""

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "baseline_steps"):
            _not_negative(f"sft.{name}", getattr(self, name))
        for name in ("batch_size", "lr", "baseline_lr"):
            _positive(f"sft.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The classifier whose raw logit is the score."""

    classifier: str = "embedded"
    """Folder or hub id of a sequence classifier; `embedded`: a small one trained on generated utterances."""
    good_label: str = "nothate"
    """The score is the raw logit of this label."""
    toxic_label: str = "hate"
    """The classifier's own toxicity is the probability of this label."""
    normalise_on: int = 256
    """Scores are shifted and scaled by the mean and std over this many reference responses; 0 turns it off."""
    clip: float = 10.0
    """Normalised scores are clipped to +- this."""
    missing_eos_penalty: float = 1.0
    """Subtracted from the normalised score of a response that never ended."""
    empty_score: float = -5.0
    """Normalised score of a response without a letter or digit: saying nothing is no way to be civil."""

    def __post_init__(self) -> None:
        _not_negative("reward.normalise_on", self.normalise_on)
        _positive("reward.clip", self.clip)
        _not_negative("reward.missing_eos_penalty", self.missing_eos_penalty)


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How responses are sampled; training, validation and evaluation share it."""

    max_new_tokens: int = 56
    """Longest response, EOS included."""
    temperature: float = 1.0
    """Divides the logits in every pass: sampling, reference and update."""
    batch_size: int = 256
    """Most responses sampled at once."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "temperature", "batch_size"):
            _positive(f"generation.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RlConfig:
    """Proximal policy optimisation (Schulman et al. 2017)."""

    steps: int = 40
    """Rollouts, each followed by its updates."""
    batch_size: int = 64
    """Responses per rollout."""
    minibatch_size: int = 16
    """Responses per optimizer step."""
    microbatch_size: int = 16
    """Responses per forward pass of an update; changes memory, not the result."""
    epochs: int = 2
    """Passes over a rollout."""
    lr: float = 5e-4
    """Learning rate of the adapter, decaying linearly to 0."""
    value_lr: float = 5e-3
    """Learning rate of the value head."""
    kl_coef: float = 0.05
    """Weight of the per-token KL to the reference in the reward."""
    kl_target: float | None = None
    """KL in nats per response that an adaptive kl_coef aims at; None keeps kl_coef fixed."""
    kl_horizon: int = 2_000
    """Responses over which the adaptive controller moves."""
    update_kl_limit: float | None = 0.1
    """Mean k3 between policy and rollout per token at which a step's remaining epochs are skipped."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    clip: float = 0.2
    """Clip range of the ratio."""
    value_clip: float = 0.2
    """Clip range of the value."""
    value_coef: float = 0.1
    """Weight of the value loss."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    validate_every: int = 5
    """Steps between validations; the last policy is always validated."""
    quality_margin: float = 0.005
    """A checkpoint is kept only if validation quality (facts, or ROUGE-L without facts) fell by no more than this."""

    def __post_init__(self) -> None:
        for name in (
            "steps", "batch_size", "minibatch_size", "microbatch_size", "epochs", "lr", "value_lr", "kl_horizon",
            "clip", "value_clip", "max_grad_norm", "validate_every",
        ):  # fmt: skip
            _positive(f"rl.{name}", getattr(self, name))
        for name in ("kl_coef", "value_coef", "quality_margin"):
            _not_negative(f"rl.{name}", getattr(self, name))
        for name in ("gamma", "lam"):
            _unit(f"rl.{name}", getattr(self, name))
        require(self.batch_size >= 2, "rl.batch_size", self.batch_size, "must be 2 or more", "give a larger value")
        for name in ("kl_target", "update_kl_limit"):
            if getattr(self, name) is not None:
                _positive(f"rl.{name}", getattr(self, name))
        divides = self.batch_size % self.minibatch_size == 0
        require(divides, "rl.minibatch_size", self.minibatch_size, "must divide rl.batch_size", "change one of them")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The measurement before and after."""

    primary_judge: str = "alt-profanity-check"
    """The judge that decides the verdict, named before the run."""
    samples_per_prompt: int = 4
    """Responses per held-out prompt and policy."""
    bootstrap: int = 10_000
    """Resamples behind each interval."""

    def __post_init__(self) -> None:
        known = self.primary_judge == "alt-profanity-check"
        require(known, "evaluation.primary_judge", self.primary_judge, "is no known judge", "use 'alt-profanity-check'")
        _positive("evaluation.samples_per_prompt", self.samples_per_prompt)
        _positive("evaluation.bootstrap", self.bootstrap)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run."""

    recipe: Annotated[str, tyro.conf.Suppress]
    """Name of the recipe the settings started from."""
    seed: int = 0
    """Every draw of the run follows from it."""
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2^63)", "give a smaller whole number")
        untrained = self.policy.base == "scratch" and (self.sft.steps == 0 or not self.sft.full_weights)
        require(not untrained, "sft", "off", "policy.base = 'scratch' needs full_weights and steps", "set sft.steps")
        replaced = self.policy.adapter is not None and self.sft.full_weights and self.sft.steps > 0
        remedy = "say --sft.no-full-weights, or --sft.steps 0"
        rule = "does not fit a base whose full weights sft changes"
        require(not replaced, "policy.adapter", self.policy.adapter, rule, remedy)
        enough = self.rl.batch_size <= self.data.train_rows
        require(enough, "rl.batch_size", self.rl.batch_size, "exceeds data.train_rows", "ask for more rows")


def config_to_json(config: Config) -> str:
    """Return the config as indented JSON that `config_from_json` reads back to an equal config."""
    from pydantic import TypeAdapter

    return TypeAdapter(Config).dump_json(config, indent=2).decode()


def config_from_json(path: Path) -> Config:
    """Return the config stored at `path`. Raises InputError when a field is unknown, missing or not allowed."""
    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(Config).validate_json(path.read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "config"
        raise InputError(where, first.get("input"), first["msg"], f"correct it in {path}") from None
