"""How does a classifier learn from labelled texts, or a scorer from pairs?"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.config.fit import FitConfig
from detoxrl.data.labelled import Example, LabelKind
from detoxrl.errors import TrainingError
from detoxrl.models.linear import FastLinear
from detoxrl.models.policy import length_batches
from detoxrl.models.reader import positions_of, tokens_at_once
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.files import replace_folder
from detoxrl.runtime.randomness import permutation, torch_seed

Model = PreTrainedModel | PeftModel

# Of so many batches the texts are sorted by length before they are divided into batches.
_SORTED_BATCHES = 50
_WARMUP = 0.1  # Part of the steps over which the learning rate rises.
_WEIGHT_DECAY = 0.01
_MAX_GRAD_NORM = 1.0
_BEST = "best"


@dataclass(frozen=True)
class Encoded:
    """Examples as token ids. A pair has two texts that follow each other: the chosen one, then the rejected one."""

    ids: list[list[int]]  # One list per text.
    targets: torch.Tensor  # (N, L), NaN where a label is missing.
    per_example: int  # Texts of an example: 1, or 2 of a pair.
    cut: int  # Number of texts that were longer than the limit.

    def __len__(self) -> int:
        return len(self.targets)

    def length(self, example: int) -> int:
        """Return the length of an example's longest text in tokens."""
        first = example * self.per_example
        return max(map(len, self.ids[first : first + self.per_example]))


class Encoder(NamedTuple):
    """A tokenizer and the maximum length of a text in tokens."""

    tokenizer: PreTrainedTokenizerBase
    limit: int

    def encode(self, examples: Sequence[Example]) -> Encoded:
        """Return the examples as token ids, each text cut at the limit."""
        texts = [text for example in examples for text in example.texts]
        ids = self.tokenizer(texts, truncation=True, max_length=self.limit).input_ids
        at_limit = [text for text, tokens in zip(texts, ids, strict=True) if len(tokens) == self.limit]
        whole = self.tokenizer(at_limit).input_ids if at_limit else []
        cut = sum(len(tokens) > self.limit for tokens in whole)

        targets = torch.tensor([example.targets for example in examples])
        return Encoded(ids, targets, len(examples[0].texts), cut)


class FitData(NamedTuple):
    """What a classifier learns from, and what its training is validated on."""

    kind: LabelKind
    encoder: Encoder
    training: Encoded
    validation: Encoded


@dataclass(frozen=True)
class Trained:
    """How training went; the model has the weights of the best validation."""

    steps: int  # That were made.
    planned: int
    best_step: int
    history: list[dict[str, float]]  # A record per validation: step, training and validation loss.


def length_limit(model: Model, tokenizer: PreTrainedTokenizerBase, config: FitConfig) -> int:
    """Return the maximum length of a text: the config's, unless model or tokenizer allow less."""
    return min(config.max_length, tokenizer.model_max_length, positions_of(model.config))


def total_steps(examples: int, config: FitConfig) -> int:
    """Return the number of optimizer steps of a training that does not stop early."""
    return config.epochs * -(-examples // config.batch_size)


def example_losses(logits: torch.Tensor, targets: torch.Tensor, kind: LabelKind) -> torch.Tensor:
    """Return the loss in nats of each output with a label (B, L), 0 where the label is missing.

    `scores`: cross-entropy of a sigmoid with a target in [0, 1]. `classes`: cross-entropy of the softmax, in the column
    of the class. `pairs`: logits (2B, 1) alternate between chosen and rejected; -log P(chosen is better) of the model
    of Bradley and Terry 1952, as in Ouyang et al. 2022, equation 1.
    """
    if kind == "pairs":
        differences = logits[0::2] - logits[1::2]
        return -torch.nn.functional.logsigmoid(differences)
    if kind == "classes":
        return -targets * logits.log_softmax(-1)

    known = targets.isfinite()
    losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.nan_to_num(), reduction="none")
    return losses * known


def balancing_weights(targets: torch.Tensor, kind: LabelKind) -> torch.Tensor:
    """Return the weights (2, L) of each output's labels 0 and 1 that give both sides, or all classes, the same sum.

    Their mean over the training labels is 1. Classes only have losses where the label is 1.
    """
    share = targets.nanmean(0)
    if kind == "classes":
        return torch.stack([torch.ones_like(share), 1 / (len(share) * share)])
    return torch.stack([0.5 / (1 - share), 0.5 / share])


