"""With policy.checkpointing the same numbers come out, and less is kept for the backward pass."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModelForSeq2SeqLM
from transformers import (
    AutoTokenizer,
    CTRLConfig,
    CTRLLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
)

from backbones import BACKBONES, save_backbone
from conftest import Make, disturb, policy_config, small_config
from detoxrl.commands.forecast import Meter
from detoxrl.config.schema import PolicyConfig
from detoxrl.errors import InputError
from detoxrl.models.base import Base
from detoxrl.models.loading import load_base, save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.policy import Policy
from detoxrl.models.recompute import recomputing_layers
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.runtime.world import World
from detoxrl.training import memory
from detoxrl.training.finetune import Tuned, fine_tune
from detoxrl.training.memory import MemoryPlan
from learning import PROMPTS, TEXTS, learn, loop_config, rollout_of
from small_runs import detoxrl, own

IDS = torch.randint(3, 250, (4, 12), generator=torch.Generator().manual_seed(0))


def outputs_and_gradients(policy: Policy) -> list[torch.Tensor]:
    """The log-probs and values of IDS, and the gradient of every weight that trains."""
    logprobs, _, values = policy.logprobs(policy.encode(TEXTS), IDS, 0.7)
    weights = [*policy.parameters(), *policy.add_value_head().parameters()]
    factors = torch.randn(IDS.shape, generator=torch.Generator().manual_seed(2))
    gradients = torch.autograd.grad((logprobs * factors).sum() + (values * factors).sum(), weights)
    assert all(gradient.any() for gradient in gradients)
    return [logprobs.detach(), values.detach(), *gradients]


def assert_the_same_with_checkpointing(policy: Policy) -> None:
    disturb(policy)
    expected = outputs_and_gradients(policy)
    policy.checkpointing = True
    # The same operations on the same numbers: on a CPU the results are bit-identical.
    assert all(map(torch.equal, outputs_and_gradients(policy), expected))
    assert not any(module.training for module in policy.model.modules())
    assert not any("forward" in module.__dict__ for module in policy.model.modules())


@pytest.mark.parametrize("is_fast", [True, False])
def test_losses_and_gradients_are_the_same_although_models_have_dropout(policy: Policy, is_fast: bool) -> None:
    if is_fast and policy._network_class is PlainNetwork:
        pytest.skip("only T5 and Llama have a fast network")
    if not is_fast:
        policy._network_class = PlainNetwork
    assert_the_same_with_checkpointing(policy)


@pytest.mark.parametrize("kind", ["loaded with encoder", "full"])
@pytest.mark.parametrize("name", ["t5", "bart"])
def test_losses_and_gradients_are_the_same_if_the_encoder_trains(make_policy: Make, name: str, kind: str) -> None:
    assert_the_same_with_checkpointing(make_policy(name, kind, encoder=True))


@pytest.mark.parametrize("name", BACKBONES)
def test_losses_and_gradients_are_the_same_for_every_backbone(name: str, tmp_path: Path) -> None:
    base = save_backbone(BACKBONES[name], tmp_path / name)
    policy = load_policy(str(base), None, PolicyConfig(base=str(base), lora_rank=4), seed=0)
    assert_the_same_with_checkpointing(policy)
    held = memory._update_bytes(policy, PROMPTS[3], small_config()).response
    policy.checkpointing = False
    assert held < memory._update_bytes(policy, PROMPTS[3], small_config()).response


@pytest.mark.parametrize(("name", "kind"), [("t5", "loaded"), ("gpt2", "full")])
def test_training_ends_with_the_same_weights(make_policy: Make, tmp_path: Path, name: str, kind: str) -> None:
    records = {}
    weights = {}
    for checkpointing in (False, True):
        policy = make_policy(name, kind)
        policy.checkpointing = checkpointing
        records[checkpointing] = learn(policy, tmp_path / str(checkpointing), loop_config())
        weights[checkpointing] = torch.cat([weight.detach().flatten() for weight in policy.parameters()])
    for measure in ("policy/loss", "value/loss", "kl/reference", "ratio/max"):
        assert [record[measure] for record in records[True]] == [record[measure] for record in records[False]]
    assert torch.equal(weights[True], weights[False])


def test_a_policy_recomputes_if_its_config_says_so(bases: dict[str, Path], tmp_path: Path) -> None:
    for checkpointing in (False, True):
        config = replace(policy_config("t5"), checkpointing=checkpointing)
        policy = Base.load(str(bases["t5"])).policy(None, config, seed=0)
        assert policy.checkpointing == policy._network(None).checkpointing == checkpointing

    ctrl = CTRLConfig(vocab_size=300, n_embd=32, n_layer=1, n_head=2, dff=32, eos_token_id=1)
    save_base(CTRLLMHeadModel(ctrl), AutoTokenizer.from_pretrained(bases["gpt2"]), tmp_path)
    unknown = PolicyConfig(base=str(tmp_path), full_weights=True, checkpointing=True)
    with pytest.raises(InputError, match=r"policy\.checkpointing = True: knows no layers of a ctrl .*; leave it out"):
        load_policy(str(tmp_path), None, unknown, seed=0)


# Memory


def deep_gpt2(bases: dict[str, Path], folder: Path) -> Policy:
    """A GPT-2 of 8 layers, whose activations outweigh its logits."""
    config = GPT2Config(vocab_size=300, n_embd=64, n_layer=8, n_head=4, n_positions=256, eos_token_id=1)
    save_base(GPT2LMHeadModel(config), AutoTokenizer.from_pretrained(bases["gpt2"]), folder)
    return load_policy(str(folder), None, policy_config("gpt2"), seed=0)


def peak_of_update(policy: Policy) -> int:
    rollout = rollout_of(policy)
    with Meter() as meter:
        encoded = rollout.encoded if not policy.train_encoder else policy.encode(TEXTS)
        logprobs, _, _ = policy.logprobs(encoded, IDS, 1.0)
        logprobs.sum().backward()
    return meter.peak


@pytest.mark.parametrize("name", ["gpt2", "t5 with encoder"])
def test_the_peak_of_an_update_falls_and_the_estimate_follows_it(
    bases: dict[str, Path], make_policy: Make, tmp_path: Path, name: str
) -> None:
    policy = deep_gpt2(bases, tmp_path) if name == "gpt2" else make_policy("t5", "loaded with encoder", encoder=True)
    peaks = {}
    estimates = {}
    for checkpointing in (False, True):
        policy.checkpointing = checkpointing
        peaks[checkpointing] = peak_of_update(policy)
        estimates[checkpointing] = memory._update_bytes(policy, PROMPTS[3], small_config()).response
    layers = 8 if name == "gpt2" else 4
    assert peaks[True] < (0.4 if layers == 8 else 0.75) * peaks[False]
    measured = peaks[True] / peaks[False]
    assert 0.5 * measured < estimates[True] / estimates[False] < 2 * measured
    assert policy.checkpointing


def test_what_a_pass_saves_is_counted_without_being_kept(bases: dict[str, Path], tmp_path: Path) -> None:
    policy = deep_gpt2(bases, tmp_path)
    with Meter() as meter:
        saved = memory._update_bytes(policy, PROMPTS[3], small_config()).response
    assert meter.peak < saved / 2


def test_a_memory_plan_holds_for_one_way_to_keep_activations(make_policy: Make, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    config = loop_config()
    recomputing = replace(config, policy=replace(config.policy, checkpointing=True))
    plan = MemoryPlan(microbatch_size=3, keep_cross=True)

    plan.save(folder, config, World())
    assert MemoryPlan.stored(folder, config, World()) == plan
    assert MemoryPlan.stored(folder, recomputing, World()) is None
    stored = json.loads((tmp_path / "memory.json").read_text())
    del stored["checkpointing"]  # Of an earlier version.
    (tmp_path / "memory.json").write_text(json.dumps(stored))
    assert MemoryPlan.stored(folder, config, World()) == plan
    plan.save(folder, recomputing, World())
    assert MemoryPlan.stored(folder, recomputing, World()) == plan


# The warm start


@pytest.mark.parametrize("name", ["t5", "bart", "gpt2", "llama"])
def test_fine_tuning_draws_the_same_dropout_and_ends_with_the_same_weights(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    pairs = [(text, "They quarrel.") for text in TEXTS]
    sft = replace(small_config().sft, steps=2, batch_size=2, bf16=False)
    config = replace(small_config(), sft=sft)

    def tuned(recomputes: bool) -> tuple[list[float], torch.Tensor]:
        model, tokenizer = load_base(str(bases[name]))
        model.requires_grad_(True)
        steps = fine_tune(Tuned(model, tokenizer), pairs, config, tmp_path / f"{recomputes}")
        if not recomputes:
            losses = [loss for _, loss in steps]
        else:
            with recomputing_layers(model):
                losses = [loss for _, loss in steps]
        return losses, torch.cat([weight.detach().flatten() for weight in model.parameters()])

    losses, weights = tuned(False)
    same_losses, same_weights = tuned(True)
    assert same_losses == losses
    assert torch.equal(same_weights, weights)


@pytest.mark.parametrize("whole", [False, True])
def test_every_fine_tuning_of_a_run_saves_memory_too(place: Path, monkeypatch: pytest.MonkeyPatch, whole: bool) -> None:
    recomputing: list[type[torch.nn.Module]] = []

    @contextmanager
    def recording(model: torch.nn.Module) -> Iterator[None]:
        with recomputing_layers(model):
            recomputing.append(type(model))
            yield

    monkeypatch.setattr("detoxrl.training.sft.recomputing_layers", recording)
    sft = ["--sft.steps", "2", "--sft.batch-size", "4", "--sft.baseline-steps", "1"]
    words = own("--run-dir", "run", *sft, "--sft.full-weights" if whole else "--sft.no-full-weights")
    assert detoxrl([*words, "--policy.checkpointing"]) == 0
    warm_start = T5ForConditionalGeneration if whole else PeftModelForSeq2SeqLM
    assert recomputing == [warm_start, PeftModelForSeq2SeqLM]

    weights = (place / "run/adapter/adapter_model.safetensors").read_bytes()
    recomputing.clear()
    assert detoxrl([*words, "--overwrite"]) == 0
    assert recomputing == []
    assert (place / "run/adapter/adapter_model.safetensors").read_bytes() == weights
