"""What has to exist, and to fit, before a run begins?"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from detoxrl.config.schema import Config
from detoxrl.data.embedded.corpus import generate_rows, generate_utterances
from detoxrl.data.prompts import PromptWriter, token_lengths
from detoxrl.data.rows import SPLITS, Row, rows_to_jsonl
from detoxrl.data.selection import Selection, select
from detoxrl.data.sources import read_source, read_texts
from detoxrl.data.stress import Stressed, with_stress
from detoxrl.data.stress_lines import stress_lines
from detoxrl.errors import require
from detoxrl.evaluation.insults import toxic_words
from detoxrl.evaluation.judges import profanity_judge
from detoxrl.evaluation.policies import MeasuredPolicies, try_policies
from detoxrl.evaluation.subjects import NO_SUBJECTS, Subjects
from detoxrl.models.base import Base
from detoxrl.models.chat import has_system_role
from detoxrl.models.kernels import kernels
from detoxrl.models.loading import (
    load_fitting_shapes,
    load_tokenizer,
    require_positions,
    scratch_base,
    scratch_tokenizer,
)
from detoxrl.models.lora import make_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import require_agreement, require_own_reference
from detoxrl.report.masking import mask, masking_pattern
from detoxrl.report.words import data_account
from detoxrl.rewards.fit import FitSettings, train_reward_model
from detoxrl.runs import Run
from detoxrl.runtime.cache import cached, require_cacheable
from detoxrl.runtime.console import log, progress, status
from detoxrl.runtime.files import content_digest, remove_path, replace_folder
from detoxrl.runtime.hub import fetch
from detoxrl.training.sft import require_cacheable_warm_start

# The embedded reward model: how many utterances it learns from, and how.
UTTERANCES = 8_000
REWARD_STEPS = 150
REWARD_BATCH = 64
REWARD_LR = 1e-3
# The same on a pretrained encoder, which needs a lower rate and fewer utterances.
_ON_ENCODER: dict[str, Any] = {"steps": 120, "batch_size": 32, "lr": 5e-5, "warmup_steps": 12}

# The tokenizer of policy.base = 'scratch': how many training rows it learns from, and how many tokens it has.
_TOKENIZER_ROWS = 4_000
_TOKENIZER_SIZE = 1500


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run, or a measurement alone, starts from."""

    rows: dict[str, list[Row]]  # By split, with their prompts.
    account: dict[str, Any]  # What became of every row of the source, how many prompts were cut, lengths in tokens.
    tokenizer: Any  # The tokenizer that counted the rows. None: the rows are texts that were written elsewhere.


def check(run: Run, subjects: Subjects = NO_SUBJECTS) -> Prepared:
    """Load and try every part of a run, or of a measurement of subjects; write nothing. Raises InputError."""
    with run.as_configured():
        return _check(run, subjects)


def _check(run: Run, subjects: Subjects) -> Prepared:
    if subjects.texts:
        require(not run.has_reward_function, "reward", "", "cannot score texts without prompts", "leave it out")
        prepared = _prepare_texts(run.config, subjects)
        run.load_measures()
        return prepared

    with status("reading and counting the rows"):
        prepared = prepare_rows(run.config, ("test",) if subjects.policies else SPLITS)
        run.use_rows(prepared.rows)
    if not subjects.policies:
        require_fitting_shapes(run.config, prepared)
        if run.uses_embedded_reward:
            require_cacheable("reward", reward_ingredients(run.config.seed, run.config.reward.encoder))
        require_cacheable_warm_start(run)

    load_reward_and_judges(run)
    if subjects.policies:
        policies = MeasuredPolicies(run.base, run.adapter, {}, subjects.policies, run.config)
        try_policies(policies, subjects.policies, run.config, prepared.rows["test"])
    else:
        checked_policy(run, prepared)
    return prepared


def load_reward_and_judges(run: Run) -> None:
    """Load and try what reads responses: a reward function first, because it has no weights, then judges and reward."""
    run.try_functions()
    run.load_measures()
    run.load_reward()


