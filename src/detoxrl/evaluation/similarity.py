"""How near is a response in meaning to something else?"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel

from detoxrl.errors import require
from detoxrl.evaluation.metrics import chrf
from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.classifier import Reader, load_reader

Encode = Callable[[Sequence[str]], Floats]  # unit vectors (N, D) of N texts
_DONE = {"Transformer", "Pooling", "Normalize", "", "mean", "cls", "pooling_mode_mean_tokens", "pooling_mode_cls_token"}


def load_encoder(source: str, device: torch.device) -> Encode:
    """Return the sentence encoder of a folder or hub id: the mean of its token states, or CLS where its files say so.

    Reimers and Gurevych 2019, section 3. Texts are cut at the length that its files name. Raises InputError.
    """
    field, remedy = "evaluation.encoder", "give a sentence encoder, such as sentence-transformers/all-MiniLM-L6-v2"
    model, tokenizer = load_reader(AutoModel, source, field, remedy, device)
    by_cls, needs, most = _pooling(str(model.name_or_path))
    needs |= {"a decoder"} if model.config.is_encoder_decoder else set()
    require(not needs, field, source, f"needs {' and '.join(sorted(needs))}, which is not done here", remedy)
    reader = Reader(model, tokenizer, most)

    def pooled(output: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        states, counts = output.double(), mask.unsqueeze(-1)
        taken = states[:, 0] if by_cls else (states * counts).sum(1) / counts.sum(1).clamp(min=1)
        return torch.nn.functional.normalize(taken, dim=-1)

    return lambda texts: np.asarray(reader.read(texts, pooled))


def similarity(encode: Encode | None, texts: Sequence[str], others: Sequence[str]) -> Floats:
    """Return how near each text is to its other, (N,) in [0, 1]: the cosine, or without an encoder chrF against it."""
    if encode is None:
        return np.array([chrf(other, text) for text, other in zip(texts, others, strict=True)], dtype=np.float64)
    pairs = zip(*np.split(encode([*texts, *others]), [len(texts)]), strict=True)
    return np.array([one @ other for one, other in pairs]).clip(0.0, 1.0)


def joint(sta: Floats, sim: Floats, fl: Floats) -> Floats:
    """Return STA x SIM x FL of each response, in [0, 1] and of their shape, whose mean is J of Krishna et al. 2020, 3.

    P(civil) `sta` and P(fluent) `fl` are made 0 or 1 at 0.5, as there and in ParaDetox's code (Logacheva et al. 2022).
    """
    return np.asarray((sta > 0.5) * sim * (fl >= 0.5))  # at 0.5 itself a response is toxic, as everywhere, but fluent


def _pooling(folder: str) -> tuple[bool, set[str], int | None]:
    """Return from a folder's files whether CLS stands for a text, what they need beside, and the most tokens if any."""
    paths = [Path(folder, name) for name in ("modules.json", "1_Pooling/config.json", "sentence_bert_config.json")]
    layers, pools, text = (json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {} for path in paths)
    old = "+".join(key for key, on in pools.items() if on is True and "mode" in key)  # a switch for each, until 2026
    needs = {layer["type"].rpartition(".")[2] for layer in layers} | {pooling := str(pools.get("pooling_mode", old))}
    return "cls" in pooling, needs - _DONE, text.get("max_seq_length")
