"""How does one base model in memory serve every policy of a run, one after another?"""

from pathlib import Path
from typing import Self

from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.config.schema import PolicyConfig
from detoxrl.models.loading import load_base
from detoxrl.models.lora import make_frozen_policy, make_policy
from detoxrl.models.policy import Policy

# Initialisations of a LoRA that leave the base as it is. Others move a part of the base's weights into the adapter.
_KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva")


class Base:
    """A base model with its tokenizer. Each policy that is made on it takes it over from the one before."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, source: str, bf16: bool = False
    ) -> None:
        self.source = source  # The folder or hub id that it was loaded from.
        self.bf16 = bf16
        self.tokenizer = tokenizer
        self._model = model
        self._trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
        self._adapted: PeftModel | None = None
        self._is_changed = False

    @classmethod
    def load(cls, source: str, bf16: bool = False) -> Self:
        """Load the base of a folder or hub id. Raises InputError and StorageError as `load_base`."""
        model, tokenizer = load_base(source, bf16=bf16)
        return cls(model, tokenizer, source, bf16)

    def model(self) -> PreTrainedModel:
        """Return the model as it was loaded: without adapters, every weight trainable that was so then.

        It is loaded again only if an adapter changed the base's own weights.
        """
        if self._is_changed:
            self._adapted = None
            self._model, _ = load_base(self.source, bf16=self.bf16)
            self._is_changed = False
        if self._adapted is not None:
            self._model = self._adapted.unload()
            self._adapted = None
        for name, weight in self._model.named_parameters():
            weight.requires_grad_(name in self._trainable)
        return self._model

    def policy(self, adapter: Path | None, config: PolicyConfig, seed: int) -> Policy:
        """Return the policy that starts from this base, and from the LoRA in `adapter` if there is one.

        A policy that was made earlier must not be used any more. Raises InputError as `make_policy`.
        """
        model = self.model()
        self._is_changed = True  # If making the policy fails, layers of its adapter may be left on the model.
        policy = make_policy(model, self.tokenizer, adapter, config, seed)
        self._is_changed = False
        if isinstance(policy.model, PeftModel):
            self._adapted = policy.model
            self._is_changed = _changes_base(policy.model)
        return policy

    def add_adapter(self, policy: Policy, name: str, folder: Path) -> None:
        """Load the weights in `folder` beside those of a policy of this base, frozen. Raises as `Policy.add`."""
        policy.add(name, folder)
        if isinstance(policy.model, PeftModel):
            self._is_changed = self._is_changed or _changes_base(policy.model)

    def frozen_policy(self) -> Policy:
        """Return a policy that only samples and scores, without an adapter."""
        return make_frozen_policy(self.model(), self.tokenizer)


def _changes_base(model: PeftModel) -> bool:
    """Return whether an adapter holds copies of the base's modules, its biases, or a part of its weights."""
    return any(
        not isinstance(settings, LoraConfig)
        or bool(settings.modules_to_save)
        or settings.bias != "none"
        or settings.init_lora_weights not in _KEEPS_BASE
        for settings in model.peft_config.values()
    )
