"""What is wrong with an input that can be known before torch is imported and before any weights are read?

Torch and transformers take seconds to import, on a slow machine half a minute, and a hub that cannot be reached takes
as long to fail. So local files come first, then the configs of models on a hub, and everything else later. What only
the shapes of a model tell is checked in `prepare`, also before any weights are read.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from detoxrl.commands.gguf_header import GgufHeader, read_header, require_all_data
from detoxrl.config.judges import PERSPECTIVE, PROFANITY_CHECK
from detoxrl.config.packages import is_installed
from detoxrl.config.schema import Config
from detoxrl.config.sources import (
    ClassifierSource,
    judging_classifiers,
    map_sources,
    reward_classifiers,
    sources,
    term_labels,
    term_source,
    with_absolute_paths,
)
from detoxrl.config.terms import Term
from detoxrl.data.layout import require_usable_source, require_usable_texts
from detoxrl.data.stress_lines import stress_lines
from detoxrl.errors import require
from detoxrl.evaluation.perspective_encoder import perspective_encoder
from detoxrl.evaluation.subjects import NO_BASE, Subjects, measuring_config, with_commits
from detoxrl.models.files import (
    ADAPTER_CONFIG,
    ARCHITECTURES,
    SCRATCH_LAYERS,
    adapted_part,
    adapter_base,
    generation_settings,
    layers_in_files,
    read_settings,
    require_adapter_files,
    require_model_files,
    require_targets,
)
from detoxrl.rewards.names import require_embedded_labels, require_function, require_labels
from detoxrl.runtime.files import nearby_paths
from detoxrl.runtime.hub import adapts_classifier, config_folder, fetch, is_hub_id, pin_revision, require_source
from detoxrl.runtime.run_folder import IfExists, RunFolder

PICKLES = ("adapter_model*.bin", "pytorch_model*.bin")
"""Names of the pickled files that `convert` converts."""
_SECTIONS = ("data", "policy", "reward", "evaluation")
_ENCODER = "reward.encoder"
_RATER = "evaluation.perplexity"
_GIVEN = "--policy"


def _none_is_given(_: Term) -> bool:
    return False


def checked_run(
    root: Path, config: Config, if_exists: IfExists, is_given: Callable[[Term], bool] = _none_is_given
) -> Config:
    """Return the config of a run to start or to resume in `root`, with a commit behind every hub id.

    `is_given` says whether the function of a term was given in Python. Raises InputError for what does not fit,
    StorageError for weights that are corrupted.
    """
    resumes = if_exists in ("resume", "resume with changes") and (root / "config.json").is_file()
    if resumes:
        return checked_config(config, RunFolder.open(root)[1], is_given)

    RunFolder.require_usable(root, if_exists == "overwrite")
    return checked_config(config, None, is_given)


def checked_config(
    config: Config, previous: Config | None = None, is_given: Callable[[Term], bool] = _none_is_given
) -> Config:
    """Return a config with a commit behind every hub id, once what can be known of its parts is known to fit.

    What `previous`, the config of a run to resume, has in common with it is taken as it is. Raises as `checked_run`.
    """
    if previous:
        config = _with_earlier_choices(config, previous)
    sections = _read_sections(config)
    if previous:
        sections = [name for name in sections if getattr(config, name) != getattr(previous, name)]

    _check_sections(config, sections, at_hub=False)
    _check_functions(config, sections, is_given)
    config = _with_revisions(config, but="data.source")  # A model's config is small, a data set may be large.
    _check_sections(config, sections, at_hub=True)
    return _with_revisions(config)


def check_stage(
    folder: RunFolder, config: Config, stage: str, is_given: Callable[[Term], bool] = _none_is_given
) -> None:
    """Raise InputError when a stage of an existing run lacks a part that it reads from outside of the run folder."""
    used = {
        "sft": ("policy", "reward") if config.sft.baseline_steps > 0 else ("policy",),
        "train": ("policy", "reward", "evaluation"),
        "evaluate": ("policy", "reward", "evaluation"),
        "report": (),
    }[stage]
    sections = [name for name in _read_sections(config) if name in used]
    if stage != "sft":  # It makes the warm start, so it reads what the later stages no longer need.
        config = _without_replaced_parts(folder, config)
    _check_sections(config, sections, at_hub=False)
    _check_functions(config, sections, is_given)
    # The run pinned these to commits, so nothing is asked of a hub while they are cached.
    _check_sections(config, sections, at_hub=True)


def check_locally(config: Config, is_given: Callable[[Term], bool] = _none_is_given) -> None:
    """Raise InputError when a part of a new run that is in local files does not fit. Does not ask a hub."""
    sections = _read_sections(config)
    _check_sections(config, sections, at_hub=False)
    _check_functions(config, sections, is_given)


def checked_subjects(subjects: Subjects, config: Config, is_given: Callable[[Term], bool] = _none_is_given) -> Subjects:
    """Return subjects to measure in a new folder with a commit behind every hub id. Raises as `checked_run`."""
    check_subjects(subjects)
    check_locally(measuring_config(config, subjects), is_given)
    return with_commits(subjects)


def check_subjects(subjects: Subjects) -> None:
    """Raise InputError when texts, or policies in local folders, cannot be measured. Does not ask a hub."""
    for path in subjects.texts.values():
        require_usable_texts(Path(path))

    for source in subjects.policies.values():
        folder = _folder(source, _GIVEN, at_hub=False)
        if folder is None:
            continue
        if (folder / ADAPTER_CONFIG).is_file():
            require_adapter_files(folder, _GIVEN, source)
        else:
            read_settings(folder, "config.json", _GIVEN, source)
            require_model_files(folder, _GIVEN, source)


def convertible_folder(source: str, target: Path) -> Path:
    """Return the folder of the model or LoRA to convert to the new folder `target`. Raises InputError."""
    _require_new(target)
    folder = Path(fetch(source, "FROM"))
    has_pickles = any(True for pattern in PICKLES for _ in folder.glob(pattern))
    rule = f"has no weights in {' or '.join(PICKLES)}"
    require(has_pickles, "FROM", source, rule, "nothing needs converting")
    return folder


def is_gguf(source: str) -> bool:
    """Return whether `convert` takes a source for a GGUF file; other models are folders or hub ids."""
    path = Path(source)
    return path.is_file() or (path.suffix.lower() == ".gguf" and not path.is_dir())


def convertible_gguf(source: str, target: Path) -> GgufHeader:
    """Return the header of the GGUF file to convert to the new folder `target`. Raises InputError."""
    _require_new(target)
    path = Path(source)
    require(path.is_file(), "FROM", source, "is not a file", nearby_paths(path) or "give the path of a .gguf")

    header = read_header(path, "FROM", source)
    _require_whole_model(header, source)
    require(is_installed("gguf"), "FROM", source, "needs the package gguf", "pip install 'detoxrl[gguf]'")
    require_all_data(header, path, "FROM", source)
    return header


def _require_whole_model(header: GgufHeader, source: str) -> None:
    """Raise InputError for a GGUF file without a model or tokenizer, or with settings that transformers ignores."""
    settings = header.settings
    require(header.architecture != "", "FROM", source, "names no architecture", "give the GGUF of a language model")

    parts = settings.get("split.count", 1)
    remedy = "merge its parts with llama-gguf-split --merge"
    require(parts in (0, 1), "FROM", source, f"is one of {parts} parts", remedy)

    has_tokenizer = {"tokenizer.ggml.model", "tokenizer.ggml.tokens", "tokenizer.ggml.eos_token_id"} <= settings.keys()
    rule = "holds no tokenizer with an end token"
    require(has_tokenizer, "FROM", source, rule, "give the GGUF of a language model")

    # Llama 3.1 and later, for example. Without them a model loads, and is another one.
    scaling = settings.get(f"{header.architecture}.rope.scaling.type", "none")
    is_scaled = scaling != "none" or any(name.startswith("rope_") for name in header.weights)
    rule = "scales its rotary positions, which transformers does not read from a GGUF"
    require(not is_scaled, "FROM", source, rule, "use the safetensors of the model")


def _require_new(target: Path) -> None:
    require(not target.exists(), "TO", str(target), "already exists", "name a new folder")


def _read_sections(config: Config) -> list[str]:
    """Return the sections that name what a run reads."""
    if config.policy.base == NO_BASE:  # Only judges read texts that were written elsewhere.
        return ["evaluation"]
    return list(_SECTIONS)


def _with_earlier_choices(config: Config, previous: Config) -> Config:
    """Return the config with what the run to resume chose where the config leaves it open: revisions, LoRA targets."""
    earlier = sources(previous)

    def pinned(setting: str, source: str) -> str:
        before = earlier.get(setting, "")
        return before if is_hub_id(source) and before.startswith(f"{source}@") else source

    config = map_sources(with_absolute_paths(config), pinned)
    if config.policy.base != previous.policy.base:
        return config
    targets = config.policy.lora_targets or previous.policy.lora_targets
    return replace(config, policy=replace(config.policy, lora_targets=targets))


def _with_revisions(config: Config, but: str = "") -> Config:
    """Return the config with today's commit behind every hub id that has none, that of the setting `but` aside."""

    def pin(setting: str, source: str) -> str:
        return source if setting == but else pin_revision(source, setting)

    return map_sources(config, pin)


