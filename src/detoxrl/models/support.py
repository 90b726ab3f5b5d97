"""Can a model be trained here, and if not, why?

What its config tells is asked here, before any weights are read. What only a pass through the model tells is tried by
`sampling.require_agreement`.
"""

from typing import Any

from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    DynamicCache,
    PreTrainedConfig,
)
from transformers.cache_utils import DynamicLayer

from detoxrl.errors import require

GENERATOR_EXAMPLES = "give a T5, BART, GPT-2 or Llama, for example"
_OTHER_INPUTS = {"vision_config": "images", "audio_config": "sound"}
# The decoders of these want more of an encoder than its hidden states, which are all that is kept of a prompt.
_EXPERTS_IN_ENCODER = ("nllb-moe", "switch_transformers")


def require_generator(field: str, source: str, config: PreTrainedConfig) -> None:
    """Raise InputError unless a model of this config writes text, in a way that can be sampled and scored here."""
    name = config.model_type
    for part, content in _OTHER_INPUTS.items():
        rule = f"is a {name}, which also reads {content}; only models of text alone are supported"
        require(part not in config.sub_configs, field, source, rule, "save its text model alone and give that")

    has_encoder = config.is_encoder_decoder
    generators: Any = MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING if has_encoder else MODEL_FOR_CAUSAL_LM_MAPPING
    rule = f"is a {name}, which does not generate text"
    require(type(config) in generators, field, source, rule, GENERATOR_EXAMPLES)

    if has_encoder:
        rule = f"is a {name}, whose encoder gives its decoder more than hidden states, which is not supported"
        require(name not in _EXPERTS_IN_ENCODER, field, source, rule, GENERATOR_EXAMPLES)
    else:
        _require_causal(field, source, config, generators[type(config)])


def _require_causal(field: str, source: str, config: PreTrainedConfig, model_class: Any) -> None:
    """Raise InputError unless a model without encoder looks at earlier tokens only, and caches keys and values."""
    # transformers loads a BERT as a causal model too, although it was trained to look at both sides of a token. So a
    # causal model must be of the class that it was saved as.
    architectures = config.architectures or [model_class.__name__]
    rule = f"is a {architectures[0]}, which does not generate text"
    require(model_class.__name__ in architectures, field, source, rule, GENERATOR_EXAMPLES)

    name = config.model_type
    was_masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or name == "xlnet"
    looks_back = not was_masked or bool(config.to_dict().get("is_decoder"))
    rule = f"is a {name} that looks at both sides of a token, so it cannot write from left to right"
    require(looks_back, field, source, rule, GENERATOR_EXAMPLES)

    # A state sums up all tokens before it, padding included, and rows cannot be taken from it as from keys and values.
    rule = f"is a {name}, which keeps a state in place of keys and values, and such models are not supported"
    keeps_keys = not model_class._is_stateful and _caches_keys_and_values(config)
    require(keeps_keys, field, source, rule, GENERATOR_EXAMPLES)


def _caches_keys_and_values(config: PreTrainedConfig) -> bool:
    return all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=config).layers)
