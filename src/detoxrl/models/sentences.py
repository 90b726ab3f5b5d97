"""How does a sentence encoder turn texts into vectors?"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError

from detoxrl.errors import InputError, StorageError, first_line, require
from detoxrl.models.loading import load_pretrained, require_vocabulary
from detoxrl.runtime.hub import fetch

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

Vectors = npt.NDArray[np.float64]
Encode = Callable[[Sequence[str]], Vectors]  # unit vectors (N, D) of N texts
_REMEDY = "give a sentence encoder, such as sentence-transformers/all-MiniLM-L6-v2"
_BATCH_SIZE = 32  # Texts in a batch on a GPU.
# Texts that an encoder must read before anything else runs; their lengths differ, so that some are padded.
_PROBES = ("", "Thank you.", "Thank you, that is very kind of you.")


def load_encoder(source: str, field: str, device: torch.device) -> Encode:
    """Return a function from N texts to their unit vectors (N, D), computed by a sentence encoder.

    `source` is a folder or hub id, which the setting `field` names. Its files define the layers, the pooling, a prompt
    if there is one, and the length at which a text is cut; without modules.json the vector is the mean of the token
    states (Reimers and Gurevych 2019, section 3), or the last state of a causal model. Each distinct text is encoded
    once.

    Raises InputError when sentence-transformers is not installed or the source is not a sentence encoder, and
    StorageError when its weights are corrupted.
    """
    with _loading_errors(source, field):
        encoder = _load(source, field, device)
    vectors: dict[str, Vectors] = {}

    def encode(texts: Sequence[str]) -> Vectors:
        new = [text for text in dict.fromkeys(texts) if text not in vectors]
        if new:
            vectors.update(zip(new, _unit_vectors(encoder, new), strict=True))
        return np.array([vectors[text] for text in texts])

    with _loading_errors(source, field):
        encode(_PROBES)
    return encode


def _load(source: str, field: str, device: torch.device) -> "SentenceTransformer":
    """Return the sentence encoder in fp32. Raises InputError, and whatever the library raises."""
    try:
        # Optional, and its import takes seconds.
        from sentence_transformers import SentenceTransformer
    except ModuleNotFoundError as error:
        rule = "needs the package sentence-transformers"
        raise InputError(field, source, rule, "pip install 'detoxrl[similarity]'") from error

    folder = Path(fetch(source, field))
    _require_safetensors(folder, source, field)
    encoder = SentenceTransformer(
        str(folder),
        device=str(device),
        trust_remote_code=False,
        local_files_only=True,
        model_kwargs={"use_safetensors": True, "dtype": torch.float32},
    )

    network = encoder.transformers_model
    if network is not None:
        require_vocabulary(field, source, encoder.tokenizer, network)
        _require_weights(type(network), folder, source, field)
        limit = _position_limit(network)
        if limit is not None and encoder.max_seq_length is not None:
            encoder.max_seq_length = min(encoder.max_seq_length, limit)
    return encoder


def _unit_vectors(encoder: "SentenceTransformer", texts: list[str]) -> Vectors:
    """Return the vectors (N, D) of texts, divided by their lengths in float64."""
    # In a batch a vector depends in its last bits on the padding: by up to 2e-7 in all-MiniLM-L6-v2. Vectors are kept
    # through a run, and a resumed run meets a text in another batch. So each text is read alone on a CPU, on which a
    # resumed run must be bit-identical; this takes twice as long.
    batch_size = 1 if encoder.device.type == "cpu" else _BATCH_SIZE
    encoded = encoder.encode(texts, batch_size=batch_size, show_progress_bar=False)
    vectors = np.asarray(encoded, dtype=np.float64)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    # A zero vector has no direction and stays 0.
    unit: Vectors = vectors / np.maximum(lengths, np.finfo(np.float64).tiny)
    return unit


def _require_safetensors(folder: Path, source: str, field: str) -> None:
    """Raise InputError when a layer after the transformer has its weights in a pickle only.

    The library would read it. It is told to read the transformer itself from safetensors.
    """
    for pickle in folder.glob("*/**/pytorch_model.bin"):
        rule = f"has no safetensors in {pickle.parent.name}, only a pickle"
        require(pickle.with_name("model.safetensors").is_file(), field, source, rule, _REMEDY)


def _require_weights(kind: Any, folder: Path, source: str, field: str) -> None:
    """Raise InputError when the folder lacks weights of its network, a `kind` of transformers model.

    transformers would fill them with random numbers. Weights of a pooler may be missing: sentence encoders have their
    own pooling.
    """
    if not (folder / "config.json").is_file():
        return  # an older layout, with the network in a subfolder
    settings = {"use_safetensors": True, "output_loading_info": True}
    _, info = load_pretrained(kind, str(folder), source, field, _REMEDY, **settings)
    missing = sorted(name for name in info["missing_keys"] if "pooler." not in name)
    if missing:
        raise InputError(field, source, f"lacks weights such as {missing[0]}", _REMEDY)


def _position_limit(network: torch.nn.Module) -> int | None:
    """Return how many tokens the learned positions of a network allow; None if it has none of that name.

    In RoBERTa, MPNet and their relatives the positions up to the padding id are never used; sentence-transformers does
    not subtract them, and would read past the last position.
    """
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            unused = 0 if module.padding_idx is None else module.padding_idx + 1
            return module.num_embeddings - unused
    return None


@contextmanager
def _loading_errors(source: str, field: str) -> Iterator[None]:
    """Turn what transformers and sentence-transformers raise for an unfit folder into one line."""
    try:
        yield
    except SafetensorError as error:
        raise StorageError(f"the weights of {source} are corrupted: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, TypeError, ImportError, LookupError, AttributeError) as error:
        raise InputError(field, source, f"cannot be loaded: {first_line(error)}", _REMEDY) from error