def _without_replaced_parts(folder: RunFolder, config: Config) -> Config:
    """Return the config without the base and the adapter that products of the warm start have replaced."""
    policy = config.policy
    if (folder / "base").is_dir():
        policy = replace(policy, base=str(folder / "base"))
    if (folder / "start").is_dir():
        policy = replace(policy, adapter=None)
    return replace(config, policy=policy)


def _check_sections(config: Config, sections: Sequence[str], at_hub: bool) -> None:
    """Raise InputError for a part that does not fit, among those in local files or among those on a hub."""
    for section in sections:
        _CHECKS[section](config, at_hub)


def _check_data(config: Config, at_hub: bool) -> None:
    if at_hub:
        return
    if config.data.source != "embedded":
        require_usable_source(config)
    if config.data.stress is not None:
        stress_lines(Path(config.data.stress))


def _check_policy(config: Config, at_hub: bool) -> None:
    policy = config.policy
    if policy.base == "scratch":
        require_targets(policy.lora_targets or (), SCRATCH_LAYERS)
    else:
        _check_base(config, at_hub)

    folder = _folder(policy.adapter, "policy.adapter", at_hub) if policy.adapter else None
    if folder is not None and not at_hub:
        require_adapter_files(folder, "policy.adapter", str(policy.adapter))


