"""What can be set, and what values are allowed?"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from detoxrl.errors import require


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    rule: str
    remedy: str = "give a larger value"


_POSITIVE = _Rule(lambda value: 0 < value < inf, "must be above 0")
_NOT_NEGATIVE = _Rule(lambda value: 0 <= value < inf, "must be 0 or more", "give 0 or a larger value")
_UNIT = _Rule(lambda value: 0 <= value <= 1, "must lie in [0, 1]", "give a value between 0 and 1")
_SEVERAL = _Rule(lambda value: value >= 2, "must be 2 or more")
_SIZES = _Rule(lambda sizes: all(size >= 2 for size in sizes), "must all be 2 or more", "say 4 16")
_LABELLED = _Rule(lambda them: all("=" in one for one in them), "must be SOURCE=LABEL", "add the label that is meant")
_SLOT = _Rule(lambda text: "{dialogue}" in text, "must contain {dialogue}", "add {dialogue} where it belongs")


class _Section:
    """Settings that keep the rules their types are annotated with; the comment at each is its help."""

    def __post_init__(self) -> None:
        section = type(self).__name__.removesuffix("Config").lower()
        for one in fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            for rule in getattr(one.type, "__metadata__", ()):
                holds = value is None or bool(rule.holds(value))  # None passes where the type has it
                require(holds, f"{section}.{one.name}", value, rule.rule, rule.remedy)


def without_revision(source: str) -> str:
    """Return a hub id without what follows its @; an absolute path may hold one of its own."""
    return source if Path(source).is_absolute() else source.partition("@")[0]


@dataclass(frozen=True, kw_only=True)
class DataConfig(_Section):
    """Prompts: where dialogues come from, which are used, and how one becomes a prompt."""

    # A file (.csv .json .jsonl .jsonl.gz .parquet), a folder of such, a hub id, or `embedded`: generated quarrels.
    source: Annotated[str, _Rule(bool, "names nothing", "give a file, a folder or a hub id")] = "embedded"
    dialogue_column: str = "dialogue"  # Column that holds the dialogue.
    summary_column: str | None = "summary"  # Column that holds the reference summary; None: no sft and no ROUGE-L.
    id_column: str | None = None  # Column that holds a name for each row, unique in its split; None numbers the rows.
    # Most dialogues to learn from; the embedded source makes exactly so many.
    limit: Annotated[int, _SEVERAL._replace(remedy="ask for more rows")] = 24_000
    min_length: Annotated[int, _NOT_NEGATIVE] = 1  # Shorter dialogues are left out.
    max_length: int | None = None  # Longer dialogues are left out.
    length_unit: Literal["characters", "tokens"] = "characters"  # What the two bounds count.
    # The prompt; `{dialogue}` is replaced.
    template: Annotated[str, _SLOT] = "Summarize the following conversation.\n\n{dialogue}\n\nSummary:"
    max_prompt_tokens: Annotated[int, _POSITIVE] = 512  # A longer prompt loses the end of its dialogue, nothing else.

    def __post_init__(self) -> None:
        super().__post_init__()
        ordered = self.max_length is None or self.min_length <= self.max_length
        require(ordered, "data.max_length", self.max_length, "is below data.min_length", "give a larger value")


@dataclass(frozen=True, kw_only=True)
class PolicyConfig(_Section):
    """The text generator, and which of its weights train."""

    # Folder or hub id of an encoder-decoder or causal model; `scratch`: a small T5 that the sft stage trains.
    base: Annotated[str, _Rule(bool, "names nothing", "give a folder or a hub id")] = "scratch"
    adapter: str | None = None  # LoRA folder to start from; it is also the reference.
    lora_rank: Annotated[int, _POSITIVE] = 32  # Rank of a fresh adapter.
    lora_alpha: Annotated[int, _POSITIVE] = 32  # Scale of a fresh adapter is alpha / rank.
    # Names of the linear layers that a fresh adapter changes.
    lora_targets: Annotated[tuple[str, ...], _Rule(len, "must name a layer", "say q v, for example")] = ("q", "v")
    train_encoder: bool = False  # Also train the encoder; without it every prompt is encoded once.
    full_weights: bool = False  # Train the weights, not a LoRA; the reference is a copy of them. Wants a lower lr.
    bf16: bool = False  # Half the memory: base, products in bfloat16; adapter, value head, log-probs, losses in fp32.

    def __post_init__(self) -> None:
        super().__post_init__()
        bare, rule = self.adapter is None, "does not go with policy.full_weights"
        require(bare or not self.full_weights, "policy.adapter", self.adapter, rule, "merge it into the base")
        require(not (self.full_weights and self.bf16), "policy.bf16", True, rule, "leave one of them out")
        known = bare or self.base != "scratch"
        require(known, "policy.adapter", self.adapter, "needs the base it was trained on", "set policy.base")


@dataclass(frozen=True, kw_only=True)
class SftConfig(_Section):
    """Supervised fine-tuning: the warm start, and the baseline on civil references."""

    steps: Annotated[int, _NOT_NEGATIVE] = 2000  # Optimizer steps of the warm start; 0 skips it.
    batch_size: Annotated[int, _POSITIVE] = 32  # Dialogues per step.
    lr: Annotated[float, _POSITIVE] = 3e-3  # Peak learning rate; linear warm-up, then linear decay to 0.
    warmup_steps: Annotated[int, _NOT_NEGATIVE] = 40  # Steps of warm-up.
    full_weights: bool = True  # Train all weights; otherwise a LoRA adapter.
    bf16: bool = True  # Compute in bfloat16 where the processor has it; weights, optimizer and losses stay in fp32.
    # Steps of the baseline: the same start fine-tuned on the civil references; 0 skips it.
    baseline_steps: Annotated[int, _NOT_NEGATIVE] = 150
    baseline_lr: Annotated[float, _POSITIVE] = 1e-3  # Peak learning rate of the baseline.


@dataclass(frozen=True, kw_only=True)
class RewardConfig(_Section):
    """What a response is worth: what a classifier says of it, or a function."""

    classifier: str = "embedded"  # Folder or hub id of a classifier; `embedded`: one trained on generated utterances.
    # `FILE.py:NAME` of a Python function (prompts, responses) -> scores, higher is better; replaces the classifier.
    function: str | None = None
    # What of the good label is the score; `not_toxicity` is 1 less the probability of the toxic one.
    score: Literal["logit", "log_odds", "log_probability", "probability", "not_toxicity"] = "logit"
    good_label: str | None = "nothate"  # The label that says civil; None: there is none, so civil is what is not toxic.
    toxic_label: str = "hate"  # The label that says toxic; its probability is the classifier's own toxicity.
    bf16: bool = False  # Half the classifier's memory and time, in bfloat16: probabilities move by some 0.001.
    # Scores are shifted and scaled by the mean and std over this many reference responses; 0 turns it off.
    normalise_on: Annotated[int, _NOT_NEGATIVE] = 256
    clip: Annotated[float, _POSITIVE] = 10.0  # Normalised scores are clipped to +- this.
    missing_eos_penalty: Annotated[float, _NOT_NEGATIVE] = 1.0  # Taken off the normalised score if it never ended.
    empty_score: float = -5.0  # Normalised score of a response without letter or digit: saying nothing is not civil.


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(_Section):
    """How responses are sampled; training, validation and evaluation share it."""

    max_new_tokens: Annotated[int, _POSITIVE] = 56  # Longest response, EOS included.
    temperature: Annotated[float, _POSITIVE] = 1.0  # Divides the logits in every pass: sampling, reference and update.
    batch_size: Annotated[int, _POSITIVE] = 256  # Most responses sampled at once.


@dataclass(frozen=True, kw_only=True)
class RlConfig(_Section):
    """Proximal policy optimisation (Schulman et al. 2017)."""

    steps: Annotated[int, _POSITIVE] = 40  # Rollouts, each followed by its updates.
    batch_size: Annotated[int, _POSITIVE, _SEVERAL] = 64  # Responses per rollout.
    minibatch_size: Annotated[int, _POSITIVE] = 16  # Responses per optimizer step.
    # Responses per pass of an update, which changes memory, not results; None: as many as free memory allows.
    microbatch_size: Annotated[int | None, _POSITIVE] = None
    epochs: Annotated[int, _POSITIVE] = 2  # Passes over a rollout.
    lr: Annotated[float, _POSITIVE] = 5e-4  # Learning rate of the policy's weights, decaying linearly to 0.
    value_lr: Annotated[float, _POSITIVE] = 5e-3  # Learning rate of the value head.
    kl_coef: Annotated[float, _NOT_NEGATIVE] = 0.05  # Weight of the per-token KL to the reference in the reward.
    # KL in nats per response that an adaptive kl_coef aims at; None keeps kl_coef fixed.
    kl_target: Annotated[float | None, _POSITIVE] = None
    kl_horizon: Annotated[int, _POSITIVE] = 2_000  # Responses over which the adaptive controller moves.
    # Mean k3 between policy and rollout per token at which a step's remaining epochs are skipped.
    update_kl_limit: Annotated[float | None, _POSITIVE] = 0.1
    gamma: Annotated[float, _UNIT] = 1.0  # Discount.
    lam: Annotated[float, _UNIT] = 0.95  # Lambda of generalised advantage estimation.
    clip: Annotated[float, _POSITIVE] = 0.2  # Clip range of the ratio.
    value_clip: Annotated[float, _POSITIVE] = 0.2  # Clip range of the value.
    value_coef: Annotated[float, _NOT_NEGATIVE] = 0.1  # Weight of the value loss.
    max_grad_norm: Annotated[float, _POSITIVE] = 1.0  # Gradients are scaled down to this norm.
    validate_every: Annotated[int, _POSITIVE] = 5  # Steps between validations; the last policy is always validated.
    validation_prompts: Annotated[int, _SEVERAL] = 256  # Most dialogues on which checkpoints are compared.
    # A checkpoint is kept only if validation quality (facts, or ROUGE-L without facts) fell by no more than this.
    quality_margin: Annotated[float, _NOT_NEGATIVE] = 0.005
    # Training ends when so many validations in a row brought no better checkpoint; None: it never does.
    patience: Annotated[int | None, _POSITIVE] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        divides = self.batch_size % self.minibatch_size == 0
        require(divides, "rl.minibatch_size", self.minibatch_size, "must divide rl.batch_size", "change one of them")


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(_Section):
    """The measurement before and after."""

    # The judge that decides the verdict: `alt-profanity-check`, or the folder or hub id of a classifier.
    primary_judge: str = "alt-profanity-check"
    judge_label: str = "toxic"  # The label of a judging classifier whose probability is the toxicity.
    prompts: Annotated[int, _SEVERAL] = 400  # Most held-out dialogues to measure on.
    samples_per_prompt: Annotated[int, _POSITIVE] = 4  # Responses per held-out prompt and policy.
    # Further judges, each SOURCE=LABEL (a classifier and its toxic label); they decide nothing.
    other_judges: Annotated[tuple[str, ...], _LABELLED] = ()
    # Folder or hub id of a sentence encoder for similarity to the start's responses; None: character n-grams.
    encoder: str | None = None
    nli: str | None = None  # Folder or hub id of a model that says whether a dialogue entails a response.
    # SOURCE=LABEL: a classifier and its label for fluent text; with it civil x similar x fluent is measured.
    fluency: Annotated[str | None, _LABELLED._replace(holds=lambda one: "=" in one)] = None
    # Baselines without training: the best of so many samples of the start, by the reward; none turns them off.
    best_of: Annotated[tuple[int, ...], _SIZES] = (4, 16)
    bootstrap: Annotated[int, _POSITIVE] = 10_000  # Resamples behind each interval.


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that decides a run; `recipe` names what the settings started from."""

    recipe: str
    seed: int = 0  # Every draw of the run follows from it.
    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**63, "seed", self.seed, "must lie in [0, 2^63)", "give a smaller whole number")
        scratch, adapter = self.policy.base == "scratch", self.policy.adapter
        tuned, whole = self.sft.steps > 0, self.sft.full_weights
        rule = "policy.base = 'scratch' needs full_weights and steps"
        require(not scratch or (tuned and whole), "sft", "off", rule, "set sft.steps")
        fits, rule = whole or not (tuned and self.policy.full_weights), "makes a LoRA beside policy.full_weights"
        require(fits, "sft.full_weights", False, rule, "say --sft.full-weights")
        fits, rule = not (adapter and tuned and whole), "does not fit a base whose full weights sft changes"
        require(fits, "policy.adapter", adapter, rule, "say --sft.no-full-weights, or --sft.steps 0")
        fits, rule = not tuned or self.data.summary_column is not None, "leaves sft nothing to learn from"
        require(fits, "data.summary_column", None, rule, "name the column, or say --sft.steps 0")
        fits = not (scratch and self.data.length_unit == "tokens")
        require(fits, "data.length_unit", "tokens", "needs a tokenizer, and scratch has none yet", "name a base")
        size = self.rl.batch_size
        require(size <= self.data.limit, "rl.batch_size", size, "exceeds data.limit", "ask for more rows")
        judge, trained_by = map(without_revision, (self.evaluation.primary_judge, self.reward.classifier))
        free = judge != trained_by or self.reward.function is not None
        rule = "is the reward's own classifier, which cannot judge"
        require(free, "evaluation.primary_judge", judge, rule, "name another")
