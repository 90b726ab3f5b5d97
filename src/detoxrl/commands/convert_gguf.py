"""How does a GGUF model become a folder of safetensors that a run can start from?"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    modeling_gguf_pytorch_utils,
)

from detoxrl.commands.gguf_header import GgufHeader
from detoxrl.commands.preflight import convertible_gguf
from detoxrl.errors import InputError, StorageError, require
from detoxrl.models.loading import load_base, load_pretrained, save_base
from detoxrl.runtime.console import log, progress
from detoxrl.runtime.files import replace_folder

_REMEDY = "use the safetensors of the model"
# Tokens that end a response, besides those that the settings name: a chat model has one for a turn, one for a text.
_END_SETTINGS = ("eos", "eot", "eom")
_END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|end|>", "<end_of_turn>", "<EOT>",
)  # fmt: skip
# How a byte-level tokenizer splits a text before it merges, by its name in llama.cpp (src/llama-vocab.cpp). These two
# are missing in transformers, which takes the split of GPT-2 for every one that it does not know.
_SPLIT_AS_GPT2 = ("gpt-2", "mpt", "olmo", "phi-2")
_SPLIT_DIGITS_TOO = ("smollm", "starcoder", "refact")
# What original and copy have to read alike: punctuation, numbers, emoji, white space.
_SENTENCES = "Hello, it's 3:45 pm!\n\n1. Thank you 😀\n\n\n2. That is  very\tkind of you, café.\n"
_PROMPT = "Thank you, that is"
_NEW_TOKENS = 16


def convert_gguf(source: str, target: Path) -> str:
    """Write a GGUF file's causal model to the new folder `target`, in float32, with tokenizer and chat template.

    The folder gets its name once it has been read again, and gave the same weights, token ids and greedy response.
    Returns what was written, in words. Raises InputError when the file cannot be converted, StorageError when the copy
    differs.
    """
    header = convertible_gguf(source, target)
    model, tokenizer = _read(source, header)

    log.print(f"writing safetensors of {_size(header.float32_bytes)}", soft_wrap=True)
    with replace_folder(target) as temporary:
        save_base(model, tokenizer, temporary)
        log.print("reading them again to compare weights, token ids and a greedy response", soft_wrap=True)
        _require_same(temporary, source, model, tokenizer)
        written = sum(path.stat().st_size for path in temporary.iterdir())

    template = "tokenizer and chat template" if tokenizer.chat_template else "tokenizer, no chat template"
    return f"{type(model).__name__} in float32, {template} ({_size(written)})"


def _read(source: str, header: GgufHeader) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the model in float32, with every end token in its settings, and the tokenizer."""
    # transformers also reads what is beside a GGUF file, a tokenizer.json or a LoRA: hence an empty folder.
    with TemporaryDirectory() as empty:
        file = str(Path(source).resolve())
        config = load_pretrained(AutoConfig, empty, source, "FROM", _REMEDY, gguf_file=file)
        tokenizer = load_pretrained(AutoTokenizer, empty, source, "FROM", _REMEDY, gguf_file=file)
        _correct_split(tokenizer, header, source)

        log.print(f"reading {source}: {len(header.weights)} weights to float32", soft_wrap=True)
        # transformers draws a bar of tqdm meanwhile, which it cannot turn off.
        with patch.object(modeling_gguf_pytorch_utils, "tqdm", _counted):
            model, info = load_pretrained(
                AutoModelForCausalLM,
                empty,
                source,
                "FROM",
                _REMEDY,
                config=config,
                gguf_file=file,
                quantization_config=GgufConfig(dequantize=True),
                dtype=torch.float32,
                output_loading_info=True,
            )

    if info["missing_keys"]:  # transformers would make them up
        raise InputError("FROM", source, f"lacks weights, for example {min(info['missing_keys'])}", _REMEDY)
    _set_end_tokens(model, tokenizer, header)
    return model.eval(), tokenizer


def _counted(items: Sequence[Any], desc: str) -> Iterator[Any]:
    """Yield the items, and show how many are done. The arguments are those of tqdm."""
    with progress("weights", len(items)) as reach:
        for number, item in enumerate(items, start=1):
            yield item
            reach(number, "")


def _correct_split(tokenizer: PreTrainedTokenizerBase, header: GgufHeader, source: str) -> None:
    """Make a byte-level tokenizer split texts as its merges were trained. Raises InputError if that is unknown."""
    is_default = isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.ByteLevel)
    split = header.settings.get("tokenizer.ggml.pre", "")
    if not is_default or split in _SPLIT_AS_GPT2:
        return

    rule = f"has a tokenizer that splits texts as {split!r}, which transformers does not know"
    require(split in _SPLIT_DIGITS_TOO, "FROM", source, rule, _REMEDY)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _set_end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, header: GgufHeader) -> None:
    """Name every token that ends a response in the settings of the model, the tokenizer's EOS first."""
    named = [header.settings.get(f"tokenizer.ggml.{name}_token_id") for name in _END_SETTINGS]
    special = {str(token): id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = [special.get(token) for token in _END_TOKENS]
    ids = list(dict.fromkeys(id for id in (*named, *known) if id is not None))

    model.config.eos_token_id = ids if len(ids) > 1 else ids[0]
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ids, pad_token_id=tokenizer.pad_token_id
    )


def _require_same(folder: Path, source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise StorageError unless the written folder gives what the GGUF file gives, InputError if no run can use it."""
    try:
        copy, copy_tokenizer = load_base(str(folder), "TO")
    except InputError as error:
        raise InputError("FROM", source, f"gives a model that no run can use ({error})", _REMEDY) from error

    comparisons = {
        "weights": _same_weights(model, copy),
        "token ids": tokenizer(_SENTENCES).input_ids == copy_tokenizer(_SENTENCES).input_ids,
        "chat template": tokenizer.chat_template == copy_tokenizer.chat_template,
        "greedy response": _greedy(model, tokenizer) == _greedy(copy, copy_tokenizer),
    }
    different = [name for name, same in comparisons.items() if not same]
    if different:
        raise StorageError(f"safetensors of {source} differ from it in {', '.join(different)}; nothing was written")


def _same_weights(model: PreTrainedModel, copy: PreTrainedModel) -> bool:
    weights = model.state_dict()
    copied = copy.state_dict()
    return weights.keys() == copied.keys() and all(torch.equal(weights[name], copied[name]) for name in weights)


def _greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of a prompt with the most likely response."""
    encoded = tokenizer(_PROMPT, return_tensors="pt")
    ids: list[int] = model.generate(**encoded, max_new_tokens=_NEW_TOKENS, do_sample=False)[0].tolist()  # type: ignore
    return ids


def _size(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"