def _check_base(config: Config, at_hub: bool) -> None:
    policy = config.policy
    folder = _folder(policy.base, "policy.base", at_hub)
    if folder is None:
        return

    settings = read_settings(folder, "config.json", "policy.base", policy.base)
    if at_hub:  # Nothing but the config is here.
        return

    require_model_files(folder, "policy.base", policy.base)
    generation_settings(folder, "policy.base", policy.base)
    architecture = ARCHITECTURES.get(str(settings.get("model_type")))
    makes_adapter = policy.adapter is None and not policy.full_weights
    if architecture and policy.lora_targets and makes_adapter:
        part = adapted_part(architecture.has_encoder, policy.train_encoder)
        require_targets(policy.lora_targets, layers_in_files(folder, policy.base, part))


def _check_reward(config: Config, at_hub: bool) -> None:
    if config.reward.reads_classifier and config.reward.classifier == "embedded":
        require_embedded_labels(term_labels(config, Term(kind="classifier", name="classifier")).both)
        _check_encoder(config.reward.encoder, at_hub)
    for classifier in reward_classifiers(config):
        _check_classifier(classifier, at_hub)

    for term in config.reward.measured_terms:
        if term.kind in ("similarity", "source_similarity") and term.source is not None:
            source, setting = term_source(config, term)
            _check_sentence_encoder(source, setting, at_hub)
        elif term.kind == "lexicon" and term.source is not None:
            path = Path(term.source)
            remedy = nearby_paths(path) or "give a file with a word in each line"
            require(path.is_file(), "reward.terms", term.written(), f"there is no file {path}", remedy)


