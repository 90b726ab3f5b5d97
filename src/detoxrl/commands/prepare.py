"""What has to be there, and to fit, before a run begins?"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Column, Table
from transformers import PreTrainedTokenizerBase

from detoxrl.config.schema import Config
from detoxrl.data.embedded.corpus import generate_rows, generate_utterances
from detoxrl.data.rows import SPLITS, Row, rows_to_jsonl, token_lengths, with_prompts
from detoxrl.data.selection import Selection, select
from detoxrl.data.sources import read_source, read_texts
from detoxrl.errors import require
from detoxrl.evaluation.policies import NOTHING, Subjects, try_policies
from detoxrl.models.loading import load_tokenizer, require_positions, scratch_base, scratch_tokenizer
from detoxrl.models.lora import initial_adapter, load_policy, make_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import require_agreement
from detoxrl.report.words import data_account
from detoxrl.rewards.fit import train_reward_model
from detoxrl.rewards.function import RewardFunction
from detoxrl.runs import judges_of, readers_of, scorer
from detoxrl.runtime.cache import cached
from detoxrl.runtime.console import log, progress
from detoxrl.runtime.files import remove_path, replace_folder
from detoxrl.runtime.run_folder import RunFolder

UTTERANCES, REWARD_STEPS, REWARD_BATCH, REWARD_LR = 8_000, 150, 64, 1e-3


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What a run, or a mere measurement, starts from: rows with their prompts, and the tokenizer that counted them."""

    rows: dict[str, list[Row]]
    account: dict[str, Any]  # What became of every row of the source, how many prompts were cut, lengths in tokens.
    tokenizer: Any  # None where texts were read that others wrote.


def check(config: Config, given: RewardFunction | None = None, subjects: Subjects = NOTHING) -> Prepared:
    """Return what a run, or a mere measurement of subjects, starts from; writes nothing. Raises InputError."""
    judges_of(config)
    readers_of(config, None)
    if subjects.texts:
        require(given is None, "reward", "", "cannot score texts without prompts", "leave it out")
        rows = read_texts(subjects.texts, config.data)
        account = {"splits": {"texts": {"used for test": len(rows)}}, "truncated": {}, "prompt_tokens": None}
        return Prepared(rows={"test": rows}, account=account, tokenizer=None)
    scorer(config, None, given)
    with log.status("reading and counting the rows"):
        prepared = prepare_rows(config, ("test",) if subjects.policies else SPLITS)
    if subjects.policies:
        try_policies(config.policy.base, initial_adapter(config.policy), subjects.policies, config)
    else:
        checked_policy(config, prepared)
    return prepared


def checked_policy(config: Config, prepared: Prepared) -> Policy:
    """Return the policy that the run begins with, a scratch base untrained. Raises InputError when it does not fit."""
    if config.policy.base == "scratch":
        base = scratch_base(prepared.tokenizer, config.seed)
        return make_policy(base, prepared.tokenizer, None, config.policy, config.seed)
    policy = load_policy(config.policy.base, initial_adapter(config.policy), config.policy, config.seed)
    tunes = config.sft.steps + config.sft.baseline_steps > 0 and prepared.account["summary_tokens"]
    require_positions(policy.model.config, config, prepared.account["summary_tokens"]["max"] if tunes else 0)
    require_agreement(policy, config.policy.base)
    return policy


def write(folder: RunFolder, config: Config, prepared: Prepared) -> None:
    """Write the rows, their account, a scratch base's tokenizer, and the embedded reward model."""
    for split, rows in prepared.rows.items():
        folder.write(f"data/{split}.jsonl", rows_to_jsonl(rows))
    folder.write_json("rows.json", prepared.account)
    log.print(account_table(prepared.account))
    if config.policy.base == "scratch":
        with replace_folder(folder / "tokenizer") as tokenizer:
            prepared.tokenizer.save_pretrained(tokenizer)
    wanted = prepared.tokenizer and config.reward.function is None and config.reward.classifier == "embedded"
    if wanted and not (folder / "reward").is_dir():  # it is there when the run was stopped just then
        _train_reward_model(folder, config)
    remove_path(folder / "checkpoints/prepare")