def _prepare_texts(config: Config, subjects: Subjects) -> Prepared:
    rows = read_texts(subjects.texts, config)
    account = {
        "task": config.data.task,
        "splits": {"texts": {"used for test": len(rows)}},
        "truncated": {},
        "prompt_tokens": None,
    }
    return Prepared(rows={"test": rows}, account=account, tokenizer=None)


def require_fitting_shapes(config: Config, prepared: Prepared) -> None:
    """Raise InputError for a base of which the shapes alone tell that it does not fit. No weights are read."""
    if config.policy.base == "scratch":
        return

    model = load_fitting_shapes(config.policy.base, prepared.tokenizer, config.policy.bf16)
    fine_tunes = config.sft.steps + config.sft.baseline_steps > 0
    reference_tokens = prepared.account["reference_tokens"]
    longest_target = reference_tokens["max"] if fine_tunes and reference_tokens else 0
    require_positions(model.config, config, longest_target)

    if config.policy.adapter is None:
        with torch.device("meta"):
            make_policy(model, prepared.tokenizer, None, config.policy, config.seed)


def checked_policy(run: Run, prepared: Prepared) -> Policy:
    """Return the policy that the run begins with; a scratch base is untrained. Raises InputError if it does not fit."""
    config = run.config
    if config.policy.base == "scratch":
        run.use_base(Base(scratch_base(prepared.tokenizer, config.seed), prepared.tokenizer, "scratch"))
        return run.initial_policy()

    policy = run.initial_policy()
    require_agreement(policy, config.policy.base)
    field = "policy.base" if config.policy.adapter is None else "policy.adapter"
    require_own_reference(policy, field, str(config.policy.adapter or config.policy.base))
    return policy


def precision_notice(config: Config, device: torch.device) -> str:
    """Return what becomes of weights in bfloat16 on a CPU that multiplies float32 faster; empty if that is not so."""
    asked = {"policy.bf16": config.policy.bf16, "reward.bf16": config.reward.bf16}
    settings = [name for name, is_asked in asked.items() if is_asked]
    if not settings or device.type != "cpu" or kernels().bf16:
        return ""

    weights = "its weights are" if len(settings) == 1 else "their weights are"
    reason = "this processor multiplies float32 faster"
    return f"{' and '.join(settings)}: {reason}, so {weights} stored in bfloat16 and multiplied in float32"


def write_prepared(run: Run, prepared: Prepared) -> None:
    """Write the rows, their account, a scratch base's tokenizer, and the embedded reward model."""
    folder = run.folder
    for split, rows in prepared.rows.items():
        folder.write(f"data/{split}.jsonl", rows_to_jsonl(rows))
    folder.write_json("rows.json", prepared.account)
    log.print(account_table(prepared.account))
    if "first_prompt" in prepared.account:
        log.print(first_prompt(run, prepared.account), soft_wrap=True)
    notice = precision_notice(run.config, run.world.device)
    if notice:
        log.print(notice, soft_wrap=True)

    if run.config.policy.base == "scratch":
        with replace_folder(folder / "tokenizer") as tokenizer:
            prepared.tokenizer.save_pretrained(tokenizer)

    # The reward model exists already when the run was stopped right after it was made. Texts need none.
    measures_texts = prepared.tokenizer is None
    if run.uses_embedded_reward and not measures_texts and not (folder / "reward").is_dir():
        _make_reward_model(run)
    remove_path(folder / "checkpoints/prepare")


