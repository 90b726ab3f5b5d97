"""How much memory and time will a run take on this machine?"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator
from rich.console import Console

from detoxrl.config import Config
from detoxrl.data.rows import rows_to_jsonl, to_prompts
from detoxrl.parts import scorer
from detoxrl.policy.adapters import load_policy
from detoxrl.policy.backbone import save_base, scratch_base
from detoxrl.policy.policy import Policy
from detoxrl.prepare import Prepared, account_table
from detoxrl.rewards.function import RewardFunction
from detoxrl.rollout import collect, sample_texts
from detoxrl.sft import fine_tune
from detoxrl.tracking import STAGES, log
from detoxrl.train import Targets, update


def estimate(config: Config, prepared: Prepared, given: RewardFunction | None = None) -> dict[str, float]:
    """Return seconds by stage, `disk_mib`, and `peak_gib` of this process's memory, by doing one step of each stage.

    A scratch base is not trained yet, so its responses run to the length limit and the estimate is an upper bound.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place, base = Path(temporary), config.policy.base
        if base == "scratch":
            base = str(place / "base")
            save_base(scratch_base(prepared.tokenizer, config.seed), prepared.tokenizer, Path(base))
        start = Path(config.policy.adapter) if config.policy.adapter else None
        policy = load_policy(base, start, config.policy, config.seed)
        return _measured(config, prepared, given, policy, place)


def _measured(
    config: Config, prepared: Prepared, given: RewardFunction | None, policy: Policy, place: Path
) -> dict[str, float]:
    log.print("measuring one step of each stage")
    step, disk = _step_seconds(config, prepared, policy, given), _disk_mib(config, prepared, policy)
    response = _response_seconds(config, prepared, policy)
    validated = (-(-config.rl.steps // config.rl.validate_every) + 1) * len(prepared.rows["validation"])
    policies = 3 if config.sft.baseline_steps and any(row.civil_reference for row in prepared.rows["train"]) else 2
    sampled = policies * len(prepared.rows["test"]) * config.evaluation.samples_per_prompt
    tuning = config.sft.steps + (policies - 2) * config.sft.baseline_steps
    return {
        "sft": tuning * _sft_seconds(config, prepared, policy, place) if tuning else 0.0,
        "train": config.rl.steps * step + validated * response,
        "evaluate": sampled * response,
        "disk_mib": disk,
        "peak_gib": peak_memory(),
    }


def _disk_mib(config: Config, prepared: Prepared, policy: Policy) -> float:
    """Return the most that the run folder will hold, in MiB: two checkpoints and a third that is being written."""
    trained, whole = (_bytes(weights) for weights in (policy.parameters(), policy.model.parameters()))
    tuned = whole if config.sft.full_weights else trained
    kept = whole if config.policy.full_weights else trained
    parts = sum(len(rows_to_jsonl(rows).encode()) for rows in prepared.rows.values())
    parts += tuned * (config.sft.steps > 0) + kept * (config.sft.baseline_steps > 0) + kept
    adam = 3  # a weight and its two moments
    return (parts + 3 * max(adam * tuned * (config.sft.steps > 0), adam * trained + kept)) / 2**20


def _bytes(weights: Iterable[torch.nn.Parameter]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _step_seconds(config: Config, prepared: Prepared, policy: Policy, given: RewardFunction | None) -> float:
    """Return the seconds of one rollout, its scores (an embedded reward costs next to nothing) and its update."""
    accelerator = Accelerator()
    policy.to(accelerator.device)
    optimizer = accelerator.prepare(torch.optim.AdamW(policy.parameters(), lr=0.0))
    reward = scorer(config, None, given)
    prompts = to_prompts(prepared.rows["train"][: config.rl.batch_size])
    started = time.perf_counter()
    rollout = collect(policy, prompts, config.generation, seed=config.seed, step=0)
    if reward is not None:
        reward.reward([prompt.text for prompt in rollout.prompts], rollout.texts)
    values = rollout.responses.values
    update(policy, accelerator, optimizer, rollout, Targets(advantages=values, returns=values), config, 0)
    return time.perf_counter() - started


def _response_seconds(config: Config, prepared: Prepared, policy: Policy) -> float:
    prompts = to_prompts(prepared.rows["test"][: config.generation.batch_size])
    started = time.perf_counter()
    sample_texts(policy, prompts, config.generation, seed=config.seed, stream="estimate")
    return (time.perf_counter() - started) / len(prompts)


def _sft_seconds(config: Config, prepared: Prepared, policy: Policy, place: Path) -> float:
    if config.sft.full_weights:
        policy.model.requires_grad_(True)
    pairs = [(row.prompt, row.summary or "") for row in prepared.rows["train"][: 3 * config.sft.batch_size]]
    ends: list[float] = []

    def note(done: int, loss: float) -> None:
        ends.append(time.perf_counter())

    fine_tune(policy.model, policy.tokenizer, pairs, replace(config.sft, steps=3), 0, place / "checkpoints", note)
    return (ends[2] - ends[0]) / 2


def peak_memory() -> float:
    """Return the most memory this process has held, in GiB."""
    if sys.platform == "win32":
        return float(psutil.Process().memory_info().peak_wset) / 2**30
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak / (2**30 if sys.platform == "darwin" else 2**20)


def print_estimate(prepared: Prepared, found: dict[str, float], root: Path) -> None:
    """Print what became of the rows, lengths in tokens, and the estimate for a run in the folder `root`."""
    console = Console(highlight=False)
    console.print(account_table(prepared.account))
    if prepared.account["summary_tokens"]:
        words = "summary tokens: median {median}, 95 % up to {p95}, longest {max}"
        console.print(words.format(**prepared.account["summary_tokens"]))
    seconds = {stage: value for stage, value in found.items() if stage in STAGES}
    stages = ", ".join(f"{stage} {value / 60:.1f} min" for stage, value in seconds.items())
    console.print(f"time: about {sum(seconds.values()) / 60:.1f} min ({stages}), measured by one step of each stage")
    console.print(f"memory: about {found['peak_gib']:.1f} GiB at its peak; a long run may take half as much again")
    free = psutil.disk_usage(str(next(parent for parent in (root, *root.absolute().parents) if parent.exists()))).free
    enough = "" if free / 2**20 > found["disk_mib"] else ", WHICH IS TOO LITTLE"
    console.print(
        f"disk: about {found['disk_mib']:,.0f} MiB in {root} at most; {free / 2**20:,.0f} MiB are free{enough}"
    )
    console.print("nothing was written; leave --dry-run out to run")
