"""What does a run hold, and where does each part come from?"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from detoxrl.config.edit import with_settings
from detoxrl.config.judges import JUDGES, PERSPECTIVE
from detoxrl.config.schema import Config
from detoxrl.config.sources import ENTAILMENT, split_label, term_labels, term_source, with_absolute_paths
from detoxrl.config.terms import FIELD, Term
from detoxrl.data.rows import Row, read_rows, to_prompts
from detoxrl.evaluation.judges import Judge, JudgeSource, classifier_judge, judge_source, load_judges, memoized
from detoxrl.evaluation.perspective import perspective_scores
from detoxrl.evaluation.rater import load_rater
from detoxrl.evaluation.readers import Readers, ScoredPairs
from detoxrl.evaluation.statistics import Floats
from detoxrl.models.base import Base
from detoxrl.models.loading import with_fast_attention
from detoxrl.models.lora import initial_adapter
from detoxrl.models.policy import Policy
from detoxrl.models.sentences import Encode, load_encoder
from detoxrl.models.types import Prompt
from detoxrl.rewards.classifier import CIVIL_PROBE, TOXIC_PROBE, Classifier, load_classifier, load_unprobed_classifier
from detoxrl.rewards.function import (
    RewardFunctions,
    function_of,
    load_function,
    named_functions,
    validated_reward,
)
from detoxrl.rewards.lexicon import load_lexicon
from detoxrl.rewards.shaping import Normaliser
from detoxrl.rewards.terms import Reward, Score, ScoredTerm, lexicon_score, text_score, worse_of_plain
from detoxrl.runtime.files import explain_corruption
from detoxrl.runtime.run_folder import NORMALISER, RunFolder
from detoxrl.runtime.world import World, current_world


class Scorer(NamedTuple):
    """The reward that training maximises, and the judge that its model makes where it is a classifier."""

    reward: Reward
    judge: Judge | None  # Of its first classifier; not an independent judge. None: it has no classifier.


class _LoadedTerm(NamedTuple):
    """A term of the reward, and the judge that its model makes if it is a classifier."""

    scored: ScoredTerm
    judge: Judge | None


class Run:
    """A run folder, its config, and the parts that the config names, each of which is loaded once, on first use."""

    def __init__(self, folder: RunFolder, config: Config, reward: RewardFunctions | None = None) -> None:
        self.folder = folder
        self.config = config
        self.world: World = current_world()
        self._reward_functions = reward
        self._ignores_products = False
        self._scorer: Scorer | None = None
        self._functions: dict[str, Score] = {}  # By the name of the term.
        self._terms: dict[str, _LoadedTerm] = {}  # By the name of the term.
        self._encoders: dict[str, Encode] = {}  # By the source.
        self._judges: dict[str, Judge] | None = None
        self._readers: Readers | None = None
        self._rows: dict[str, list[Row]] = {}
        self._base: Base | None = None

    def __reduce__(self) -> tuple[Callable[..., "Run"], tuple[Any, ...]]:
        # A worker loads the parts itself. A reward function that was given in Python has no worker.
        return _run_of_worker, (self.folder.root, self.config)

    @contextmanager
    def as_configured(self) -> Iterator[None]:
        """Load parts inside the block by the config alone: what the folder holds may belong to an earlier run."""
        self._ignores_products = True
        try:
            yield
        finally:
            self._ignores_products = False

    def _has_product(self, name: str) -> bool:
        return not self._ignores_products and (self.folder / name).is_dir()

    @property
    def has_reward_function(self) -> bool:
        """Whether a Python function is a part of the reward."""
        kinds = {term.kind for term in self.config.reward.measured_terms}
        return self._reward_functions is not None or "function" in kinds

    @property
    def uses_embedded_reward(self) -> bool:
        """Whether the embedded classifier is a part of the reward; `prepare` trains it."""
        return any(map(self._reads_embedded_reward, self.config.reward.measured_terms))

    def _reads_embedded_reward(self, term: Term) -> bool:
        return term.kind == "classifier" and term_source(self.config, term)[0] == "embedded"

    @property
    def scorer(self) -> Scorer:
        """The reward, tried on a few texts, and its judge. Raises InputError if it does not fit."""
        if self._scorer is None:
            self._scorer = self._load_scorer()
        return self._scorer

    def load_reward(self) -> None:
        """Load and try each term of the reward now, those aside whose classifier `prepare` has yet to train.

        Raises InputError for one that does not fit.
        """
        if self._scorer is not None:
            return
        self.try_functions()
        for term in self.config.reward.measured_terms:
            if not (self._ignores_products and self._reads_embedded_reward(term)):
                self._loaded_term(term)

    def load_judges(self) -> None:
        """Load the judges now. Raises InputError for one that does not fit."""
        if self._judges is None:
            self._judges = self._load_judges()

    def load_measures(self) -> None:
        """Load the judges and readers now. Raises InputError for one that does not fit."""
        self.load_judges()
        if self._readers is None:
            self._readers = self._load_readers()

    @property
    def reward(self) -> Reward:
        """The reward: (prompts, responses) -> raw values (B, terms)."""
        return self.scorer.reward

    def try_functions(self) -> None:
        """Try the functions of the reward, which have no weights to load. Raises InputError for one that is unfit."""
        for term in self.config.reward.measured_terms:
            if term.kind == "function":
                self._function_score(term)

    def _load_scorer(self) -> Scorer:
        self.try_functions()
        loaded = [self._loaded_term(term) for term in self.config.reward.measured_terms]
        judges = [term.judge for term in loaded if term.judge is not None]
        reward = Reward(tuple(term.scored for term in loaded))
        return Scorer(reward=reward, judge=judges[0] if judges else None)

    def _loaded_term(self, term: Term) -> _LoadedTerm:
        if term.name not in self._terms:
            self._terms[term.name] = self._load_term(term)
        return self._terms[term.name]

    def _load_term(self, term: Term) -> _LoadedTerm:
        if term.kind == "classifier":
            classifier = self._load_classifier(term)
            read = worse_of_plain(classifier.score) if term.plain else classifier.score
            return _LoadedTerm(ScoredTerm(term, read), classifier_judge(classifier))

        if term.kind == "function":
            score = self._function_score(term)
        elif term.kind == "lexicon":
            pattern = load_lexicon(Path(term.source), FIELD) if term.source else None
            score = lexicon_score(pattern)
        else:
            score = text_score(term, self._term_encoder(term))
        return _LoadedTerm(ScoredTerm(term, score), None)

    def _function_score(self, term: Term) -> Score:
        if term.name not in self._functions:
            name = str(term.source or self.config.reward.function)
            function = function_of(term, self._reward_functions) or load_function(name)
            score = validated_reward(function, name)
            first, second, *_ = to_prompts(self.rows("test")[:2])
            score([first, second, first], [CIVIL_PROBE, TOXIC_PROBE, ""])
            self._functions[term.name] = score
        return self._functions[term.name]

    def _load_classifier(self, term: Term) -> Classifier:
        settings = self.config.reward
        source, field = term_source(self.config, term)
        if source == "embedded":
            source = str(self.folder.require_product("reward", "prepare"))

        labels = term_labels(self.config, term)
        kind = term.score or settings.score
        classifier = load_classifier(source, field, labels.toxic, self.world.device, labels.good, kind)
        if settings.bf16:
            with_fast_attention(classifier.model.bfloat16())
        return classifier

    def _term_encoder(self, term: Term) -> Encode | None:
        """Return the sentence encoder that a term names; None if it names none."""
        if term.source is None or term.kind not in ("similarity", "source_similarity"):
            return None
        return self._encoder(*term_source(self.config, term))

    def _encoder(self, source: str, field: str) -> Encode:
        """Return a sentence encoder, which a term and the evaluation may share."""
        if source not in self._encoders:
            self._encoders[source] = load_encoder(source, field, self.world.device)
        return self._encoders[source]

    @property
    def judges(self) -> dict[str, Judge]:
        """The judges by name, the primary one first.

        Raises InputError when the package of one is missing, or when a classifier has no such label.
        """
        self.load_judges()
        assert self._judges is not None
        return self._judges

    @property
    def primary_judge(self) -> Judge:
        """The judge that decides the verdict."""
        return next(iter(self.judges.values()))

    def _load_judges(self) -> dict[str, Judge]:
        settings = self.config.evaluation
        primary = JudgeSource(
            source=settings.primary_judge,
            label="" if settings.primary_judge in JUDGES else settings.judge_label,
            field="evaluation.primary_judge",
            label_field="evaluation.judge_label",
        )
        remedy = "give the folder or hub id of a classifier, = and its toxic label"
        others = [
            judge_source(named, "evaluation.other_judges", remedy)
            for named in settings.other_judges
            if named != settings.primary_judge
        ]
        return load_judges([primary, *others])

    @property
    def readers(self) -> Readers:
        """What reads responses beside the judges, the reward aside: what the evaluation's settings name."""
        if self._readers is None:
            self._readers = self._load_readers()
        return self._readers

    def _load_readers(self) -> Readers:
        settings = self.config.evaluation
        encode = self._encoder(settings.encoder, "evaluation.encoder") if settings.encoder else None
        entails = None
        if settings.nli:
            # Of a premise (a row's text) and a hypothesis (a response) that do not fit, the longer one is cut.
            entails = self._load_probability(settings.nli, ENTAILMENT, "evaluation.nli")
        fluent = None
        if settings.fluency:
            fluent = self._load_probability(*split_label(settings.fluency), "evaluation.fluency")
        rate = load_rater(settings.perplexity, self.world.device) if settings.perplexity else None
        perspective = None
        if PERSPECTIVE in (settings.primary_judge, *settings.other_judges):
            perspective = perspective_scores("evaluation.primary_judge")
        return Readers(encode=encode, entails=entails, fluent=fluent, rate=rate, perspective=perspective)

    def _load_probability(self, source: str, label: str, field: str) -> Callable[[Any], Floats]:
        classifier = load_unprobed_classifier(source, field, {field: label}, self.world.device)
        return classifier_judge(classifier)

    def values(self) -> Callable[[ScoredPairs], Floats]:
        """Return the reward as a reader: raw values (N, terms) of the (prompt, response) pairs of one policy.

        Each pair is read once, over all calls; only what compares the responses of a policy is computed in each call.
        """
        reward = self.reward

        def score_alone(pairs: ScoredPairs) -> Floats:
            return reward.alone(*_unzipped(pairs)).double().numpy()

        alone = memoized(score_alone)

        def values(pairs: ScoredPairs) -> Floats:
            if not reward.reads_initial_responses:
                # Pairs that differ only in what the reward does not read are one pair.
                pairs = [(replace(prompt, initial_response=None), text) for prompt, text in pairs]
            remembered = torch.from_numpy(alone(pairs)).float()
            return reward.with_shared(remembered, *_unzipped(pairs)).double().numpy()

        return values

    def stored_normaliser(self) -> Normaliser | None:
        """Return the normaliser of the reward's terms; None for a reward that training has not measured."""
        if not (self.folder / NORMALISER).is_file():
            return None
        return Normaliser.from_json(self.folder.read_json(NORMALISER), self.config.reward.measured_terms)

    def rows(self, split: str) -> list[Row]:
        """Return the rows of a split of the prepared run. Raises InputError and StorageError."""
        if split not in self._rows:
            path = self.folder.require_product(f"data/{split}.jsonl", "prepare")
            with explain_corruption(path, "remove seconds.json, and --resume makes the rows again"):
                self._rows[split] = read_rows(path)
        return self._rows[split]

    def use_rows(self, rows: Mapping[str, list[Row]]) -> None:
        """Take rows by split that are not in the run folder yet."""
        self._rows = dict(rows)

    @property
    def adapter(self) -> Path | None:
        """The folder of the LoRA that the initial policy starts from: that of the warm start, or the config's."""
        return self.folder / "start" if self._has_product("start") else initial_adapter(self.config.policy)

    def require_warm_start(self) -> None:
        """Raise InputError when the config asks for a warm start and the folder does not hold it."""
        if self.config.sft.steps > 0:
            self.folder.require_product("base" if self.config.sft.full_weights else "start", "sft")

    def base(self, bf16: bool) -> Base:
        """Return the base of the initial policy, in bfloat16 or fp32: that of the warm start, or the config's.

        It is loaded once, and again only in the other precision or when the warm start has made another. Raises
        InputError.
        """
        source = str((self.folder / "base").resolve()) if self._has_product("base") else self.config.policy.base
        held = self._base
        if held is not None and held.source == source and (source == "scratch" or held.bf16 == bf16):
            return held

        self._base = None  # Its memory is free before the next one is loaded.
        self._base = Base.load(source, bf16=bf16)
        return self._base

    def use_base(self, base: Base) -> None:
        """Take a base that is not loaded but made: that of policy.base = 'scratch', before its warm start."""
        self._base = base

    def initial_policy(self) -> Policy:
        """Return the initial policy under the adapter or the weights that train.

        Policies share the base: one that was returned earlier must not be used any more.
        """
        base = self.base(self.config.policy.bf16)
        policy = base.policy(self.adapter, self.config.policy, self.config.seed)
        return policy.for_prompts_of(self.config.data)


def _unzipped(pairs: ScoredPairs) -> tuple[list[Prompt], list[str]]:
    prompts = [prompt for prompt, _ in pairs]
    responses = [response for _, response in pairs]
    return prompts, responses


@lru_cache(maxsize=1)
def _run_of_worker(root: Path, config: Config) -> Run:
    """Return the run that the main process works on; a worker loads its parts once too."""
    return Run(RunFolder(root), config)


def with_reward_name(config: Config, reward: RewardFunctions | None) -> Config:
    """Return the config with every path absolute, and with the names of reward functions given in Python."""
    if reward is not None:
        config = with_settings(config, named_functions(config.reward, reward))
    return with_absolute_paths(config)
