"""Chat templates in the shape of those of well-known model families, and tiny tokenizers that have them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from tokenizers import processors
from transformers import PreTrainedTokenizerFast


class Family(NamedTuple):
    """A chat template, the tokens that it needs, and what its tokenizer does to a plain text."""

    template: str
    tokens: tuple[str, ...]
    bos: str | None = None  # Put before every text by the tokenizer itself, too.
    has_system_role: bool = True


# Header, blank line, content, end of turn; the template writes BOS, and so does the tokenizer.
LLAMA3 = Family(
    template=(
        "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
        "{{ message.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    tokens=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    bos="<|begin_of_text|>",
)
_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
)
_DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are helpful.<|im_end|>\n{% endif %}"
# A system's message of its own if there is none, and no BOS.
QWEN25 = Family(template=f"{_DEFAULT_SYSTEM}{_CHATML}{{% endif %}}", tokens=("<|im_start|>", "<|im_end|>"))
SMOLLM2 = QWEN25
# It can think aloud. Told not to, it begins its reply with empty thoughts.
QWEN3 = Family(
    template=(
        f"{_CHATML}{{% if enable_thinking is defined and enable_thinking is false %}}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}"
    ),
    tokens=("<|im_start|>", "<|im_end|>", "<think>", "</think>"),
)
_GEMMA_TURNS = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# No system role: a system's message is refused (2), or would be lost without its own handling (3).
GEMMA2 = Family(
    template="{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + _GEMMA_TURNS,
    tokens=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    has_system_role=False,
)
GEMMA3 = Family(
    template="{% if messages[0].role == 'system' %}{% set messages = messages[1:] %}{% endif %}" + _GEMMA_TURNS,
    tokens=("<bos>", "<start_of_turn>", "<end_of_turn>"),
    bos="<bos>",
    has_system_role=False,
)
# Instructions in brackets, no header for the assistant, turns end with EOS.
MISTRAL = Family(
    template=(
        "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}"
        "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for message in messages %}"
        "{% if message.role == 'user' %}[INST] {{ system if loop.last else '' }}{{ message.content }} [/INST]"
        "{% else %} {{ message.content }}{{ eos_token }}{% endif %}{% endfor %}"
    ),
    tokens=("<s>", "[INST]", "[/INST]"),
    bos="<s>",
)
FAMILIES = {
    "llama3": LLAMA3,
    "qwen25": QWEN25,
    "qwen3": QWEN3,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "smollm2": SMOLLM2,
    "mistral": MISTRAL,
}


def chat_tokenizer(base: Path, family: Family) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a tiny model with the chat template and the special tokens of a family."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": list(family.tokens)})
    tokenizer.chat_template = family.template
    tokenizer.pad_token = tokenizer.eos_token
    if family.bos is not None:
        tokenizer.bos_token = family.bos
        bos = (family.bos, tokenizer.convert_tokens_to_ids(family.bos))
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A $B", special_tokens=[bos]
        )
    return tokenizer