def prepare_rows(config: Config, uses: Sequence[str] = SPLITS) -> Prepared:
    """Return the rows with their prompts, and the tokenizer that counted them, for `uses`. Raises InputError."""
    tokenizer: Any = None if config.policy.base == "scratch" else load_tokenizer(config.policy.base)
    selection = _selection(config, tokenizer, uses)
    stressed = _stressed(selection.rows, config)
    if tokenizer is None:
        tokenizer = _train_tokenizer(stressed["train"].rows[:_TOKENIZER_ROWS], config)

    writer = PromptWriter(config, tokenizer)
    rows: dict[str, list[Row]] = {}
    lengths: dict[str, list[int]] = {}
    for split in SPLITS:
        rows[split], lengths[split] = _with_prompts(writer, selection.rows[split], stressed[split])

    limit = config.data.max_prompt_tokens
    prompt_lengths = [min(length, limit) for split in SPLITS for length in lengths[split]]
    references = [reference for row in rows["train"] for reference in row.references]
    _require_targets(config, references)
    account = {
        "task": config.data.task,
        "first_prompt": writer.as_read(_first(rows).prompt),
        "in_chat": writer.in_chat,
        "has_system_role": writer.in_chat and has_system_role(tokenizer),
        "splits": selection.outcomes,
        "truncated": {split: sum(length > limit for length in lengths[split]) for split in SPLITS},
        "prompt_tokens": _spread(prompt_lengths),
        "reference_tokens": _spread(token_lengths(tokenizer, references)) if references else None,
    }
    if config.data.stress is not None:
        account["stress"] = {split: _stress_account(rows[split], stressed[split]) for split in SPLITS}
    return Prepared(rows=rows, account=account, tokenizer=tokenizer)


def _stressed(rows: dict[str, list[Row]], config: Config) -> dict[str, Stressed]:
    """Return the rows of each split, half of them with a toxic turn if the config names a file of these."""
    if config.data.stress is None:
        return {split: Stressed(rows[split], [None] * len(rows[split]), 0) for split in SPLITS}

    turns = stress_lines(Path(config.data.stress))
    return {split: with_stress(rows[split], turns[split], split, config.seed) for split in SPLITS}


def _with_prompts(writer: PromptWriter, rows: Sequence[Row], stressed: Stressed) -> tuple[list[Row], list[int]]:
    """Return stressed rows with prompts, and their lengths. A row whose turn would be cut stays as it is in `rows`."""
    prompted, lengths = writer.with_prompts(stressed.rows)
    for index, turn in enumerate(stressed.turns):
        if turn is not None and turn not in prompted[index].prompt:
            (prompted[index],), (lengths[index],) = writer.with_prompts([rows[index]])
    return prompted, lengths


def _stress_account(rows: Sequence[Row], stressed: Stressed) -> dict[str, int]:
    """Return how many rows of a split have a toxic turn, and why the others have none."""
    has_turn = sum(row.stressed for row in rows)
    was_cut = sum(turn is not None for turn in stressed.turns) - has_turn
    drawn_clean = len(rows) - has_turn - was_cut - stressed.without_place
    return {
        "stressed": has_turn,
        "clean": drawn_clean,
        "without a place for a turn": stressed.without_place,
        "too long for a turn": was_cut,
    }


def _first(rows: dict[str, list[Row]]) -> Row:
    """Return the first training row, or the first test row where nothing trains."""
    return (rows["train"] or rows["test"])[0]


def _require_targets(config: Config, references: Sequence[str]) -> None:
    """Raise InputError when the warm start has nothing to learn from."""
    rule = f"leaves sft nothing to learn from: no row has a {config.task.reference}"
    has_targets = bool(references) or config.sft.steps == 0
    require(has_targets, "data.reference_column", config.data.reference_column, rule, "use --sft.steps 0")


def _train_tokenizer(rows: Sequence[Row], config: Config) -> PreTrainedTokenizerBase:
    prompts = [config.template.replace(config.task.slot, row.text) for row in rows]
    references = [reference for row in rows for reference in row.references or ("",)]
    return scratch_tokenizer([*prompts, *references], vocab_size=_TOKENIZER_SIZE)


def _selection(config: Config, tokenizer: PreTrainedTokenizerBase | None, uses: Sequence[str]) -> Selection:
    if config.data.source == "embedded":
        sizes = {
            "train": config.data.limit,
            "validation": config.rl.validation_prompts,
            "test": config.evaluation.prompts,
        }
        rows = generate_rows(config.seed, sizes, config.data.task)
        outcomes = {f"used for {split}": len(rows[split]) for split in SPLITS}
        return Selection(rows=rows, outcomes={"embedded": outcomes})

    lengths: Callable[[list[str]], list[int]] = _characters
    if tokenizer is not None and config.data.length_unit == "tokens":
        lengths = partial(token_lengths, tokenizer)
    return select(read_source(config), config, lengths, uses)


