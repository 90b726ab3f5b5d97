"""Will a run work here, and what will it take, before hours are spent?"""

import os
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from accelerate import PartialState
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel

from detoxrl.commands.forecast import bare_policy, stage_memory, weight_bytes
from detoxrl.commands.preflight import checked_config
from detoxrl.commands.prepare import (
    Prepared,
    account_table,
    checked_policy,
    first_prompt,
    load_reward_and_judges,
    precision_notice,
    prepare_rows,
    require_fitting_shapes,
)
from detoxrl.commands.timing import finetuning_seconds, policy_seconds
from detoxrl.commands.workload import stage_seconds
from detoxrl.config.schema import Config
from detoxrl.config.sources import judging_classifiers, reward_classifiers, sources, with_absolute_paths
from detoxrl.data.rows import rows_to_jsonl, to_prompts
from detoxrl.errors import require
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws
from detoxrl.rewards.classifier import is_multi_label, load_classifier_shapes
from detoxrl.rl.kl import k1
from detoxrl.runs import Run
from detoxrl.runtime.console import status
from detoxrl.runtime.hub import download_size
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.memory import free_bytes
from detoxrl.training.rollout import collect_rollout

_OUT = Console(highlight=False)
# Size of the batch on which the first step is checked: prompts, and tokens per response.
_CHECKED_PROMPTS = 2
_CHECKED_TOKENS = 16


def doctor(root: Path, config: Config) -> None:
    """Print what a run in `root` would take, and try every part of it. Writes nothing there.

    Memory and disk are estimated from shapes, before any weights are fetched. Time is estimated from one real step of
    each stage. Raises InputError for too little memory or disk, for labels that are reversed, and for a policy that
    differs from its reference before training.
    """
    processes: int = PartialState().num_processes
    require(processes == 1, "processes", processes, "the doctor runs in one process", "start it without a launcher")
    config = checked_config(with_absolute_paths(config))
    run = Run(RunFolder(root), config)
    with run.as_configured():
        _examine(run)


def _examine(run: Run) -> None:
    config = run.config
    root = run.folder.root
    device = run.world.device
    with status("reading the rows and the shapes of the models"):
        prepared = prepare_rows(config)
        require_fitting_shapes(config, prepared)
        classifiers = _classifier_shapes(config)
    _OUT.print(account_table(prepared.account))
    _print_device(device)
    notice = precision_notice(config, device)
    if notice:
        _OUT.print(notice, soft_wrap=True)

    with status("estimating memory"):
        peaks = stage_memory(config, prepared, list(classifiers.values()))
    _require_memory(peaks, device)
    _require_disk(root, config, prepared)
    _print_labels(classifiers)

    with status("fetching and trying the models"):
        run.use_rows(prepared.rows)
        load_reward_and_judges(run)
        kl, error = _first_step(checked_policy(run, prepared).to(device), config, prepared)
    _OUT.print(first_prompt(run, prepared.account), soft_wrap=True)
    _OUT.print(f"labels: {'right on a civil and a toxic sentence' if classifiers else 'no classifier to try'}")
    _OUT.print(f"KL to the reference at step 0: {kl:.1g} nats; first ratios: within {error:.1g} of 1")

    with status("timing one step of each stage"):
        seconds = policy_seconds(run, prepared)
        seconds = seconds._replace(finetune=finetuning_seconds(run, prepared))
    _print_seconds(stage_seconds(config, prepared.rows, seconds))
    if run.uses_embedded_reward:
        _OUT.print("not included: training the embedded reward model, and its scores")
    _OUT.print(f"ready: detoxrl run {config.recipe} with the same flags")


def _classifier_shapes(config: Config) -> dict[str, PreTrainedModel]:
    """Return the classifiers that the config names for reward and primary judge, by setting, on the meta device."""
    primary = "evaluation.primary_judge"
    named = reward_classifiers(config)
    named += [classifier for classifier in judging_classifiers(config) if classifier.setting == primary]
    return {setting: load_classifier_shapes(source, setting, labels) for setting, source, labels in named}


def _print_device(device: torch.device) -> None:
    notes = {"cpu": f"{torch.get_num_threads()} threads", "mps": "not tested; no operation needs float64"}
    _OUT.print(f"device: {device.type} ({notes.get(device.type, 'one of them is used')})")
    if os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"):
        _OUT.print("PYTORCH_ENABLE_MPS_FALLBACK is set: unset it, because no operation needs it and it hides slow ones")


def _print_labels(classifiers: dict[str, PreTrainedModel]) -> None:
    for setting, classifier in classifiers.items():
        kind = "one sigmoid per label" if is_multi_label(classifier.config) else "one softmax"
        _OUT.print(f"{setting}: {classifier.config.num_labels} labels, {kind}")


