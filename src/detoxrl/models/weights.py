"""Which weights does a pass use, and which of them may training change?"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.errors import InputError, require
from detoxrl.models.files import ADAPTER_WEIGHTS, require_adapter_files
from detoxrl.models.loading import load_base, require_finite, save_base
from detoxrl.runtime.files import explain_corruption

# peft's name for the adapter that `save_pretrained` writes to the top of a folder.
POLICY = "default"
REFERENCE = "reference"

T = TypeVar("T")


class LoraWeights:
    """One base model and its adapters by name; the name None stands for the base without an adapter."""

    def __init__(self, model: PeftModel, reference: str | None, train_encoder: bool) -> None:
        self.model: Any = model
        self.reference = reference
        self._encoder_is_frozen = model.config.is_encoder_decoder and not train_encoder
        self._encoder_weights: dict[str, list[Any]] = {}  # Of each adapter, those that peft makes trainable.
        self._activate(POLICY)
        self._packed: Any = None  # Copies of the base's weights in another layout.
        self.models: dict[str | None, Any] = {POLICY: model}
        self.active: Any = model.get_base_model()
        """The model to call; `using` decides under which adapter."""

    def of(self, name: str | None) -> tuple[Any, str | None]:
        """Return the model that has the weights `name`, and the adapter on it that they are."""
        return self.active, name

    def packed(self, pack: Callable[[], T]) -> T:
        """Return the base's weights in another layout. They are packed once and kept, as the base never changes."""
        if self._packed is None:
            self._packed = pack()
        packed: T = self._packed
        return packed

    def forget_packed(self) -> None:
        """Drop what was packed, which is on the device of before."""
        self._packed = None

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Make passes inside the block use the adapter `name`."""
        if name == POLICY:
            yield
            return

        try:
            if name is None:
                with self.model.disable_adapter():
                    yield
            else:
                self._activate(name)
                yield
        finally:
            self._activate(POLICY)

    def _activate(self, name: str) -> None:
        # peft makes the active adapter trainable, its part in the encoder too.
        self.model.base_model.set_adapter(name)
        if self._encoder_is_frozen and name not in self._encoder_weights:
            encoder = self.model.get_base_model().get_encoder()
            self._encoder_weights[name] = [weight for weight in encoder.parameters() if weight.requires_grad]
        for weight in self._encoder_weights.get(name, ()):
            weight.requires_grad_(False)

    def add(self, name: str, folder: Path) -> None:
        """Load the LoRA in `folder` as a further, frozen adapter. Raises as `loading_adapter`."""
        with loading_adapter("adapter", folder):
            self.model.load_adapter(str(folder), adapter_name=name)
        require_layers(self.model, name, "adapter", folder)
        require_finite(self.model, "adapter", str(folder))

    def save(self, folder: Path) -> None:
        """Write the policy's adapter as a folder that peft loads on the base."""
        self.model.save_pretrained(str(folder), selected_adapters=[POLICY], save_embedding_layers=False)


class FullWeights:
    """A whole model that trains, and frozen models by name; the name None stands for the initial policy.

    The model that trains is a copy of the given one, which stays as it was. Weights that never train are shared.
    """

    reference = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, train_encoder: bool) -> None:
        self._tokenizer = tokenizer
        if model.config.is_encoder_decoder and not train_encoder:
            model.get_encoder().requires_grad_(False)  # This includes the embeddings that the decoder shares.

        frozen = {id(weight): weight for weight in model.parameters() if not weight.requires_grad}
        trains = any(weight.requires_grad for weight in model.parameters())
        self.model = copy.deepcopy(model, frozen) if trains else model
        initial = model.requires_grad_(False)
        self.models: dict[str | None, Any] = {POLICY: self.model, None: initial}
        self.active: Any = self.model

    def of(self, name: str | None) -> tuple[Any, None]:
        """Return the model that has the weights `name`; no adapter is on it."""
        return self.models[name], None

    def packed(self, pack: Callable[[], T]) -> T:
        """Return weights in another layout. They change with every update, so they are packed at each call."""
        return pack()

    def forget_packed(self) -> None:
        """Do nothing: what was packed is not kept."""

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Make passes inside the block use the model `name`."""
        self.active = self.models[name]
        try:
            yield
        finally:
            self.active = self.model

    def add(self, name: str, folder: Path) -> None:
        """Load the model in `folder` as a further, frozen model. Raises InputError and StorageError as `load_base`."""
        model, tokenizer = load_base(str(folder), "adapter")
        same_kind = type(model) is type(self.model) and tokenizer.get_vocab() == self._tokenizer.get_vocab()
        rule = f"is a {type(model).__name__} of another architecture or vocabulary than the base"
        require(same_kind, "adapter", str(folder), rule, "give a model that was trained from the base")
        self.models[name] = model.requires_grad_(False).to(self.model.device)  # type: ignore[arg-type]

    def save(self, folder: Path) -> None:
        """Write the policy's model and its tokenizer as a folder that transformers loads."""
        save_base(self.model, self._tokenizer, folder)


Weights = LoraWeights | FullWeights


@contextmanager
def loading_adapter(field: str, folder: Path) -> Iterator[None]:
    """Let peft load the LoRA in `folder` inside the block.

    Raises InputError when there is none or when it belongs to another base, StorageError when its weights are
    corrupted.
    """
    require_adapter_files(folder, field, str(folder))
    weights = folder / ADAPTER_WEIGHTS
    with explain_corruption(weights, "train again or put it back"), safe_open(weights, framework="pt"):
        pass

    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError) as error:  # Shapes or targets of another base.
        reason = f"does not load on the base: {' '.join(str(error).split())[:200]}"
        raise InputError(field, str(folder), reason, "give an adapter of this base") from error


def require_layers(model: PeftModel, name: str, field: str, folder: Path) -> None:
    """Raise InputError when the LoRA `name` came from a folder with other layers, which peft ignores silently."""
    loaded = set(get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False))
    stored = set(load_file(folder / ADAPTER_WEIGHTS))
    # peft saves the base's own weight beside a LoRA on embeddings.
    different = sorted(key for key in loaded ^ stored if not key.endswith(".base_layer.weight"))
    rule = f"belongs to a base with other layers, {different[0]} for one" if different else ""
    require(not different, field, str(folder), rule, "give an adapter of this base")
