"""How are policies held in memory while they are measured side by side?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from detoxrl.config.schema import Config
from detoxrl.data.prompts import PromptWriter
from detoxrl.data.rows import Row, to_prompts
from detoxrl.models.base import Base
from detoxrl.models.chat import uses_chat_template
from detoxrl.models.loading import require_positions
from detoxrl.models.lora import frozen_policy, load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Distribution, require_agreement
from detoxrl.models.types import Prompt
from detoxrl.models.weights import POLICY
from detoxrl.runtime.hub import fetch_policy


class MeasuredPolicies:
    """The policies to measure by name, the initial policy first as "before".

    Policies that the run trained, and LoRAs of the same base, are adapters of one policy in memory. Whole models are
    loaded one at a time. They are on the device where they were loaded. `load_base(bf16)` returns the base in bfloat16
    or in fp32. Raises InputError for a policy that does not load.
    """

    def __init__(
        self,
        load_base: Callable[[bool], Base],
        initial_adapter: Path | None,
        trained: Mapping[str, Path],
        given: Mapping[str, str],
        config: Config,
    ) -> None:
        self._initial_adapter = initial_adapter
        self._trained = set(trained)
        self._config = config
        self._folders = {name: Path(fetch_policy(source, "--policy")) for name, source in given.items()}
        self._loras = {
            name: folder for name, folder in self._folders.items() if (folder / "adapter_config.json").is_file()
        }

        self._full_weights = config.policy.full_weights
        adapters = dict(trained) if self._full_weights else {**trained, **self._loras}
        # Without an adapter to start from, "before" is the base alone, so any adapter serves to load it.
        start = None if self._full_weights else initial_adapter or next(iter(adapters.values()), None)
        if start is not None or (self._full_weights and adapters):
            self._base = load_base(config.policy.bf16)
            self._policy = self._base.policy(start, config.policy, config.seed)
        else:
            self._base = load_base(False)  # Whole models beside it are in fp32 too.
            self._policy = self._base.frozen_policy()
        self._policy.for_prompts_of(config.data)

        self._adapter_names: dict[str, str] = {}
        for number, (name, folder) in enumerate(adapters.items()):
            self._adapter_names[name] = f"measured{number}"
            self._base.add_adapter(self._policy, self._adapter_names[name], folder)

        others = [name for name in self._folders if name not in adapters]
        self.names = ["before", *adapters, *others]
        self._other: tuple[str, Policy] | None = None  # The whole model that is in memory.

    @property
    def initial(self) -> Distribution:
        """The distribution of the initial policy's responses."""
        return self.get("before")

    def get(self, name: str) -> Distribution:
        """Return the distribution of the responses of the policy `name`, at the temperature of the config."""
        temperature = self._config.generation.temperature
        initial = self._policy.reference if self._initial_adapter else None
        if name == "before":
            return Distribution(self._policy, initial, temperature, encoder=initial)
        if name in self._adapter_names:
            adapter = self._adapter_names[name]
            # The run trained no part of an encoder unless it was asked to; a LoRA from elsewhere may have such a part.
            same_encoder = name in self._trained and not self._config.policy.train_encoder
            return Distribution(self._policy, adapter, temperature, encoder=initial if same_encoder else adapter)

        if self._other is None or self._other[0] != name:
            self._other = None  # Its memory is free before the next one is loaded.
            self._other = (name, self._load_other(name).for_prompts_of(self._config.data))
        weights = POLICY if name in self._loras else None
        return Distribution(self._other[1], weights, temperature, encoder=weights)

    def has_initial_tokens(self, policy: Policy) -> bool:
        """Return whether token ids of `policy` mean the same to the initial policy."""
        if policy is self._policy:
            return True
        return _tokens(policy) == _tokens(self._policy)

    def reads_another_template(self, policy: Policy) -> bool:
        """Return whether a policy reads prompts in a chat template that the initial policy does not have."""
        data = self._config.data
        templates = [
            tokenizer.chat_template if uses_chat_template(data, tokenizer) else None
            for tokenizer in (policy.tokenizer, self._policy.tokenizer)
        ]
        return templates[0] != templates[1]

    def _load_other(self, name: str) -> Policy:
        folder = self._folders[name]
        if name not in self._loras:
            return frozen_policy(str(folder), "--policy")
        # A LoRA beside a run that trains full weights stands on a base of its own.
        settings = replace(self._config.policy, full_weights=False, adapter=None)
        return load_policy(self._base.source, folder, settings, self._config.seed)


def _tokens(policy: Policy) -> tuple[dict[str, int], int]:
    """Return the token ids of a policy by their texts, and how many logits it has: some have no token."""
    return policy.tokenizer.get_vocab(), len(policy.model.get_output_embeddings().weight)


def prompts_for(policy: Policy, rows: Sequence[Row], config: Config, name: str) -> list[Prompt]:
    """Return the prompts of rows in a policy's own chat template. Raises InputError, with its `name`, for a misfit."""
    prompted, _ = PromptWriter(config, policy.tokenizer, name).with_prompts(rows)
    return to_prompts(prompted)


def try_policies(policies: MeasuredPolicies, given: Mapping[str, str], config: Config, rows: Sequence[Row]) -> None:
    """Raise InputError unless each policy loads, reads the rows, and samples with the log-probs that it scores with."""
    for name in policies.names:
        policy = policies.get(name).policy
        if policies.reads_another_template(policy):
            prompts_for(policy, rows, config, given.get(name, name))
        require_positions(policy.model.config, config, 0)
        require_agreement(policy, given.get(name, config.policy.base))
