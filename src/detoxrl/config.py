"""What can be set, and what values are allowed?"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

import tyro

from detoxrl.errors import require


def _positive(name: str, value: float) -> None:
    require(0 < value < float("inf"), name, value, "must be above 0", "give a larger value")


def _not_negative(name: str, value: float) -> None:
    require(0 <= value < float("inf"), name, value, "must be 0 or more", "give 0 or a larger value")


def _unit(name: str, value: float) -> None:
    require(0 <= value <= 1, name, value, "must lie in [0, 1]", "give a value between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Prompts: where dialogues come from, which are used, and how one becomes a prompt."""

    source: str = "embedded"
    """A file (.csv .json .jsonl .jsonl.gz .parquet), a folder of such, a hub id, or `embedded`: generated quarrels."""
    dialogue_column: str = "dialogue"
    """Column that holds the dialogue."""
    summary_column: str | None = "summary"
    """Column that holds the reference summary; None: there is none, so sft and ROUGE-L are off."""
    id_column: str | None = None
    """Column that holds a name for each row, unique in its split; None numbers the rows."""
    limit: int = 24_000
    """Most dialogues to learn from; the embedded source makes exactly so many."""
    min_length: int = 1
    """Shorter dialogues are left out."""
    max_length: int | None = None
    """Longer dialogues are left out."""
    length_unit: Literal["characters", "tokens"] = "characters"
    """What the two bounds count."""
    template: str = "Summarize the following conversation.\n\n{dialogue}\n\nSummary:"
    """The prompt; `{dialogue}` is replaced."""
    max_prompt_tokens: int = 512
    """The dialogue in a longer prompt is cut at its end; the rest of the template is kept."""

    def __post_init__(self) -> None:
        require(self.source != "", "data.source", "", "names nothing", "give a file, a folder or a hub id")
        require(self.limit >= 2, "data.limit", self.limit, "must be 2 or more", "ask for more rows")
        has_slot = "{dialogue}" in self.template
        require(has_slot, "data.template", self.template, "must contain {dialogue}", "add {dialogue} where it belongs")
        _positive("data.max_prompt_tokens", self.max_prompt_tokens)
        _not_negative("data.min_length", self.min_length)
        ordered = self.max_length is None or self.min_length <= self.max_length
        require(ordered, "data.max_length", self.max_length, "is below data.min_length", "give a larger value")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """The text generator, and which of its weights train."""

    base: str = "scratch"
    """Folder or hub id of an encoder-decoder or causal model; `scratch`: a small T5 that the sft stage trains."""
    adapter: str | None = None
    """LoRA folder to start from; it is also the reference."""
    lora_rank: int = 32
    """Rank of a fresh adapter."""
    lora_alpha: int = 32
    """Scale of a fresh adapter is alpha / rank."""
    lora_targets: tuple[str, ...] = ("q", "v")
    """Names of the linear layers that a fresh adapter changes."""
    train_encoder: bool = False
    """Also train the encoder; without it every prompt is encoded once."""
    full_weights: bool = False
    """Train the weights themselves, not a LoRA; the reference is a copy of those that train. Wants a lower lr."""
    bf16: bool = False
    """Keep the base in bfloat16; adapter, value head, log-probs and losses stay in fp32. Half the memory."""

    def __post_init__(self) -> None:
        require(self.base != "", "policy.base", "", "names nothing", "give a folder or a hub id")
        _positive("policy.lora_rank", self.lora_rank)
        _positive("policy.lora_alpha", self.lora_alpha)
        require(len(self.lora_targets) > 0, "policy.lora_targets", (), "must name a layer", "say q v, for example")
        both = self.full_weights and self.adapter is not None
        remedy = "merge it into the base, or leave policy.full_weights out"
        require(not both, "policy.adapter", self.adapter, "does not go with policy.full_weights", remedy)
        remedy = "weights that train need fp32; leave one of them out"
        require(
            not (self.full_weights and self.bf16), "policy.bf16", True, "does not go with policy.full_weights", remedy
        )
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
    """Steps of the baseline: the same start fine-tuned on the civil references; 0 skips it."""
    baseline_lr: float = 1e-3
    """Peak learning rate of the baseline."""

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "baseline_steps"):
            _not_negative(f"sft.{name}", getattr(self, name))
        for name in ("batch_size", "lr", "baseline_lr"):
            _positive(f"sft.{name}", getattr(self, name))


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """What a response is worth: what a classifier says of it, or a function."""

    classifier: str = "embedded"
    """Folder or hub id of a sequence classifier; `embedded`: a small one trained on generated utterances."""
    function: str | None = None
    """`FILE.py:NAME` of a Python function (prompts, responses) -> scores, higher is better; replaces the classifier."""
    score: Literal["logit", "log_odds", "log_probability", "probability", "not_toxicity"] = "logit"
    """What of the good label is the score; `not_toxicity` is 1 less the probability of the toxic one."""
    good_label: str | None = "nothate"
    """The label that says civil; None: there is none, so civil is what is not toxic."""
    toxic_label: str = "hate"
    """The label that says toxic; its probability is the classifier's own toxicity."""
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
    """Learning rate of the policy's weights, decaying linearly to 0."""
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
    validation_prompts: int = 256
    """Most dialogues on which checkpoints are compared."""
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
        for name in ("batch_size", "validation_prompts"):
            value = getattr(self, name)
            require(value >= 2, f"rl.{name}", value, "must be 2 or more", "give a larger value")
        for name in ("kl_target", "update_kl_limit"):
            if getattr(self, name) is not None:
                _positive(f"rl.{name}", getattr(self, name))
        divides = self.batch_size % self.minibatch_size == 0
        require(divides, "rl.minibatch_size", self.minibatch_size, "must divide rl.batch_size", "change one of them")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """The measurement before and after."""

    primary_judge: str = "alt-profanity-check"
    """The judge that decides the verdict: `alt-profanity-check`, or the folder or hub id of a classifier."""
    judge_label: str = "toxic"
    """The label of a judging classifier whose probability is the toxicity."""
    prompts: int = 400
    """Most held-out dialogues to measure on."""
    samples_per_prompt: int = 4
    """Responses per held-out prompt and policy."""
    bootstrap: int = 10_000
    """Resamples behind each interval."""

    def __post_init__(self) -> None:
        for name in ("samples_per_prompt", "bootstrap"):
            _positive(f"evaluation.{name}", getattr(self, name))
        require(self.prompts >= 2, "evaluation.prompts", self.prompts, "must be 2 or more", "give a larger value")


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
        unmerged = self.policy.full_weights and self.sft.steps > 0 and not self.sft.full_weights
        rule, remedy = "makes a LoRA, which does not go with policy.full_weights", "say --sft.full-weights"
        require(not unmerged, "sft.full_weights", False, rule, remedy)
        replaced = self.policy.adapter is not None and self.sft.full_weights and self.sft.steps > 0
        remedy = "say --sft.no-full-weights, or --sft.steps 0"
        rule = "does not fit a base whose full weights sft changes"
        require(not replaced, "policy.adapter", self.policy.adapter, rule, remedy)
        no_targets = self.data.summary_column is None and self.sft.steps > 0
        remedy = "name the column, or say --sft.steps 0"
        require(not no_targets, "data.summary_column", None, "leaves sft nothing to learn from", remedy)
        uncounted = self.policy.base == "scratch" and self.data.length_unit == "tokens"
        remedy = "count characters, or name a base"
        require(not uncounted, "data.length_unit", "tokens", "needs a tokenizer, and scratch has none yet", remedy)
        enough = self.rl.batch_size <= self.data.limit
        require(enough, "rl.batch_size", self.rl.batch_size, "exceeds data.limit", "ask for more rows")
        judge = self.evaluation.primary_judge
        rule = "is the reward's own classifier, which cannot judge what was trained to please it"
        same = judge.partition("@")[0] == self.reward.classifier.partition("@")[0]
        independent = self.reward.function is not None or not same
        require(independent, "evaluation.primary_judge", judge, rule, "name another judge")