def _require_memory(peaks: dict[str, float], device: torch.device) -> None:
    """Print the peak memory of the stages. Raises InputError when less is free."""
    columns = ("stage", Column("peak memory", justify="right"))
    table = Table(*columns, box=SIMPLE_HEAD, caption="estimated from shapes")
    for stage, peak in peaks.items():
        table.add_row(stage, f"{peak / 2**30:.1f} GiB")
    _OUT.print(table)

    peak = max(peaks.values())
    free = free_bytes(device)
    if device.type != "cuda":
        free += psutil.Process().memory_info().rss  # The peaks include it.

    rule = f"is free, but the run needs about {peak / 2**30:.1f} GiB"
    remedy = "try --policy.bf16, a smaller --rl.microbatch-size or --generation.batch-size, or a smaller base"
    require(peak < free, "memory", f"{free / 2**30:.1f} GiB", rule, remedy)


def _require_disk(root: Path, config: Config, prepared: Prepared) -> None:
    """Print what trains, and what is fetched and written. Raises InputError when the disk has too little space."""
    policy = bare_policy(config, prepared.tokenizer)
    trained = sum(weight.numel() for weight in policy.parameters())
    every = sum(weight.numel() for weight in policy.model.parameters())
    _OUT.print(f"policy: {trained:,} of {every:,} parameters train")

    written = _written_bytes(config, prepared, policy)
    small = ("data.source", "policy.adapter")
    fetched = sum(download_size(source, name) for name, source in sources(config).items() if name not in small)
    existing = next(parent for parent in (root, *root.absolute().parents) if parent.exists())
    free = psutil.disk_usage(str(existing)).free

    rule = f"is free, but the run writes up to {written / 2**20:,.0f} MiB and fetches {fetched / 2**20:,.0f} MiB"
    remedy = "free some space, or name another --run-dir"
    require(written + fetched < free, "disk", f"{free / 2**20:,.0f} MiB", rule, remedy)
    _OUT.print(f"disk: up to {written / 2**20:,.1f} MiB in {root}, {fetched / 2**20:,.0f} MiB to fetch")


def _written_bytes(config: Config, prepared: Prepared, policy: Policy) -> int:
    """Return the maximum bytes of a run folder: rows, policies and checkpoints."""
    trained = weight_bytes(policy)
    whole = weight_bytes(policy.model)
    adapter = whole if config.policy.full_weights else trained
    baselines = 3 * adapter if config.sft.baseline_steps > 0 else 0
    start = 0
    if config.sft.steps > 0:
        start = whole if config.sft.full_weights else trained

    # A checkpoint has the weights that train and their two moments, and one of `train` also the best policy. Two are
    # kept while a third is written.
    checkpoints = 3 * max(3 * start, 3 * trained + adapter)
    rows = sum(len(rows_to_jsonl(split).encode()) for split in prepared.rows.values())
    return rows + start + adapter + baselines + checkpoints


def _first_step(policy: Policy, config: Config, prepared: Prepared) -> tuple[float, float]:
    """Return the KL to the reference (nats per response) and how far probability ratios are from 1, before any update.

    Raises InputError when one of them is not 0 up to rounding.
    """
    prompts = to_prompts(prepared.rows["train"][:_CHECKED_PROMPTS])
    generation = replace(config.generation, max_new_tokens=min(_CHECKED_TOKENS, config.generation.max_new_tokens))
    rollout = collect_rollout(policy, prompts, generation, Draws(config.seed, "rollout"))
    responses = rollout.responses
    kl = float(k1(responses.logprobs, rollout.ref_logprobs).sum(1).mean())

    # An update reads other batches than sampling does. Here it reads one row at a time.
    parts = []
    with torch.no_grad():
        for row in torch.arange(len(responses.ids), device=policy.device).split(1):
            encoded = rollout.encoded.select(row)
            logprobs, _, _ = policy.logprobs(encoded, responses.ids[row], generation.temperature)
            parts.append(logprobs)

    log_ratios = (torch.cat(parts) - responses.logprobs)[responses.response_mask]
    error = float(log_ratios.expm1().abs().max())

    bound = 0.1 if config.policy.bf16 else 1e-3
    remedy = "name another base or adapter"
    require(abs(kl) < bound, "policy", kl, "must be 0: the KL in nats to its reference before training", remedy)
    require(error < bound, "policy", error, "must be 0: the distance of its first probability ratios from 1", remedy)
    return kl, error


def _print_seconds(stages: dict[str, float]) -> None:
    columns = ("stage", Column("estimated time", justify="right"))
    caption = "from one step of each stage, measured here; responses as long as the references"
    table = Table(*columns, box=SIMPLE_HEAD, caption=caption)
    for stage, seconds in stages.items():
        table.add_row(stage, f"{seconds / 60:.1f} min")
    _OUT.print(table, f"total: about {sum(stages.values()) / 60:.1f} min", sep="\n")
