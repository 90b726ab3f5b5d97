"""Tiny real models of each architecture, made once per session; nothing touches the network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
# What is computed here is tiny: a second thread, on a core that another worker uses, takes time and gives none.
os.environ["OMP_NUM_THREADS"] = "1"

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import hypothesis
import pytest
import torch
import transformers
from tokenizers import processors
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from detoxrl.config import judges
from detoxrl.config.judges import PROFANITY_CHECK
from detoxrl.config.packages import MODEL_PACKAGES, is_installed
from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config, PolicyConfig
from detoxrl.config.tasks import TASKS
from detoxrl.data.embedded.corpus import generate_utterances
from detoxrl.data.rows import Row, read_rows
from detoxrl.models.kernels import Kernels, using_kernels
from detoxrl.models.loading import save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.weights import LoraWeights
from detoxrl.rewards.fit import FitSettings, train_reward_model

transformers.utils.logging.disable_progress_bar()
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell is deaf to it
torch.set_num_threads(1)
# A busy machine is no failure.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")

# The files that take longest, so that no worker begins one when the other is done.
LONGEST = (
    "resume", "processes", "cli", "invariants", "own", "export", "checkpoint", "bandit", "train", "hub",
    "trackers", "examples", "real_data",
)  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Have xdist keep the order of files; its own begins with those of most tests."""
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files."""
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(ranks)))


TARGETS = {"t5": ("q", "v"), "bart": ("q_proj", "v_proj"), "gpt2": ("c_attn",), "llama": ("q_proj", "v_proj")}
ENCODER_DECODERS = ("t5", "bart")
KINDS = [
    *((name, kind) for name in ENCODER_DECODERS for kind in ("fresh", "loaded", "loaded with encoder", "full")),
    *((name, kind) for name in ("gpt2", "llama") for kind in ("fresh", "loaded", "full")),
]


def _t5(vocab: int) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocab, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu",
        dropout_rate=0.1, decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _bart(vocab: int) -> BartForConditionalGeneration:
    config = BartConfig(
        vocab_size=vocab, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=256, dropout=0.1,
        pad_token_id=0, bos_token_id=1, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=None,
        init_std=0.2,
    )  # fmt: skip
    return BartForConditionalGeneration(config)


def _gpt2(vocab: int) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=vocab, n_embd=32, n_layer=2, n_head=4, n_positions=256, initializer_range=0.2, pad_token_id=0,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _llama(vocab: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, attention_dropout=0.1, initializer_range=0.2,
        bos_token_id=1, eos_token_id=[2, 1],
    )  # fmt: skip
    return LlamaForCausalLM(config)


HELPERS = Path(__file__).parent / "helpers"
TINY: dict[str, Callable[[int], PreTrainedModel]] = {"t5": _t5, "bart": _bart, "gpt2": _gpt2, "llama": _llama}


@pytest.fixture
def bf16_kernels() -> Iterator[None]:
    """Multiply in bfloat16, as on a CPU that is fast at it."""
    with using_kernels(Kernels(onednn=False, packed=False, bf16=True)):
        yield


@pytest.fixture(scope="session", autouse=True)
def trained_once(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Let all workers share what is trained on the spot, in a cache that goes with the session."""
    root = tmp_path_factory.getbasetemp()
    os.environ["DETOXRL_CACHE"] = str((root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cache")


@pytest.fixture(scope="session", autouse=True)
def word_judge() -> Iterator[None]:
    """Let the judge of words be the default one, as without the extra `judge`: the other one takes seconds to load."""
    with pytest.MonkeyPatch.context() as patch:
        without = MODEL_PACKAGES.values()
        patch.setattr(judges, "is_installed", lambda package: package not in without and is_installed(package))
        yield


@pytest.fixture(scope="module", autouse=True)
def drawings() -> Iterator[None]:
    """Leave out what reports draw, which takes a third of a small run. A module that looks at it overrides this."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("learning_curves", "over_optimisation", "toxicity_distributions"):
            patch.setattr(f"detoxrl.report.plots.{name}", lambda *_: [])
        yield


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Let this test compute on two threads, as users do."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny random models of four architectures.

    Their tokenizer was trained on dialogues like the embedded ones. It is stored, so that what a tiny model learns in
    20 steps does not depend on the corpus.
    """
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(HELPERS / "tokenizer.json"),
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
    )
    folders = {}
    for name, make in TINY.items():
        if name == "gpt2":  # no EOS behind the prompts of a causal model
            tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
        if name == "llama":
            tokenizer.pad_token = None
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
        generate_utterances(0, 3000),
        folder,
        tmp_path_factory.mktemp("checkpoints"),
        FitSettings(steps=150, batch_size=64, lr=1e-3, seed=0),
        on_step=lambda done, loss: losses.append(loss),
    )
    assert losses[0] > 0.5 > 0.2 > losses[-1]
    return folder