def _characters(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


def _spread(lengths: Sequence[int]) -> dict[str, int]:
    median, p95, longest = np.quantile(lengths, [0.5, 0.95, 1.0], method="nearest").tolist()
    return {"median": median, "p95": p95, "max": longest}


def account_table(account: dict[str, Any]) -> Group:
    """Return what became of every row of the source, as a table for the terminal, and how long its prompts are."""
    account = data_account(account)
    table = Table("rows", *(Column(split, justify="right") for split in account["splits"]), box=SIMPLE_HEAD)
    for outcome, counts in account["counts"].items():
        table.add_row(outcome, *(f"{count:,}" for count in counts))
    table.add_row("total", *(f"{total:,}" for total in account["sums"]), style="bold")

    cut = ", ".join(f"{count} of {split}" for split, count in account["truncated"].items() if count) or "none"
    lines = f"prompts cut to fit: {cut}"
    if account["prompt_tokens"]:
        spread = "median {median}, 95 % up to {p95}, longest {max}".format(**account["prompt_tokens"])
        lines = f"{lines}; prompt tokens: {spread}"
    for split, counts in account.get("stress", {}).items():
        lines += f"\nprompts of {split}: {', '.join(f'{count:,} {outcome}' for outcome, count in counts.items())}"
    return Group(table, lines)


def first_prompt(run: Run, account: dict[str, Any]) -> Text:
    """Return the first prompt exactly as the model reads it, with toxic words masked, for the terminal."""
    prompt = str(account["first_prompt"])
    words = toxic_words([[prompt]], profanity_judge() or run.primary_judge)
    lines = mask(prompt, masking_pattern(words)).replace("\n", "\n  ")
    how = "the chat template" if account["in_chat"] else "plain text, without a chat template"
    return Text(f"first prompt, as the model reads it ({how}; toxic words masked):\n  {lines}")


def _make_reward_model(run: Run) -> None:
    """Train the embedded reward model into reward/, or take it from the package or the cache."""
    seed = run.config.seed
    encoder = run.config.reward.encoder
    checkpoints = run.folder / "checkpoints/prepare"
    build = partial(train_embedded_reward, seed, encoder, checkpoints)
    cached("reward", reward_ingredients(seed, encoder), run.folder / "reward", build)


def train_embedded_reward(seed: int, encoder: str | None, checkpoints: Path, target: Path) -> None:
    """Train the embedded reward model of a seed into `target`, on an encoder if there is one.

    It resumes from `checkpoints`.
    """
    utterances = generate_utterances(seed, UTTERANCES)
    settings = _reward_settings(seed, encoder)

    with replace_folder(target) as folder, progress("reward model", settings.steps) as report:

        def on_step(done: int, loss: float) -> None:
            report(done, f"loss {loss:.3f}")

        train_reward_model(utterances, folder, checkpoints, settings, on_step)


def _reward_settings(seed: int, encoder: str | None) -> FitSettings:
    if encoder is None:
        return FitSettings(steps=REWARD_STEPS, batch_size=REWARD_BATCH, lr=REWARD_LR, seed=seed)
    return FitSettings(**_ON_ENCODER, seed=seed, encoder=encoder)


def reward_ingredients(seed: int, encoder: str | None = None) -> list[str]:
    """Return what the embedded reward model follows from: settings, seed, utterances, and the encoder's files."""
    settings = f"{REWARD_STEPS} steps of {REWARD_BATCH}, lr {REWARD_LR}"
    ingredients = [settings, f"seed {seed}", json.dumps(generate_utterances(seed, UTTERANCES))]
    if encoder is not None:
        ingredients += [repr(_ON_ENCODER), content_digest(Path(fetch(encoder, "reward.encoder")))]
    return ingredients
