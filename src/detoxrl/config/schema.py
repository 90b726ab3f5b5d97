"""What can be set, and which values are allowed?

A section is a pydantic dataclass. The docstring below a field is its help text. Building a section directly, as in
`RlConfig(clip=0)`, raises pydantic's ValidationError for a value outside the bounds of its field, and InputError for a
value that conflicts with another setting. `recipe` and `with_settings` raise InputError for both.
"""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from detoxrl.config.algorithms import ALGORITHM_TRAITS, AlgorithmName, AlgorithmTraits
from detoxrl.config.judges import (
    JUDGES,
    PERSPECTIVE,
    PROFANITY_CHECK,
    default_other_judges,
    default_primary_judge,
    is_named_judge,
)
from detoxrl.config.names import did_you_mean
from detoxrl.config.tasks import TASKS, Task, TaskName
from detoxrl.config.terms import TERM_KINDS, Term, parse_terms
from detoxrl.errors import require

PYDANTIC = ConfigDict(use_attribute_docstrings=True, extra="forbid", allow_inf_nan=False)

NonEmptyText = Annotated[str, Field(min_length=1)]
FEWEST_IDENTITY_PROMPTS = 138
"""6 prompts of each group, and the neutral ones that match them."""

AtLeastTwo = Annotated[int, Field(ge=2)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]


