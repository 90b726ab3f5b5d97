"""Tiny real models of each architecture, made once per session; nothing touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, T5Config, T5ForConditionalGeneration

from detoxrl.config import Config, DataConfig, PolicyConfig
from detoxrl.data.corpus import generate_rows
from detoxrl.data.rows import Row
from detoxrl.data.utterances import generate_utterances
from detoxrl.policy.adapters import load_policy
from detoxrl.policy.backbone import save_base, scratch_tokenizer
from detoxrl.policy.encoder_decoder import EncoderDecoderPolicy
from detoxrl.recipes import recipe
from detoxrl.reward_training import train_reward_model

transformers.utils.logging.disable_progress_bar()
torch.set_num_threads(2)

TARGETS = {"t5": ("q", "v"), "bart": ("q_proj", "v_proj")}


def _t5(vocab: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocab, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.1, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _bart(vocab: int) -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=vocab, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, dropout=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
        init_std=0.2,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random T5 and BART with one tokenizer that fits the embedded corpus."""
    rows = generate_rows(0, {"train": 300})["train"]
    tokenizer = scratch_tokenizer([row.dialogue for row in rows] + [row.summary for row in rows], vocab_size=300)
    folders = {}
    for name, make in {"t5": _t5, "bart": _bart}.items():
        torch.manual_seed(7)
        folders[name] = tmp_path_factory.mktemp("bases") / name
        save_base(make(len(tokenizer)), tokenizer, folders[name])
    return folders


@pytest.fixture(scope="session")
def reward_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny RoBERTa with the labels nothate and hate that knows insults."""
    folder = tmp_path_factory.mktemp("classifier") / "reward"
    losses: list[float] = []
    train_reward_model(
        generate_utterances(0, 3000), folder, steps=150, batch_size=64, lr=1e-3, seed=0, on_step=losses.append
    )
    assert losses[0] > 0.5 > 0.2 > losses[-1]
    return folder


def policy_config(name: str, encoder: bool = False) -> PolicyConfig:
    """A small adapter for one of the tiny bases."""
    return PolicyConfig(base="given", lora_rank=4, lora_alpha=8, lora_targets=TARGETS[name], lora_encoder=encoder)


def disturb(policy: EncoderDecoderPolicy, scale: float = 0.3) -> None:
    """Move every trainable adapter weight and the value head, as training would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*policy.adapter_parameters(), *policy.value_head.parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(params=["t5", "bart"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fresh(bases: dict[str, Path], architecture: str) -> EncoderDecoderPolicy:
    """A policy under a fresh LoRA."""
    return load_policy(str(bases[architecture]), None, policy_config(architecture), seed=0)


@pytest.fixture
def start(bases: dict[str, Path], architecture: str, tmp_path: Path) -> Path:
    """A saved LoRA with parts in the encoder too, far from the bare base."""
    trained = load_policy(str(bases[architecture]), None, policy_config(architecture, encoder=True), seed=0)
    disturb(trained)
    trained.save(tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def loaded(bases: dict[str, Path], architecture: str, start: Path) -> EncoderDecoderPolicy:
    """A policy that starts from that LoRA."""
    return load_policy(str(bases[architecture]), start, policy_config(architecture), seed=0)


@pytest.fixture(params=["fresh", "loaded"])
def policy(
    request: pytest.FixtureRequest, bases: dict[str, Path], architecture: str, start: Path
) -> EncoderDecoderPolicy:
    """Both kinds of policy."""
    adapter = start if request.param == "loaded" else None
    return load_policy(str(bases[architecture]), adapter, policy_config(architecture), seed=0)


def prompted_rows(seed: int, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Generated rows with the prompts that the default template makes."""
    template = DataConfig().template
    rows = generate_rows(seed, sizes)
    return {
        split: [replace(row, prompt=template.replace("{dialogue}", row.dialogue)) for row in those]
        for split, those in rows.items()
    }


@pytest.fixture
def config() -> Config:
    """A config with every stage small."""
    return small_config()


def small_config() -> Config:
    """The quickstart's shape at a size for tests."""
    quick = recipe("quickstart")
    return replace(
        quick,
        data=replace(quick.data, limit=64),
        evaluation=replace(quick.evaluation, prompts=8),
        generation=replace(quick.generation, max_new_tokens=12),
        reward=replace(quick.reward, normalise_on=16),
        rl=replace(
            quick.rl,
            steps=2,
            batch_size=8,
            minibatch_size=4,
            microbatch_size=4,
            epochs=2,
            validate_every=1,
            lr=1e-2,
            validation_prompts=8,
        ),
    )
