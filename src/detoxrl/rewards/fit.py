"""How is the embedded reward model trained?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from detoxrl.models.encoder import load_under_new_head
from detoxrl.models.loading import scratch_tokenizer
from detoxrl.rewards.names import LABELS
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.randomness import batch_indices, torch_seed

_ENCODER = "reward.encoder"
_LABELS_OF_MODEL: dict[str, Any] = {
    "id2label": dict(enumerate(LABELS)),
    "label2id": {label: index for index, label in enumerate(LABELS)},
}


@dataclass(frozen=True, kw_only=True)
class FitSettings:
    """How long and how fast the reward model trains.

    The learning rate rises to `lr` over `warmup_steps`, and decays linearly to 0.
    """

    steps: int
    batch_size: int
    lr: float
    seed: int
    warmup_steps: int = 0
    encoder: str | None = None  # Folder or hub id of the encoder that it starts from. None: a small one, random.


def train_reward_model(
    utterances: Sequence[tuple[str, bool]],
    folder: Path,
    checkpoints: Path,
    settings: FitSettings,
    on_step: Callable[[int, float], None],
) -> None:
    """Train a classifier on (text, hateful) pairs and save it to `folder`; it resumes from `checkpoints`.

    It is a small RoBERTa, or the encoder of the settings with a new head. Its labels are those of
    facebook/roberta-hate-speech-dynabench-r4-target: 0 = nothate, 1 = hate. `on_step` is called after each step with
    the number of finished steps and the loss. Raises InputError for an encoder that cannot be loaded.
    """
    texts = [text for text, _ in utterances]
    labels = torch.tensor([int(hateful) for _, hateful in utterances])

    model, tokenizer = _untrained(texts, settings)
    ids = tokenizer(texts).input_ids

    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.01, fused=True)
    states = Checkpoints(checkpoints, trainable(model), optimizer)

    model.train()
    with torch.random.fork_rng(devices=[]), states.stoppable():
        restored = states.restore()
        first_step = restored["step"] if restored else 0
        for step in range(first_step, settings.steps):
            states.point(step, {})

            torch.manual_seed(torch_seed(settings.seed, f"reward dropout {step}"))
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(settings, step)

            rows = batch_indices(settings.seed, "reward", step, settings.batch_size, len(utterances))
            batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            loss = model(**batch, labels=labels[rows]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            on_step(step + 1, loss.item())
        states.point(settings.steps, {})  # A stop during the last step also leaves a checkpoint behind it.

    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _learning_rate(settings: FitSettings, step: int) -> float:
    warmup = (step + 1) / (settings.warmup_steps + 1)
    decay = 1 - step / settings.steps
    return settings.lr * min(warmup, decay)


def _untrained(texts: Sequence[str], settings: FitSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the classifier before its training, with its tokenizer."""
    if settings.encoder is None:
        tokenizer = _tokenizer(texts)
        return _model(len(tokenizer), settings.seed), tokenizer

    return load_under_new_head(settings.encoder, _ENCODER, LABELS, torch_seed(settings.seed, "reward model"))


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerBase:
    """Return a BPE tokenizer that puts "</s>" before a text too: RoBERTa's head reads the first position."""
    tokenizer = scratch_tokenizer(texts, vocab_size=1000)
    template = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    return tokenizer


def _model(vocab_size: int, seed: int) -> RobertaForSequenceClassification:
    """Return a randomly initialised RoBERTa of 2 layers with the two labels."""
    config = RobertaConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=514,
        type_vocab_size=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **_LABELS_OF_MODEL,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "reward model"))
        return RobertaForSequenceClassification(config)
