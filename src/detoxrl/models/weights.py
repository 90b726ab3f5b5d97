"""Which weights does a pass use, and which of them may training change?"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.errors import InputError, require
from detoxrl.models.loading import load_base, save_base
from detoxrl.runtime.files import explain_corruption

# peft's name for the adapter that `save_pretrained` writes to the top of a folder.
POLICY = "default"
REFERENCE = "reference"


class LoraWeights:
    """One base model and its adapters by name; None is the bare base."""

    def __init__(self, model: PeftModel, reference: str | None, train_encoder: bool) -> None:
        self.model: Any = model
        self.reference = reference
        self._still = model.config.is_encoder_decoder and not train_encoder
        self._thawed: dict[str, list[Any]] = {}
        self._activate(POLICY)
        self.packs: list[Any] = []
        """What a decoder makes of the base's weights once, as they never change."""
        self.models: dict[str | None, Any] = {POLICY: model}
        self.active: Any = model.get_base_model()
        """The model to call; `using` says with which adapter."""

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Let passes inside the block use the adapter `name`."""
        if name == POLICY:
            yield
            return
        try:
            if name is not None:
                self._activate(name)
            with nullcontext() if name else self.model.disable_adapter():
                yield
        finally:
            self._activate(POLICY)

    def _activate(self, name: str) -> None:
        # peft thaws the adapter that it makes active, and freezes the others; an encoder's part trains only if asked.
        self.model.base_model.set_adapter(name)
        if self._still and name not in self._thawed:
            weights = self.model.named_parameters()
            self._thawed[name] = [weight for path, weight in weights if weight.requires_grad and ".encoder." in path]
        for weight in self._thawed.get(name, ()):
            weight.requires_grad_(False)

    def add(self, name: str, folder: Path) -> None:
        """Load the LoRA in `folder` beside the others, frozen. Raises InputError and StorageError as `loading_adapter`."""
        with loading_adapter("adapter", folder):
            self.model.load_adapter(str(folder), adapter_name=name)
        require_layers(self.model, name, "adapter", folder)

    def save(self, folder: Path) -> None:
        """Write the policy's adapter as a folder that peft loads on the base."""
        self.model.save_pretrained(str(folder), selected_adapters=[POLICY], save_embedding_layers=False)


class FullWeights:
    """A whole model that trains, and frozen ones by name; None is the start. What never trains is there once."""

    reference = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train_encoder: bool) -> None:
        self.model = model
        self._tokenizer = tokenizer
        if model.config.is_encoder_decoder and not train_encoder:
            model.get_encoder().requires_grad_(False)  # and with it the embeddings that the decoder shares
        shared = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        trains = any(weight.requires_grad for weight in model.parameters())
        start = copy.deepcopy(model, shared).requires_grad_(False) if trains else model
        self.models: dict[str | None, Any] = {POLICY: model, None: start}
        self.active: Any = model

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Let passes inside the block use the model `name`."""
        self.active = self.models[name]
        try:
            yield
        finally:
            self.active = self.model

    def add(self, name: str, folder: Path) -> None:
        """Load the model in `folder` beside the others, frozen. Raises InputError and StorageError as `load_base`."""
        model, tokenizer = load_base(str(folder), "adapter")
        alike = type(model) is type(self.model) and tokenizer.get_vocab() == self._tokenizer.get_vocab()
        rule = f"is a {type(model).__name__} with another vocabulary or of another kind than the base"
        require(alike, "adapter", str(folder), rule, "give a model that was trained from the base")
        self.models[name] = model.requires_grad_(False).to(self.model.device)  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """Write the policy's model and its tokenizer, so that transformers loads it."""
        save_base(self.model, self._tokenizer, folder)


Weights = LoraWeights | FullWeights


@contextmanager
def loading_adapter(field: str, folder: Path) -> Iterator[None]:
    """Let peft load the LoRA in `folder`.

    Raises InputError when there is none or one of another base, StorageError when its weights are torn.
    """
    weights = folder / "adapter_model.safetensors"
    for path in (folder / "adapter_config.json", weights):
        remedy = "give a LoRA folder as peft saves it; `detoxrl convert` makes safetensors of a .bin"
        require(path.is_file(), field, str(folder), f"holds no {path.name}", remedy)
    with explain_corruption(weights, "train again or put it back"), safe_open(weights, framework="pt"):
        pass
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:  # sizes or targets of another base
        reason = f"does not load on the base: {' '.join(str(error).split())[:200]}"
        raise InputError(field, str(folder), reason, "give an adapter of this base") from error


def require_layers(model: PeftModel, name: str, field: str, folder: Path) -> None:
    """Raise InputError when the LoRA `name` came from a folder with other layers: peft leaves those out in silence."""
    ours = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    other = sorted(ours ^ set(load_file(folder / "adapter_model.safetensors")))
    rule = f"belongs to a base with other layers, {other[0]} for one" if other else ""
    require(not other, field, str(folder), rule, "give an adapter of this base")