def prepare_rows(config: Config, uses: Sequence[str] = SPLITS) -> Prepared:
    """Return the rows with their prompts, and the tokenizer that counted them, for `uses`. Raises InputError."""
    tokenizer = None if config.policy.base == "scratch" else load_tokenizer(config.policy.base)
    selection = _selection(config, tokenizer, uses)
    if tokenizer is None:
        some = selection.rows["train"][:4_000]
        prompts = [config.data.template.replace("{dialogue}", row.dialogue) for row in some]
        tokenizer = scratch_tokenizer([*prompts, *(row.summary or "" for row in some)], vocab_size=1500)
    rows, lengths = {}, {}
    for split in SPLITS:
        rows[split], lengths[split] = with_prompts(selection.rows[split], config.data, tokenizer)
    limit = config.data.max_prompt_tokens
    summaries = [row.summary for row in rows["train"] if row.summary is not None]
    account = {
        "splits": selection.outcomes,
        "truncated": {split: sum(length > limit for length in lengths[split]) for split in SPLITS},
        "prompt_tokens": _spread([min(length, limit) for split in SPLITS for length in lengths[split]]),
        "summary_tokens": _spread(token_lengths(tokenizer, summaries)) if summaries else None,
    }
    return Prepared(rows=rows, account=account, tokenizer=tokenizer)


def _selection(config: Config, tokenizer: PreTrainedTokenizerBase | None, uses: Sequence[str]) -> Selection:
    if config.data.source == "embedded":
        sizes = {"train": config.data.limit, "validation": config.rl.validation_prompts}
        rows = generate_rows(config.seed, sizes | {"test": config.evaluation.prompts})
        return Selection(rows=rows, outcomes={"embedded": {f"used for {split}": len(rows[split]) for split in SPLITS}})
    count = partial(token_lengths, tokenizer) if tokenizer and config.data.length_unit == "tokens" else None
    return select(read_source(config.data), config, count or (lambda texts: [*map(len, texts)]), uses)


def _spread(lengths: Sequence[int]) -> dict[str, int]:
    found = np.quantile(lengths, [0.5, 0.95, 1.0], method="nearest").tolist()
    return dict(zip(("median", "p95", "max"), found, strict=True))


def account_table(account: dict[str, Any]) -> Group:
    """Return what became of every row of the source, as a table for the screen, and what its prompts are like."""
    account = data_account(account)
    cut = ", ".join(f"{n} of {split}" for split, n in account["truncated"].items() if n) or "none"
    spread = account["prompt_tokens"]
    tokens = "prompt tokens: median {median}, 95 % up to {p95}, longest {max}".format(**spread) if spread else ""
    table = Table("rows", *(Column(split, justify="right") for split in account["splits"]), box=SIMPLE_HEAD)
    for outcome, counts in account["counts"].items():
        table.add_row(outcome, *map("{:,}".format, counts))
    table.add_row("in all", *map("{:,}".format, account["sums"]), style="bold")
    return Group(table, f"prompts cut to fit: {cut}; {tokens}")


def _train_reward_model(folder: RunFolder, config: Config) -> None:
    utterances = generate_utterances(config.seed, UTTERANCES)
    train = partial(train_reward_model, utterances, steps=REWARD_STEPS, batch_size=REWARD_BATCH, lr=REWARD_LR)

    def build(target: Path) -> None:
        with replace_folder(target) as temporary, progress("reward model", REWARD_STEPS) as reach:
            place = folder / "checkpoints/prepare"
            train(temporary, place, seed=config.seed, on_step=lambda done, loss: reach(done, f"loss {loss:.3f}"))

    settings = f"{config.seed} {REWARD_STEPS} {REWARD_BATCH} {REWARD_LR}"
    cached("reward model", [settings, json.dumps(utterances)], folder / "reward", build)