def policy_config(name: str, encoder: bool = False, full: bool = False) -> PolicyConfig:
    """A small adapter for one of the tiny bases, or its full weights."""
    return PolicyConfig(
        base="given", lora_rank=4, lora_alpha=8, lora_targets=TARGETS[name], train_encoder=encoder, full_weights=full
    )


def disturb(policy: Policy) -> None:
    """Move every trainable weight and the value head, as training would."""
    scale = 0.2 if isinstance(policy.weights, LoraWeights) else 0.03
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in [*policy.parameters(), *policy.add_value_head().parameters()]:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


@pytest.fixture(scope="session")
def starts(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Saved LoRAs far from the bare base, as somebody trained them with dropout: in the decoder, or everywhere."""
    folders = {}
    for name, kind in KINDS:
        if kind in ("fresh", "full"):
            continue
        folder = folders[name, kind] = tmp_path_factory.mktemp("starts") / name
        trained = load_policy(str(bases[name]), None, policy_config(name, encoder="encoder" in kind), seed=0)
        disturb(trained)
        trained.save(folder)
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_dropout": 0.1}))
    return folders


Make = Callable[..., Policy]


@pytest.fixture(scope="session")
def make_policy(bases: dict[str, Path], starts: dict[tuple[str, str], Path]) -> Make:
    """Return a function that loads a policy of one architecture and kind."""

    def make(name: str, kind: str, encoder: bool = False) -> Policy:
        config = policy_config(name, encoder, full=kind == "full")
        policy = load_policy(str(bases[name]), starts.get((name, kind)), config, seed=0)
        policy.eos_token_ids += range(40, 60)  # so that some responses of a random model end and some do not
        policy.add_value_head()
        return policy

    return make


@pytest.fixture(params=TARGETS)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fresh(make_policy: Make, architecture: str) -> Policy:
    """A policy under a fresh LoRA."""
    return make_policy(architecture, "fresh")


@pytest.fixture
def loaded(make_policy: Make, architecture: str) -> Policy:
    """A policy that starts from a LoRA, with parts in the encoder where there is one."""
    return make_policy(architecture, "loaded with encoder" if architecture in ENCODER_DECODERS else "loaded")


@pytest.fixture(params=KINDS, ids=" ".join)
def policy(request: pytest.FixtureRequest, make_policy: Make) -> Policy:
    """Every kind of policy on every architecture."""
    return make_policy(*request.param)


@pytest.fixture
def place(tmp_path: Path, bases: dict[str, Path], reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with the user's model, classifier, dialogues and reward functions."""
    from small_runs import make_place

    monkeypatch.chdir(tmp_path)
    return make_place(tmp_path, bases, reward_folder)


def prompted_rows(sizes: dict[str, int]) -> dict[str, list[Row]]:
    """The first stored dialogues of each split, with the prompts that the default template makes.

    They are stored for the same reason as the tokenizer.
    """
    template = TASKS["summarize"].template
    stored = read_rows(HELPERS / "rows.jsonl")
    rows = {}
    for split, size in sizes.items():
        of_split = [row for row in stored if row.id.startswith(split)][:size]
        assert len(of_split) == size
        rows[split] = [replace(row, prompt=template.replace("{dialogue}", row.text)) for row in of_split]
    return rows


@pytest.fixture
def config() -> Config:
    """A config with every stage small."""
    return small_config()


def small_config() -> Config:
    """The quickstart's shape at a size for tests, with a critic, and a judge that is always installed."""
    quick = recipe("quickstart")
    return replace(
        quick,
        data=replace(quick.data, limit=64),
        evaluation=replace(quick.evaluation, prompts=8, primary_judge=PROFANITY_CHECK, other_judges=()),
        generation=replace(quick.generation, max_new_tokens=12),
        reward=replace(quick.reward, normalise_on=16),
        rl=replace(
            quick.rl,
            algorithm="ppo",
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
