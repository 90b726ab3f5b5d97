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

from detoxrl.commands.forecast import Cost, bare_policy, measured_speed, stage_costs, weight_bytes
from detoxrl.commands.prepare import Prepared, account_table, checked_policy, prepare_rows
from detoxrl.config.schema import Config
from detoxrl.data.rows import rows_to_jsonl, to_prompts
from detoxrl.errors import require
from detoxrl.models.policy import Policy
from detoxrl.rewards.classifier import is_multi_label, load_classifier_shapes
from detoxrl.rl.kl import k1
from detoxrl.runs import judges_of, label_settings, scorer, sources, with_absolute_paths, with_revisions
from detoxrl.runtime.console import log
from detoxrl.runtime.hub import download_size
from detoxrl.training.memory import free_bytes
from detoxrl.training.rollout import collect_rollout

_OUT = Console(highlight=False)


def doctor(root: Path, config: Config) -> None:
    """Print what a run in `root` would take, by shapes alone; then fetch its parts and try them. Writes nothing there.

    Raises InputError for what does not fit: labels, memory, disk, a policy that does not start at its reference.
    """
    config = with_revisions(with_absolute_paths(config), None)
    with log.status("reading rows and shapes"):
        prepared, found = prepare_rows(config), sources(config)
        named = [name for name in ("reward.classifier", "evaluation.primary_judge") if name in found]
        classifiers = [load_classifier_shapes(found[name], name, label_settings(config, name)) for name in named]
    _OUT.print(account_table(prepared.account))
    device: torch.device = PartialState().device
    words = {"cpu": f"{torch.get_num_threads()} threads", "mps": "which we could not try; nothing here needs float64"}
    _OUT.print(f"device: {device.type} ({words.get(device.type, 'one of them is used')})")
    if os.environ.get("PYTORCH_ENABLE_MPS_FALLBACK"):
        _OUT.print("PYTORCH_ENABLE_MPS_FALLBACK is set: unset it, nothing here needs it and it hides what is slow")
    with log.status("forecasting"):
        costs = stage_costs(config, prepared, classifiers, measured_speed(device))
    _require_memory(costs, device)
    _require_disk(root, config, prepared)
    for name, shape in zip(named, (classifier.config for classifier in classifiers), strict=True):
        _OUT.print(f"{name}: {shape.num_labels} labels, {'a sigmoid each' if is_multi_label(shape) else 'one softmax'}")
    with log.status("fetching and trying the parts"):
        judges_of(config)
        scorer(config, None, None)
        kl, error = _first_step(checked_policy(config, prepared).to(device), config, prepared)
    _OUT.print("labels: none is reversed on a civil and a toxic sentence" if named else "labels: no classifier to try")
    _OUT.print(f"KL to the reference at step 0: {kl:.1g} nats; first ratios: within {error:.1g} of 1")
    _OUT.print(f"ready: detoxrl run {config.recipe} with the same flags")


def _first_step(policy: Policy, config: Config, prepared: Prepared) -> tuple[float, float]:
    """Return the KL to the reference (nats a response) and how far ratios are off 1, both before any update.

    Raises InputError when one is not 0 up to rounding.
    """
    prompts = to_prompts(prepared.rows["train"][: config.rl.minibatch_size])
    generation = replace(config.generation, max_new_tokens=min(16, config.generation.max_new_tokens))
    rollout = collect_rollout(policy, prompts, generation, seed=config.seed, step=0)
    responses, temperature, remedy = rollout.responses, config.generation.temperature, "name another base or adapter"
    rows = torch.arange(len(responses.ids), device=policy.device).split(1)  # an update has other batches too
    with torch.no_grad():
        apart = [policy.logprobs(rollout.encoded.select(row), responses.ids[row], temperature)[0] for row in rows]
    kl = float(k1(responses.logprobs, rollout.ref_logprobs).sum(1).mean())
    error = float((torch.cat(apart) - responses.logprobs)[responses.response_mask].expm1().abs().max())
    bound = 0.1 if config.policy.bf16 else 1e-3
    require(abs(kl) < bound, "policy", kl, "is the KL to its own start in nats, not 0", remedy)
    require(error < bound, "policy", error, "is how far first ratios are off 1", remedy)
    return kl, error


def _require_memory(costs: dict[str, Cost], device: torch.device) -> None:
    """Print what the stages cost. Raises InputError when less memory is free."""
    columns = "stage", Column("about", justify="right"), Column("peak memory", justify="right")
    table = Table(*columns, box=SIMPLE_HEAD, caption="by shapes alone; responses as long as the references")
    for stage, cost in costs.items():
        table.add_row(stage, f"{cost.seconds / 60:.1f} min", f"{cost.peak / 2**30:.1f} GiB")
    _OUT.print(table, f"in all: about {sum(cost.seconds for cost in costs.values()) / 60:.1f} min")
    peak, here = max(cost.peak for cost in costs.values()), psutil.Process().memory_info().rss  # which is part of it
    free = free_bytes(device) + (0 if device.type == "cuda" else here)
    remedy = "try --policy.bf16, a smaller --rl.microbatch-size or --generation.batch-size, or a smaller base"
    rule = f"is free, and the run wants about {peak / 2**30:.1f} GiB"
    require(peak < free, "memory", f"{free / 2**30:.1f} GiB", rule, remedy)


def _require_disk(root: Path, config: Config, prepared: Prepared) -> None:
    """Print what trains, and what is fetched and written. Raises InputError when the disk has no room for it."""
    policy = bare_policy(config, prepared.tokenizer)
    some, every = (sum(weight.numel() for weight in of.parameters()) for of in (policy, policy.model))
    _OUT.print(f"policy: {some:,} parameters train, of {every:,}")
    trained, whole = weight_bytes(policy), weight_bytes(policy.model)
    tuned = (whole if config.sft.full_weights else trained) * (config.sft.steps > 0)
    kept = whole if config.policy.full_weights else trained
    wanted = sum(len(rows_to_jsonl(rows).encode()) for rows in prepared.rows.values())
    wanted += tuned + kept * (1 + 2 * (config.sft.baseline_steps > 0))
    wanted += 3 * max(3 * tuned, 3 * trained + kept)  # two checkpoints and one being written: weights and two moments
    small = ("data.source", "policy.adapter")
    fetched = sum(download_size(source, name) for name, source in sources(config).items() if name not in small)
    free = psutil.disk_usage(str(next(parent for parent in (root, *root.absolute().parents) if parent.exists()))).free
    rule = f"is free, and the run writes up to {wanted / 2**20:,.0f} MiB and fetches {fetched / 2**20:,.0f} MiB"
    require(wanted + fetched < free, "disk", f"{free / 2**20:,.0f} MiB", rule, "make room, or name another --run-dir")
    _OUT.print(f"disk: up to {wanted / 2**20:,.1f} MiB in {root}, {fetched / 2**20:,.0f} MiB to fetch")
