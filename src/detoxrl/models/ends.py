"""Which tokens stand at the two ends of a response?

A decoder begins with tokens that are given to it: a start token, and in some models a first token that is always the
same, such as the language in an mBART. They are no part of the response, so they have no log-prob.

The tokens that end a response are named in up to four places: config.json, generation_config.json, the tokenizer and
its chat template. None of them is complete. A Llama 3 that was trained for chat, for example, ends its turn with
<|eot_id|>, which may be named in its generation_config.json alone.
"""

from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.errors import require
from detoxrl.models.chat import end_of_turn_id

_TRAINED_WITH = "give the tokenizer that the model was trained with"


def end_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids, ascending, of the tokens that end a response: those of the model and those of its tokenizer."""
    return sorted(_model_ends(model) | _tokenizer_ends(tokenizer))


def start_token_ids(model: PreTrainedModel) -> list[int]:
    """Return the ids of the tokens that the decoder of a model with an encoder begins with."""
    generation = _generation_config(model)
    assert generation.decoder_start_token_id is not None, "load_base checks it"
    forced = generation.forced_bos_token_id
    return [generation.decoder_start_token_id] + ([] if forced is None else [forced])


def as_ids(setting: Any) -> set[int]:
    """Return the ids in a setting that holds one, several or none."""
    if setting is None:
        return set()
    return set(setting) if isinstance(setting, list) else {setting}


def require_common_end(field: str, source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise InputError unless the tokenizer has an EOS token, and one of its end tokens is one of the model's."""
    eos = tokenizer.eos_token_id
    rule = "has a tokenizer without an EOS token, which has to end what the policy learns to write"
    require(eos is not None, field, source, rule, "name its eos_token in tokenizer_config.json")

    of_model = sorted(_model_ends(model))
    rule = f"has a tokenizer with eos_token_id {eos}, but the model's is {of_model or None}"
    remedy = _TRAINED_WITH if of_model else "name it in the model's config.json"
    require(not _tokenizer_ends(tokenizer).isdisjoint(of_model), field, source, rule, remedy)


def _model_ends(model: PreTrainedModel) -> set[int]:
    return as_ids(_generation_config(model).eos_token_id)


def _generation_config(model: PreTrainedModel) -> GenerationConfig:
    assert model.generation_config is not None, "every model that generates text has one"
    return model.generation_config


def _tokenizer_ends(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of the tokenizer's EOS token and of the token that ends a turn in its chat template."""
    return as_ids(tokenizer.eos_token_id) | as_ids(end_of_turn_id(tokenizer))
