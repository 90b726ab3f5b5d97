"""What does the sft stage make: the warm start, and the baselines without reinforcement learning?"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from detoxrl.models.base import Base
from detoxrl.models.loading import load_tokenizer, save_base, scratch_base
from detoxrl.models.policy import Policy
from detoxrl.models.recompute import recomputing_layers
from detoxrl.runs import Run
from detoxrl.runtime.cache import cached, require_cacheable
from detoxrl.runtime.console import log, progress
from detoxrl.runtime.files import content_digest, remove_path, replace_folder
from detoxrl.training.finetune import Pairs, Tuned, fine_tune
from detoxrl.training.own_samples import SAMPLES, own_samples
from detoxrl.training.preferences import PreferencePair, learn_preferences, preference_pairs

_CHECKPOINTS = "checkpoints/sft"
_OWN_SAMPLES = f"{_CHECKPOINTS}/samples.json"

Tune = Callable[[Run, Path, Path], None]
"""Fine-tunes for a run, into a folder, with checkpoints in another."""


def require_cacheable_warm_start(run: Run) -> None:
    """Raise InputError when the run has a warm start that goes to the cache, and the cache cannot be written."""
    if run.config.sft.steps > 0 and run.config.policy.base == "scratch":
        name = "base" if run.config.sft.full_weights else "start"
        require_cacheable(name, warm_start_ingredients(run))


def run_sft(run: Run) -> None:
    """Make the warm start in base/ or start/, and the baselines in baseline/, expert/ and dpo/, if asked for."""
    sft = run.config.sft
    if sft.steps > 0:
        _make(run, "base" if sft.full_weights else "start", warm_start, warm_start_ingredients(run))
    if sft.baseline_steps > 0:
        if any(row.civil_references for row in run.rows("train")):
            _make(run, "baseline", civil_baseline, _civil_baseline_ingredients(run))
        _make(run, "expert", expert_baseline, None)
        _make_dpo_baseline(run)
    remove_path(run.folder / _CHECKPOINTS)


def _make(run: Run, name: str, tune: Tune, ingredients: list[str] | None) -> None:
    """Make one product of the stage, unless it was made before the run was stopped.

    It is cached by its ingredients. Only what follows from the config alone has some: a user's base or reward may
    change behind its name.
    """

    def build(target: Path) -> None:
        checkpoints = run.folder / _CHECKPOINTS / name
        with replace_folder(target) as folder:
            tune(run, folder, checkpoints)
        remove_path(checkpoints)

    target = run.folder / name
    if target.is_dir():
        return

    if ingredients is not None and run.config.policy.base == "scratch":
        cached(name, ingredients, target, build)
    else:
        build(target)


def warm_start_ingredients(run: Run) -> list[str]:
    """Return what the warm start of a scratch base follows from: settings, seed, prompts and references."""
    sft = run.config.sft
    settings = f"{sft.steps} steps of {sft.batch_size}, lr {sft.lr}, warm-up {sft.warmup_steps}, bf16 {sft.bf16}"
    return [settings, f"seed {run.config.seed}", json.dumps(_reference_pairs(run))]


def _reference_pairs(run: Run) -> Pairs:
    """Return each training prompt with each of its references."""
    return [(row.prompt, reference) for row in run.rows("train") for reference in row.references]


def _civil_baseline_ingredients(run: Run) -> list[str]:
    config = run.config
    base = content_digest(run.folder / "base")
    rows = content_digest(run.folder / "data/train.jsonl")
    return [base, rows, repr(config.sft), repr(config.policy), str(config.seed)]


def warm_start(run: Run, folder: Path, checkpoints: Path) -> None:
    """Fine-tune on the references; save a whole model with its tokenizer, or a LoRA adapter."""
    config = run.config
    pairs = _reference_pairs(run)
    if not config.sft.full_weights:
        policy = run.initial_policy().to(run.world.device)
        steps = fine_tune(Tuned.of(policy), pairs, config, checkpoints)
        with _saving_memory(run, policy.model):
            _show_progress("warm start", config.sft.steps, steps)
        policy.save(folder)
        return

    if config.policy.base == "scratch":
        tokenizer = load_tokenizer(str(run.folder / "tokenizer"))
        base = Base(scratch_base(tokenizer, config.seed), tokenizer, "scratch")
    else:
        base = run.base(bf16=False)
    model: Any = base.model()
    model.to(run.world.device)
    steps = fine_tune(Tuned(model, base.tokenizer), pairs, config, checkpoints)
    with _saving_memory(run, model):
        _show_progress("warm start", config.sft.steps, steps)
    save_base(model, base.tokenizer, folder)


def civil_baseline(run: Run, folder: Path, checkpoints: Path) -> None:
    """Fine-tune the initial policy's weights on the civil references, and save them."""
    policy = run.initial_policy().to(run.world.device)
    pairs = [(row.prompt, reference) for row in run.rows("train") for reference in row.civil_references]
    _tune_baseline("civil baseline", run, policy, pairs, checkpoints)
    policy.save(folder)


def expert_baseline(run: Run, folder: Path, checkpoints: Path) -> None:
    """Fine-tune the initial policy's weights on the best, by the reward, of its own 4 responses to a prompt.

    Each prompt is seen about four times: one round of expert iteration (Anthony et al. 2017).
    """
    pairs = [(own.prompt, own.best.response.text) for own in own_samples(run, _OWN_SAMPLES)]
    policy = run.initial_policy().to(run.world.device)
    _tune_baseline("best-of-4 baseline", run, policy, pairs, checkpoints)
    policy.save(folder)


def _make_dpo_baseline(run: Run) -> None:
    """Make the DPO baseline, unless it was made before or has nothing to learn from."""
    if (run.folder / "dpo").is_dir():
        return
    if _pairs(run):
        _make(run, "dpo", dpo_baseline, None)
    else:
        log.print(f"sft: no DPO baseline: each prompt's {SAMPLES} samples are alike in text or score")


def dpo_baseline(run: Run, folder: Path, checkpoints: Path) -> None:
    """Train the initial policy's weights by DPO on the best and the worst, by the reward, of its own 4 responses.

    Each prompt is seen about twice.
    """
    pairs = _pairs(run)
    policy = run.initial_policy().to(run.world.device)
    steps = learn_preferences(policy, pairs, run.config, checkpoints)
    _show_progress("DPO baseline", run.config.sft.baseline_steps, steps)
    policy.save(folder)


def _pairs(run: Run) -> list[PreferencePair]:
    return preference_pairs(own_samples(run, _OWN_SAMPLES))


def _tune_baseline(name: str, run: Run, policy: Policy, pairs: Pairs, checkpoints: Path) -> None:
    sft = run.config.sft
    config = replace(run.config, sft=replace(sft, steps=sft.baseline_steps, lr=sft.baseline_lr))
    steps = fine_tune(Tuned.of(policy), pairs, config, checkpoints)
    with _saving_memory(run, policy.model):
        _show_progress(name, sft.baseline_steps, steps)


def _saving_memory(run: Run, model: torch.nn.Module) -> AbstractContextManager[None]:
    """Have backward passes inside the block recompute the layers of the model, if the run asks for that."""
    return recomputing_layers(model) if run.config.policy.checkpointing else nullcontext()


def _show_progress(name: str, total: int, steps: Iterator[tuple[int, float]]) -> None:
    """Make the optimizer steps of a fine-tuning, and show how many are done and the loss."""
    with progress(name, total) as report:
        for done, loss in steps:
            report(done, f"loss {loss:.3f}")