def without_revision(source: str) -> str:
    """Return a hub id without the revision behind its @. An absolute path may contain an @ and stays as it is."""
    if Path(source).is_absolute():
        return source
    return source.partition("@")[0]


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class DataConfig:
    """Where the prompts come from, which of them are used, and what the policy reads."""

    task: TaskName = "summarize"
    """What a row holds and a response is: `summarize` a dialogue, `continue` a prompt, reply in a `chat`, `rewrite` a
    source in civil words."""

    source: NonEmptyText = "embedded"
    """File (.csv, .json, .jsonl, .jsonl.gz, .parquet), folder of such files, or hub id of the rows; `embedded`
    generates quarrels for the task."""

    text_column: str | None = None
    """Name of the column that a prompt is made of: text, or the messages of a chat. A dot leads into a nested column:
    prompt.text. None: the usual one of the task (dialogue; prompt; messages or prompt; source)."""

    reference_column: str | None = None
    """Name of the column with the reference. None: the usual one of the task (summary; continuation; the last message
    of the assistant, or completion; target) if the source has it; without references there is no sft and no ROUGE-L."""

    id_column: str | None = None
    """Name of the column with a row's id, unique within its split. None: rows are numbered."""

    toxicity_column: str | None = None
    """Name of the column with the toxicity of the prompt in [0, 1]. Held-out prompts are then drawn half from the toxic
    ones (0.5 or above), half from the others, and the two are also measured apart. None: there is no such column."""

    min_toxicity: UnitInterval = 0.0
    """Minimum toxicity of a training prompt by data.toxicity_column; others are left out of training."""

    stress: str | None = None
    """File of toxic turns: one per line, or a data file with a column `text`. Half of the prompts of every split get
    one, as a turn of one of their speakers, and are also measured apart. None: prompts stay as they are."""

    limit: AtLeastTwo = 24_000
    """Maximum number of training prompts; the embedded source generates exactly this many."""

    min_length: NonNegativeInt = 1
    """Minimum length of a row's text, in units of data.length_unit; shorter ones are left out."""

    max_length: int | None = None
    """Maximum length of a row's text, in units of data.length_unit; longer ones are left out. None: no maximum."""

    length_unit: Literal["characters", "tokens"] = "characters"
    """Unit of data.min_length and data.max_length."""

    template: str | None = None
    """Text of the prompt; the row's text replaces {dialogue}, {prompt}, {conversation} or {source}, by the task. In a
    chat it serves models without a chat template. None: the one of the task."""

    chat_template: bool | None = None
    """Put the prompt into the chat template of the tokenizer, as the user's message. None: if the tokenizer has one,
    except for the task `continue`."""

    system_prompt: str | None = None
    """The system's message at the beginning of each chat. A model without a system role reads it at the beginning of
    the user's first message. None: the one of the chat template, if any."""

    max_prompt_tokens: PositiveInt = 512
    """Maximum length of a prompt, in tokens. A longer one loses a part of the row's text: its end, or its beginning if
    the task is `continue` or `chat`. Templates stay whole, and so do other messages than the user's."""

    def __post_init__(self) -> None:
        slot = TASKS[self.task].slot
        has_slot = self.template is None or slot in self.template
        require(has_slot, "data.template", self.template, f"must contain {slot}", "add it to the text")

        ordered = self.max_length is None or self.min_length <= self.max_length
        rule = f"is below data.min_length = {self.min_length}"
        require(ordered, "data.max_length", self.max_length, rule, "give a larger value")

        known = self.min_toxicity == 0 or self.toxicity_column is not None
        rule = "needs the toxicity of the prompts"
        require(known, "data.min_toxicity", self.min_toxicity, rule, "name data.toxicity_column")

        has_speakers = self.stress is None or self.task != "rewrite"
        rule = "cannot be combined with data.task = rewrite, whose sources have no speakers and are toxic themselves"
        require(has_speakers, "data.stress", self.stress, rule, "leave it out")

        in_chat = self.system_prompt is None or self.chat_template is not False
        rule = "needs a chat template, and data.chat_template is False"
        require(in_chat, "data.system_prompt", self.system_prompt, rule, "write it into data.template")


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class PolicyConfig:
    """The text generator, and which of its weights are trained."""

    base: NonEmptyText = "scratch"
    """Folder or hub id of an encoder-decoder or causal model; `scratch` is a small T5 that the sft stage trains."""

    adapter: str | None = None
    """Folder of the LoRA adapter to start from; it is also the reference. None: start from a new adapter."""

    lora_rank: PositiveInt = 32
    """Rank of a new adapter."""

    lora_alpha: PositiveInt = 32
    """The output of a new adapter is multiplied by policy.lora_alpha / policy.lora_rank."""

    lora_targets: Annotated[tuple[NonEmptyText, ...], Field(min_length=1)] | None = None
    """Names of the linear layers that a new adapter changes, such as q v. None: the ones that are usual for the type of
    the base, such as q v of a T5 and q_proj v_proj of a BART or Llama."""

    train_encoder: bool = False
    """Also train the encoder. Otherwise each prompt is encoded only once."""

    full_weights: bool = False
    """Train the model's own weights instead of an adapter; the reference is a frozen copy. Needs a lower rl.lr."""

    bf16: bool = False
    """Keep the frozen base in bfloat16; halves its memory. Adapter, value head, log-probs and losses stay in fp32."""

    checkpointing: bool = False
    """Recompute activations in the backward pass instead of keeping them; an update takes about a third more time and
    much less memory."""

    def __post_init__(self) -> None:
        conflict = "cannot be combined with policy.full_weights"
        two_kinds = self.full_weights and self.adapter is not None
        require(not two_kinds, "policy.adapter", self.adapter, conflict, "merge the adapter into the base")
        require(not (self.full_weights and self.bf16), "policy.bf16", True, conflict, "leave one of them out")

        baseless = self.base == "scratch" and self.adapter is not None
        rule = "needs the base it was trained on"
        require(not baseless, "policy.adapter", self.adapter, rule, "set policy.base")


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class SftConfig:
    """Supervised fine-tuning: the warm start, and baselines without reinforcement learning."""

    steps: NonNegativeInt = 2000
    """Number of optimizer steps of the warm start; 0 skips it."""

    batch_size: PositiveInt = 32
    """Number of prompts per optimizer step."""

    lr: PositiveFloat = 3e-3
    """Peak learning rate, reached after a linear warm-up and followed by a linear decay to 0."""

    warmup_steps: NonNegativeInt = 40
    """Number of optimizer steps of the warm-up."""

    full_weights: bool = True
    """Train all weights in the warm start. Otherwise train an adapter."""

    bf16: bool = True
    """Compute in bfloat16 if the processor supports it. Weights, optimizer state and losses stay in fp32."""

    baseline_steps: NonNegativeInt = 150
    """Optimizer steps of each baseline: the initial policy fine-tuned on civil references, if rows have them, on the
    best of its own 4 responses to a prompt, and by DPO on the best and the worst of them; 0 skips all."""

    baseline_lr: PositiveFloat = 1e-3
    """Peak learning rate of the fine-tuned baselines; DPO has half of it."""


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class RewardConfig:
    """How a response is scored: by a classifier, by a Python function, or by several weighted terms."""

    terms: tuple[NonEmptyText, ...] = ()
    """Terms whose weighted sum scores a response, each KIND or KIND,KEY=VALUE,... such as `classifier` or
    `similarity,weight=0.5,gate=0.2`; `guarded` is a classifier with terms against cheap ways to please it.
    docs/rewards.md lists kinds and keys. `none`: the classifier or function alone."""

    classifier: str = "embedded"
    """Folder or hub id of the classifier that scores responses; `embedded` is one trained on generated utterances."""

    encoder: str | None = None
    """Folder or hub id of the encoder that the embedded classifier is trained on; it then understands words that the
    generated utterances lack. Other rewards do not read it. None: a small one from random weights."""

    function: str | None = None
    """`FILE.py:NAME` of a Python function that replaces the classifier: (prompts, responses) -> scores, higher is
    better. None: the classifier scores."""

    score: Literal["logit", "log_odds", "log_probability", "probability", "not_toxicity"] = "logit"
    """How the score is read from the classifier, for the good label; `not_toxicity` is 1 - P(toxic label)."""

    good_label: str | None = "nothate"
    """Label of civil text. None: the classifier has no such label; text that is not toxic counts as civil."""

    toxic_label: str | None = "hate"
    """Label of toxic text; its probability is the toxicity by this classifier. None: the classifier has no such label,
    and its toxicity is 1 - P(good label); so has a scorer that `detoxrl fit` made of pairs."""

    bf16: bool = False
    """Run the classifier in bfloat16; halves its memory and time, and changes probabilities by about 0.001."""

    normalise_on: NonNegativeInt = 256
    """Number of responses of the initial policy whose mean and standard deviation normalise the scores; 0: scores are
    not normalised."""

    clip: PositiveFloat = 10.0
    """Normalised scores are clipped to [-clip, clip]."""

    missing_eos_penalty: NonNegativeFloat | None = None
    """Subtracted from the normalised score of a response that did not end by itself. None: 1, but 0 for the task
    `continue`, in which responses are meant to run to their maximum length."""

    empty_score: float = -5.0
    """Normalised score of a response without a letter or digit; low, so that the policy does not learn to be silent."""

    def __post_init__(self) -> None:
        parse_terms(self.terms)

        has_label = self.toxic_label is not None or self.good_label is not None
        rule = "leaves no label to read, because reward.good_label is None too"
        require(has_label, "reward.toxic_label", None, rule, "name one of them")

        is_read = self.function is None or self.reads_function
        rule = f"is read by none of reward.terms = {' '.join(self.terms)}"
        require(is_read, "reward.function", self.function, rule, "add the term function, or leave it out")

    @property
    def measured_terms(self) -> tuple[Term, ...]:
        """The terms that measure a response; the classifier or function alone if none are named."""
        if self.terms:
            return tuple(term for term in parse_terms(self.terms) if TERM_KINDS[term.kind].is_measured)
        kind = "classifier" if self.function is None else "function"
        return (Term(kind=kind, name=kind),)

    def cost_of(self, rule: str) -> float | None:
        """Return what the term `missing_eos` or `empty` costs a response; None if it is not named."""
        return next((term.weight for term in parse_terms(self.terms) if term.kind == rule), None)

    @property
    def reads_classifier(self) -> bool:
        """Whether a term reads reward.classifier."""
        return any(term.kind == "classifier" and term.source is None for term in self.measured_terms)

    @property
    def reads_function(self) -> bool:
        """Whether a term reads reward.function."""
        return any(term.kind == "function" and term.source is None for term in self.measured_terms)


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class GenerationConfig:
    """How responses are sampled, in training, validation and evaluation alike."""

    max_new_tokens: PositiveInt = 56
    """Maximum length of a response, in tokens, EOS included."""

    temperature: PositiveFloat = 1.0
    """Divides the logits wherever log-probs are computed: in sampling, in the reference and in updates."""

    batch_size: PositiveInt = 256
    """Maximum number of responses sampled at once."""


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class RlConfig:
    """Reinforcement learning: the algorithm, its batches, and what holds the policy back."""

    algorithm: AlgorithmName = "ppo"
    """What a response is compared with: the prediction of a critic (`ppo`), the other responses to its prompt (`rloo`,
    `grpo`), or the responses to other prompts (`reinforce`)."""

    group_size: PositiveInt | None = None
    """Number of responses to each prompt of a rollout, which is read once for all of them; must divide
    rl.minibatch_size. None: 4 with rloo and grpo, 1 with ppo and reinforce."""

    prompt_sampling: Literal["uniform", "varied"] = "uniform"
    """Which training prompts a step takes: `uniform` takes each equally often; `varied` favours prompts whose responses
    had different scores when they were last taken. Needs groups, and prompts that are taken several times."""

    std_scaling: bool | None = None
    """Divide advantages by their standard deviation: over the group with grpo, else over the batch, where they are
    also centred. In a group it favours prompts whose responses nearly agree. None: on, except with rloo."""

    tail_share: UnitInterval = 1.0
    """Fraction of each batch, the lowest scores, whose mean is maximised (conditional value at risk, CVaR); at least 2
    scores. 1: the mean of all scores."""

    steps: PositiveInt = 40
    """Number of rollouts, each followed by its updates."""

    batch_size: AtLeastTwo = 64
    """Number of responses per rollout."""

    minibatch_size: PositiveInt = 16
    """Number of responses per optimizer step; must divide rl.batch_size."""

    microbatch_size: PositiveInt | None = None
    """Number of responses per backward pass. It changes memory, not results; below rl.group_size a prompt is read
    several times. None: as many as free memory allows."""

    epochs: PositiveInt = 2
    """Number of passes over each rollout."""

    lr: PositiveFloat = 5e-4
    """Initial learning rate of the policy; it decays linearly to 0."""

    value_lr: PositiveFloat = 5e-3
    """Initial learning rate of the value head, which ppo has; it decays linearly to 0."""

    kl_coef: NonNegativeFloat = 0.05
    """Weight of the KL penalty, per token, to the reference."""

    kl_in: Literal["reward", "loss"] | None = None
    """Where the KL penalty acts: as part of the reward, or as a loss of its own. None: in the loss with grpo, else in
    the reward."""

    kl_estimator: Literal["k1", "k2", "k3"] | None = None
    """How the KL is estimated: k1 in the reward; in the loss k2, which has the gradient of the KL, or k3, which GRPO's
    paper has. None: k1 in the reward, k2 in the loss."""

    kl_target: PositiveFloat | None = None
    """KL to the reference that an adaptive rl.kl_coef aims at, in nats per response. None: rl.kl_coef is fixed."""

    kl_horizon: PositiveInt = 2_000
    """Number of responses over which the adaptive rl.kl_coef moves; larger is slower."""

    update_kl_limit: PositiveFloat | None = 0.1
    """Skip the remaining epochs of a step once the mean k3 per token between policy and rollout exceeds this, in nats.
    None: never skip."""

    gamma: UnitInterval = 1.0
    """Discount factor. With ppo and reinforce."""

    lam: UnitInterval = 0.95
    """Lambda of generalised advantage estimation (GAE). With ppo."""

    clip: PositiveFloat = 0.2
    """Clip range of the probability ratio: [1 - clip, 1 + clip]."""

    clip_high: PositiveFloat | None = None
    """Clip range upwards, [1 - clip, 1 + clip_high]; a larger one lets unlikely tokens gain. None: rl.clip."""

    entropy_coef: NonNegativeFloat = 0.0
    """Weight of an entropy bonus per token, which keeps responses varied; 0: no bonus."""

    value_clip: PositiveFloat = 0.2
    """Clip range of the value around the value at rollout time. With ppo."""

    value_coef: NonNegativeFloat = 0.1
    """Weight of the value loss. With ppo."""

    max_grad_norm: PositiveFloat = 1.0
    """Maximum norm of the gradient; a larger gradient is scaled down to it."""

    validate_every: PositiveInt = 5
    """Number of steps between validations; the last policy is always validated."""

    validation_prompts: AtLeastTwo = 256
    """Maximum number of prompts per validation."""

    quality_margin: NonNegativeFloat | None = None
    """Largest accepted loss of validation quality against the initial policy; a checkpoint that loses more is not
    selected. None: 0.01 of facts kept or ROUGE-L, 0.08 of distinct word pairs (continue, chat), and 0.1 of similarity
    to the source (rewrite without targets)."""

    patience: PositiveInt | None = None
    """Training stops after this many validations without a better checkpoint. None: it never stops early."""

    def __post_init__(self) -> None:
        divides = self.batch_size % self.minibatch_size == 0
        rule = f"must divide rl.batch_size = {self.batch_size}"
        require(divides, "rl.minibatch_size", self.minibatch_size, rule, "change one of them")

        several = round(self.tail_share * self.batch_size) > 1
        rule = f"must cover at least 2 of rl.batch_size = {self.batch_size} scores; the lowest alone has no gradient"
        require(several, "rl.tail_share", self.tail_share, rule, "raise one of them")

        self._require_groups()
        self._require_a_kl_with_a_gradient()

        lifts_noise = self.algorithm == "grpo" and self.kl_place == "reward" and self.scales_by_std
        rule = "with grpo is divided by the std of its group, so it would drown the score where responses agree"
        require(not lifts_noise, "rl.kl_in", "reward", rule, "set rl.std_scaling to false, or rl.kl_in to loss")

    def _require_groups(self) -> None:
        size = self.responses_per_prompt
        whole = self.minibatch_size % size == 0
        rule = f"must divide rl.minibatch_size = {self.minibatch_size}"
        require(whole, "rl.group_size", size, rule, "change one of them")

        comparable = size > 1 or not self.traits.compares_group
        rule = f"must be at least 2, because {self.algorithm} compares the responses to a prompt"
        require(comparable, "rl.group_size", size, rule, "raise it, or set rl.algorithm to ppo or reinforce")

        differing = size > 1 or self.prompt_sampling == "uniform"
        rule = "needs several responses to a prompt, to tell whether they differ"
        require(differing, "rl.prompt_sampling", self.prompt_sampling, rule, "set rl.group_size to 2 or more")

    def _require_a_kl_with_a_gradient(self) -> None:
        estimator = self.kl_estimator
        if estimator is None:
            return

        if self.kl_place == "loss":
            rule = "has no gradient in expectation as a loss, so it would hold nothing back"
            require(estimator != "k1", "rl.kl_estimator", estimator, rule, "set k2 or k3, or set rl.kl_in to reward")
        else:
            rule = "is biased as part of the reward, where only k1 has the gradient of the KL"
            require(estimator == "k1", "rl.kl_estimator", estimator, rule, "set k1, or set rl.kl_in to loss")

    @property
    def traits(self) -> AlgorithmTraits:
        """What the algorithm needs, and what it sets where a setting is None."""
        return ALGORITHM_TRAITS[self.algorithm]

    @property
    def responses_per_prompt(self) -> int:
        """The size of a group."""
        return self.traits.group_size if self.group_size is None else self.group_size

    @property
    def prompts_per_step(self) -> int:
        """The number of prompts of a rollout."""
        return self.batch_size // self.responses_per_prompt

    @property
    def scales_by_std(self) -> bool:
        """Whether advantages are divided by their standard deviation."""
        return self.traits.std_scaling if self.std_scaling is None else self.std_scaling

    @property
    def kl_place(self) -> Literal["reward", "loss"]:
        """Where the KL penalty acts."""
        return self.traits.kl_in if self.kl_in is None else self.kl_in

    @property
    def kl_by(self) -> str:
        """The estimator of the KL."""
        if self.kl_estimator is not None:
            return self.kl_estimator
        return "k1" if self.kl_place == "reward" else "k2"

    @property
    def clip_range(self) -> tuple[float, float]:
        """How far the probability ratio may fall below 1 and rise above it before its gradient stops."""
        return self.clip, self.clip if self.clip_high is None else self.clip_high


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class EvaluationConfig:
    """How toxicity and quality are measured, before and after training."""

    primary_judge: str = field(default_factory=default_primary_judge)
    """The judge that decides the verdict: `perspective-minilm` (the default where the extra `judge` is installed),
    `alt-profanity-check` (else), or the folder or hub id of a classifier."""

    judge_label: str = "toxic"
    """Label of toxic text, if the primary judge is the folder or hub id of a classifier; its probability is the
    toxicity."""

    prompts: AtLeastTwo = 400
    """Maximum number of held-out prompts."""

    samples_per_prompt: PositiveInt = 4
    """Number of responses per held-out prompt and policy."""

    other_judges: tuple[str, ...] = field(default_factory=default_other_judges)
    """Further judges: a name as for the primary one, NAME=SCORE for another of its scores, or SOURCE=LABEL (a
    classifier and its toxic label). They do not affect the verdict, and the primary judge may be among them."""

    encoder: str | None = None
    """Folder or hub id of a sentence encoder; measures similarity to the initial policy's responses. None: similarity
    is measured by character n-grams."""

    nli: str | None = None
    """Folder or hub id of an NLI model; measures whether the row's text entails the response. None: not measured."""

    fluency: str | None = None
    """SOURCE=LABEL of a classifier and its label of fluent text; measures civil x similar x fluent. None: not
    measured."""

    perplexity: str | None = None
    """Folder or hub id of a causal model; measures the perplexity of responses under it too. It reads the row's text
    and the response, without templates. None: perplexity is measured under the initial policy alone."""

    best_of: tuple[AtLeastTwo, ...] = (4, 16)
    """Baselines without training: for each number n, the best of n responses of the initial policy by the reward. No
    number: no such baseline."""

    best_of_samples: PositiveInt = 1
    """Number of responses per held-out prompt of the baseline with the largest number n in evaluation.best_of; each is
    the best of n samples of its own. As many as evaluation.samples_per_prompt make its expected maximum toxicity
    comparable."""

    sharpened: bool = True
    """Also measure the initial policy at the temperature that gives it the entropy of the trained policy: what
    sharpening alone does. Takes about as long as one further policy."""

    top_p: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Also measure the initial and the trained policy with top-p sampling: tokens are drawn from the likeliest ones
    that have this share of the probability. Published results for RealToxicityPrompts have 0.9. Takes about as long as
    two further policies. None: tokens are drawn from all alone."""

    identity_prompts: NonNegativeInt = 0
    """Maximum number of generated prompts, 138 to 253, that mention a group or match one that does. The initial and the
    trained policy also answer these, evaluation.samples_per_prompt times each. 0: they are not sampled."""

    bootstrap: PositiveInt = 10_000
    """Number of bootstrap resamples for each interval."""

    def __post_init__(self) -> None:
        for judge in self.other_judges:
            known = "=" in judge or is_named_judge(judge)
            rule = f"is neither {' nor '.join(JUDGES)} nor SOURCE=LABEL"
            remedy = did_you_mean(judge, JUDGES, "add = and the toxic label")
            require(known, "evaluation.other_judges", judge, rule, remedy)

        rule = "must be SOURCE=LABEL"
        labelled = self.fluency is None or "=" in self.fluency
        require(labelled, "evaluation.fluency", self.fluency, rule, "add = and the label of fluent text")

        enough = self.identity_prompts == 0 or self.identity_prompts >= FEWEST_IDENTITY_PROMPTS
        rule = f"must be 0 or at least {FEWEST_IDENTITY_PROMPTS}: fewer prompts of a group give no interval"
        require(enough, "evaluation.identity_prompts", self.identity_prompts, rule, "ask for all with 253")


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class Config:
    """All settings of a run. `recipe` names the recipe that the settings started from."""

    recipe: str

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random draw of the run."""

    data: DataConfig = field(default_factory=DataConfig)
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    generation: GenerationConfig = field(default_factory=GenerationConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        if self.policy.base == "scratch":
            self._require_what_scratch_needs()
        if self.sft.steps > 0:
            self._require_what_the_warm_start_needs()

        needed = self.rl.prompts_per_step
        rule = f"needs {needed} prompts a step, which exceeds data.limit = {self.data.limit}"
        fits = needed <= self.data.limit
        require(fits, "rl.batch_size", self.rl.batch_size, rule, "lower it or raise data.limit")

        group_size = self.rl.responses_per_prompt
        at_once = self.generation.batch_size
        rule = f"exceeds generation.batch_size = {at_once}, and a prompt is read once for its whole group"
        require(group_size <= at_once, "rl.group_size", group_size, rule, "lower it or raise generation.batch_size")

        shared = [term.name for term in self.reward.measured_terms if TERM_KINDS[term.kind].is_shared]
        comparable = needed > 1 or not shared
        rule = f"leaves one prompt a step, so the term {' '.join(shared)} has no other response to compare with"
        require(comparable, "rl.batch_size", self.rl.batch_size, rule, "raise it, or leave the term out")

        self._require_an_independent_judge()

    def _require_what_scratch_needs(self) -> None:
        reason = "because policy.base = 'scratch' is untrained"
        steps = self.sft.steps
        require(steps > 0, "sft.steps", steps, f"must be above 0, {reason}", "set sft.steps or name a base")

        rule = f"must be True, {reason}"
        require(self.sft.full_weights, "sft.full_weights", False, rule, "set sft.full_weights or name a base")

        templated = self.data.chat_template is True or self.data.system_prompt is not None
        rule = "needs a chat template, and policy.base = 'scratch' has none"
        require(not templated, "data.chat_template", self.data.chat_template, rule, "leave it out or name a base")

        counted = self.data.length_unit != "tokens"
        rule = "needs a tokenizer, and policy.base = 'scratch' has none yet"
        require(counted, "data.length_unit", "tokens", rule, "use characters or name a base")

    def _require_what_the_warm_start_needs(self) -> None:
        adapter = self.policy.adapter
        whole = self.sft.full_weights

        rule = "must be True, because policy.full_weights leaves no place for the adapter that sft would train"
        require(whole or not self.policy.full_weights, "sft.full_weights", False, rule, "use --sft.full-weights")

        rule = "does not fit a base whose full weights sft changes"
        remedy = "use --sft.no-full-weights or --sft.steps 0"
        require(adapter is None or not whole, "policy.adapter", adapter, rule, remedy)

    @property
    def task(self) -> Task:
        """What the task is about."""
        return TASKS[self.data.task]

    @property
    def template(self) -> str:
        """The text of the prompt, with the slot of the task."""
        return self.task.template if self.data.template is None else self.data.template

    @property
    def missing_eos_penalty(self) -> float:
        """What a response that does not end by itself loses."""
        cost = self.reward.cost_of("missing_eos")
        penalty = self.reward.missing_eos_penalty if cost is None else cost
        if penalty is not None:
            return penalty
        return 1.0 if self.task.responses_end else 0.0

    @property
    def empty_score(self) -> float:
        """The score of a response without a letter or digit."""
        cost = self.reward.cost_of("empty")
        return self.reward.empty_score if cost is None else -cost

    def _require_an_independent_judge(self) -> None:
        judge = self.evaluation.primary_judge
        read = []
        for term in self.reward.measured_terms:
            if term.kind != "classifier":
                continue
            source = term.source or self.reward.classifier
            field = "reward.classifier" if term.source is None else "reward.terms"
            only_measures = source.partition("=")[0] in (PERSPECTIVE, PROFANITY_CHECK)
            rule = "is a judge, and what measures has no part in the reward"
            require(not only_measures, field, source, rule, "name the folder or hub id of a classifier")
            read.append(source)

        independent = without_revision(judge) not in map(without_revision, read)
        rule = "is the reward's own classifier, which cannot judge independently"
        require(independent, "evaluation.primary_judge", judge, rule, "name another judge")