class Objective:
    """The mean loss per label over a batch, each label with its weight."""

    def __init__(self, training: Encoded, kind: LabelKind, balance: bool) -> None:
        self.kind = kind
        self._weights = balancing_weights(training.targets, kind) if balance else None

    def __call__(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        losses = example_losses(logits, targets, self.kind)
        if self._weights is not None:
            low, high = self._weights.to(targets.device)
            losses = losses * (low + targets.nan_to_num() * (high - low))
        return losses.sum() / self._labels(targets)

    def _labels(self, targets: torch.Tensor) -> int:
        """Return how many labels there are; a text with classes has one."""
        return len(targets) if self.kind == "classes" else int(targets.isfinite().sum())


def fit_classifier(
    model: Model, data: FitData, config: FitConfig, work: Path, on_step: Callable[[int, float], None]
) -> Trained:
    """Train the classifier's trainable weights, and leave it with those of the lowest validation loss.

    It resumes from the checkpoints in `work`. `on_step` is called with the number of steps done and the loss. Raises
    TrainingError when the loss is not finite.
    """
    _, encoder, training, validation = data
    objective = Objective(training, data.kind, config.balance)
    weights = trainable(model)
    optimizer = torch.optim.AdamW(weights.values(), lr=config.peak_lr, weight_decay=_WEIGHT_DECAY, fused=True)
    best = work / _BEST
    checkpoints = Checkpoints(work / "checkpoints", weights, optimizer, products=[best])
    planned = total_steps(len(training), config)
    every = config.validate_every or -(-planned // config.epochs)

    with torch.random.fork_rng(devices=[]), checkpoints.stoppable():
        state: dict[str, Any] = checkpoints.restore() or {"step": 0, "history": [], "ended": False}
        history = state["history"]
        losses: list[float] = state.get("losses", [])
        step = state["step"]
        batches = _Batches(training, config)

        while step < planned and not state["ended"]:
            checkpoints.point(step, {"history": history, "losses": losses, "ended": False})
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(step, planned, config)

            torch.manual_seed(torch_seed(config.seed, f"fit dropout {step}"))
            loss = _step(model, encoder, training, batches.rows(step), objective)
            if not loss.isfinite():
                remedy = f"a learning rate below --lr {config.peak_lr:g} may help"
                raise TrainingError(f"fit stopped at step {step}: the loss is {loss.item()}; {remedy}")
            torch.nn.utils.clip_grad_norm_(weights.values(), _MAX_GRAD_NORM)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses.append(loss.item())
            on_step(step, loss.item())

            if step % every == 0 or step == planned:
                held_out = float(objective(predict(model, encoder, validation), validation.targets))
                history.append({"step": step, "loss": sum(losses) / len(losses), "validation_loss": held_out})
                losses.clear()
                if _best(history) == len(history) - 1:
                    _save_weights(weights, best)
                state["ended"] = _is_over(history, config)
        checkpoints.point(step, {"history": history, "losses": losses, "ended": True})

    _load_weights(weights, best)
    return Trained(step, planned, int(history[_best(history)]["step"]), history)


@torch.no_grad()
def predict(model: Model, encoder: Encoder, examples: Encoded) -> torch.Tensor:
    """Return the logits of every text (N, L), or (2N, 1) of pairs, in fp32 on the CPU."""
    model.eval()
    order = sorted(range(len(examples.ids)), key=lambda text: len(examples.ids[text]))
    ordered = [examples.ids[text] for text in order]

    logits = []
    with FastLinear():
        for batch in length_batches(list(map(len, ordered)), tokens_at_once(model.device)):
            logits.append(model(**_padded(ordered[batch], encoder, model.device)).logits.float().cpu())
    place = torch.empty(len(order), dtype=torch.long)
    place[order] = torch.arange(len(order))
    return torch.cat(logits)[place]


class _Batches:
    """The examples of each step. Every pass has its own order; a batch holds examples of similar length.

    Of `_SORTED_BATCHES` batches at a time the shuffled examples are sorted by length; then the batches are shuffled.
    """

    def __init__(self, examples: Encoded, config: FitConfig) -> None:
        self._lengths = [examples.length(example) for example in range(len(examples))]
        self._config = config
        self._pass = -1
        self._batches: list[list[int]] = []

    def rows(self, step: int) -> list[int]:
        size = self._config.batch_size
        data_pass, batch = divmod(step, -(-len(self._lengths) // size))
        if data_pass != self._pass:
            self._pass = data_pass
            self._batches = self._divided(data_pass)
        return self._batches[batch]

    def _divided(self, data_pass: int) -> list[list[int]]:
        seed, size = self._config.seed, self._config.batch_size
        shuffled = permutation(seed, "fit order", data_pass, len(self._lengths))

        batches = []
        for start in range(0, len(shuffled), size * _SORTED_BATCHES):
            part = sorted(shuffled[start : start + size * _SORTED_BATCHES], key=self._lengths.__getitem__)
            batches += [part[first : first + size] for first in range(0, len(part), size)]
        order = permutation(seed, "fit batches", data_pass, len(batches))
        return [batches[batch] for batch in order]


def _step(model: Model, encoder: Encoder, training: Encoded, rows: Sequence[int], objective: Objective) -> torch.Tensor:
    """Add the gradient of a batch's loss to the weights, and return the loss."""
    model.train()
    per = training.per_example
    texts = [training.ids[row * per + place] for row in rows for place in range(per)]
    with FastLinear():
        logits = model(**_padded(texts, encoder, model.device)).logits
    loss = objective(logits, training.targets[list(rows)].to(logits.device))
    loss.backward()
    return loss.detach()


def _padded(ids: Sequence[Sequence[int]], encoder: Encoder, device: torch.device) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(row) for row in ids]
    padding = float(encoder.tokenizer.pad_token_id)
    mask = [torch.ones_like(row) for row in rows]
    return {
        "input_ids": pad_sequence(rows, batch_first=True, padding_value=padding).to(device),
        "attention_mask": pad_sequence(mask, batch_first=True).to(device),
    }


def _learning_rate(step: int, planned: int, config: FitConfig) -> float:
    warmup = (step + 1) / (int(_WARMUP * planned) + 1)
    decay = 1 - step / planned
    return config.peak_lr * min(warmup, decay)


def _best(history: Sequence[dict[str, float]]) -> int:
    """Return the number of the first validation with the lowest loss."""
    return min(range(len(history)), key=lambda number: history[number]["validation_loss"])


def _is_over(history: Sequence[dict[str, float]], config: FitConfig) -> bool:
    """Return whether the last `patience` validations were no better than an earlier one."""
    return config.patience is not None and len(history) - 1 - _best(history) >= config.patience


def _save_weights(weights: dict[str, torch.nn.Parameter], folder: Path) -> None:
    with replace_folder(folder) as temporary:
        copies = {name: weight.detach().contiguous() for name, weight in weights.items()}
        save_file(copies, temporary / "weights.safetensors")


def _load_weights(weights: dict[str, torch.nn.Parameter], folder: Path) -> None:
    stored = load_file(folder / "weights.safetensors")
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(stored[name])