def _check_functions(config: Config, sections: Sequence[str], is_given: Callable[[Term], bool]) -> None:
    """Raise InputError for a function of the reward that does not exist, unless it was given in Python."""
    if "reward" not in sections:
        return
    for term in config.reward.measured_terms:
        if term.kind == "function" and not is_given(term):
            _check_function_term(config, term)


def _check_function_term(config: Config, term: Term) -> None:
    name = term.source or config.reward.function
    rule = "has the term function, and no function is named"
    remedy = "set reward.function, or add source=FILE.py:NAME to the term"
    require(name is not None, "reward.terms", term.written(), rule, remedy)
    require_function(str(name))


def _check_encoder(source: str | None, at_hub: bool) -> None:
    """Raise InputError when the encoder of the embedded classifier has no weights or no tokenizer."""
    folder = _folder(source, _ENCODER, at_hub) if source else None
    if folder is None:
        return

    read_settings(folder, "config.json", _ENCODER, str(source))
    if not at_hub:
        require_model_files(folder, _ENCODER, str(source))


def _check_evaluation(config: Config, at_hub: bool) -> None:
    for classifier in judging_classifiers(config):
        _check_classifier(classifier, at_hub)

    settings = config.evaluation
    _check_named_judge("evaluation.primary_judge", settings.primary_judge, at_hub)
    for judge in settings.other_judges:
        _check_named_judge("evaluation.other_judges", judge, at_hub)

    if settings.perplexity:
        _check_rater(settings.perplexity, at_hub)

    if settings.encoder:
        _check_sentence_encoder(settings.encoder, "evaluation.encoder", at_hub)


def _check_named_judge(setting: str, judge: str, at_hub: bool) -> None:
    """Raise InputError when a judge with a name of its own lacks its package."""
    if judge == PROFANITY_CHECK:
        remedy = "pip install 'detoxrl[offline]'"
        require(is_installed("profanity_check"), setting, judge, "is not installed", remedy)
    if judge.partition("=")[0] == PERSPECTIVE and at_hub:
        perspective_encoder(setting, weights=False)


def _check_sentence_encoder(source: str, setting: str, at_hub: bool) -> None:
    remedy = "pip install 'detoxrl[similarity]'"
    rule = "needs the package sentence-transformers"
    require(is_installed("sentence_transformers"), setting, source, rule, remedy)
    _folder(source, setting, at_hub)


def _check_rater(source: str, at_hub: bool) -> None:
    """Raise InputError when the model that measures perplexity has no weights or no tokenizer."""
    folder = _folder(source, _RATER, at_hub)
    if folder is not None:
        read_settings(folder, "config.json", _RATER, source)
        if not at_hub:
            require_model_files(folder, _RATER, source)


def _check_classifier(classifier: ClassifierSource, at_hub: bool) -> None:
    setting, source, labels = classifier
    folder = _folder(source, setting, at_hub)
    if folder is None:
        return

    id2label = read_settings(folder, "config.json", setting, source).get("id2label")
    if id2label:  # Without names transformers makes some up, which is left to it.
        require_labels(id2label, labels)
    if at_hub:
        return

    if not adapts_classifier(folder):
        require_model_files(folder, setting, source)
        return

    require_adapter_files(folder, setting, source)
    base = adapter_base(folder, setting, source)
    require_source(base, setting)
    if not is_hub_id(base):
        require_model_files(Path(base), setting, base)


def _folder(source: str, setting: str, at_hub: bool) -> Path | None:
    """Return the folder of a model with its config, or None when the model is not where this check looks.

    Raises InputError when there is none.
    """
    if is_hub_id(source) != at_hub:
        return None
    folder = config_folder(source, setting)
    require(folder.is_dir(), setting, source, "is a file", "give the folder or hub id of a model")
    return folder


_CHECKS: dict[str, Callable[[Config, bool], None]] = {
    "data": _check_data,
    "policy": _check_policy,
    "reward": _check_reward,
    "evaluation": _check_evaluation,
}
