"""A response ends with any token that the model, its generation config, its tokenizer or its chat template names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
)

from conftest import policy_config, small_config
from detoxrl.commands import export
from detoxrl.commands.preflight import check_locally
from detoxrl.config.edit import with_settings
from detoxrl.errors import InputError
from detoxrl.models.chat import end_of_turn_id
from detoxrl.models.loading import load_base, load_fitting_shapes, load_tokenizer, save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.weights import POLICY


class Chat(NamedTuple):
    """A tokenizer for chat in the manner of a family of models, and where its model names what ends a response."""

    start: str
    end_of_turn: str
    template: str
    eos: str  # Of the tokenizer.
    in_config: tuple[str, ...]
    in_generation_config: tuple[str, ...] | None  # None: there is no such file.
    ends: tuple[str, ...]  # What ends a response, all together.


LLAMA = """{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end_of_header|>

{{ m['content'] | trim }}<|eot_id|>{% endfor %}"""
GEMMA = """{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}
{{ m['content'] | trim }}<end_of_turn>
{% endfor %}"""
CHATML = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}"""
CHATS = {
    "llama 3": Chat("<|start|>", "<|eot_id|>", LLAMA, "</s>", ("</s>",), ("</s>", "<|eot_id|>"),
                    ("</s>", "<|eot_id|>")),
    "llama 3 with another EOS in its tokenizer": Chat(
        "<|start|>", "<|eot_id|>", LLAMA, "<|eot_id|>", ("</s>",), ("</s>", "<|eot_id|>"), ("</s>", "<|eot_id|>")),
    "gemma": Chat("<start_of_turn>", "<end_of_turn>", GEMMA, "</s>", ("</s>",), None, ("</s>", "<end_of_turn>")),
    "qwen": Chat("<|im_start|>", "<|im_end|>", CHATML, "<|im_end|>", ("<|im_end|>",), ("<|im_end|>", "</s>"),
                 ("</s>", "<|im_end|>")),
    "qwen's base": Chat("<|im_start|>", "<|im_end|>", CHATML, "</s>", ("</s>",), ("</s>",), ("</s>", "<|im_end|>")),
    "EOS named by the chat template alone": Chat(
        "<|im_start|>", "<|im_end|>", CHATML, "</s>", ("<|im_end|>",), None, ("</s>", "<|im_end|>")),
}  # fmt: skip


def chat_tokenizer(base: Path, chat: Chat) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"additional_special_tokens": [chat.start, chat.end_of_turn]})
    tokenizer.eos_token = chat.eos
    tokenizer.chat_template = chat.template
    return tokenizer


def ids_of(tokenizer: PreTrainedTokenizerBase, tokens: tuple[str, ...]) -> list[int]:
    return sorted(tokenizer.convert_tokens_to_ids(list(tokens)))


def save_chat_model(base: Path, folder: Path, chat: Chat) -> PreTrainedTokenizerBase:
    """Write a tiny Llama with the tokenizer of a chat, and return the tokenizer."""
    tokenizer = chat_tokenizer(base, chat)
    torch.manual_seed(7)
    in_config = ids_of(tokenizer, chat.in_config)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, bos_token_id=None,
        eos_token_id=in_config[0] if len(in_config) == 1 else in_config,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    path = folder / "generation_config.json"
    path.unlink()
    if chat.in_generation_config is not None:
        settings = {"eos_token_id": ids_of(tokenizer, chat.in_generation_config), "top_p": 0.6, "max_length": 4096}
        path.write_text(json.dumps(settings))
    return tokenizer


def with_generation_settings(folder: Path, **settings: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize("name", CHATS)
def test_the_end_of_a_turn_is_read_from_the_chat_template(bases: dict[str, Path], name: str) -> None:
    chat = CHATS[name]
    tokenizer = chat_tokenizer(bases["gpt2"], chat)
    assert end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids(chat.end_of_turn)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (None, None),
        ("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", None),  # no special token
        ("</s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}", None),  # one, but in front
        ("{{ raise_exception('No answers, please.') }}", None),
        ("{{ messages[0]['content'] }}</s>", None),  # the answer is left out
        ("{% for m in messages %}{{ m['content'] }} and \n</s><|im_end|>{% endfor %}", "</s>"),  # the first counts
    ],
)
def test_the_end_of_a_turn_is_the_first_special_token_behind_the_answer(
    bases: dict[str, Path], template: str | None, expected: str | None
) -> None:
    tokenizer = chat_tokenizer(bases["gpt2"], CHATS["qwen"])
    tokenizer.chat_template = template
    assert end_of_turn_id(tokenizer) == (None if expected is None else tokenizer.convert_tokens_to_ids(expected))


@pytest.mark.parametrize("name", CHATS)
def test_each_named_end_ends_a_response_and_is_kept_by_saved_models(
    bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    chat = CHATS[name]
    tokenizer = save_chat_model(bases["gpt2"], tmp_path / "chat", chat)
    ends = ids_of(tokenizer, chat.ends)

    for full in (False, True):
        policy = load_policy(str(tmp_path / "chat"), None, policy_config("llama", full=full), seed=0)
        assert policy.eos_token_ids == ends
    policy.save(tmp_path / "full weights")

    encoded = policy.encode(["Short."])
    logits, _ = policy._network(POLICY).steps(encoded, 2, 1).next(None)
    probabilities = logits.detach().softmax(-1).flatten()
    for end in ends:
        in_the_middle = float(probabilities[:end].sum() + probabilities[end] / 2)
        responses = policy.sample(encoded, torch.tensor([[in_the_middle, 0.5]]), 1.0)
        assert responses.ids[0, 0] == end
        assert responses.ended.tolist() == [True]

    model, again = load_base(str(tmp_path / "chat"))
    save_base(model, again, tmp_path / "warm start")
    for folder in ("full weights", "warm start"):
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id == ends
    assert export._generation_config(model, again, small_config()).eos_token_id == ends


def test_shapes_alone_have_the_ends_of_the_generation_config(bases: dict[str, Path], tmp_path: Path) -> None:
    chat = CHATS["llama 3 with another EOS in its tokenizer"]
    tokenizer = save_chat_model(bases["gpt2"], tmp_path, chat)
    shapes = load_fitting_shapes(str(tmp_path), load_tokenizer(str(tmp_path)), bf16=False)
    assert export._generation_config(shapes, tokenizer, small_config()).eos_token_id == ids_of(tokenizer, chat.ends)


def test_the_generation_config_may_be_missing(bases: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = load_base(str(bases["t5"]))
    save_base(model, tokenizer, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    again, _ = load_base(str(tmp_path))
    assert isinstance(again, T5ForConditionalGeneration)
    assert again.generation_config.eos_token_id == [1]


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ("{", "has a malformed generation_config.json"),
        ("[1]", "has a malformed generation_config.json"),
        ('{"eos_token_id": "</s>"}', r"has eos_token_id = '</s>' in generation_config\.json, which is neither an id"),
        ('{"eos_token_id": [1, null]}', r"has eos_token_id = \[1, None\] in generation_config\.json"),
        ('{"eos_token_id": true}', "has eos_token_id = True in generation_config.json"),
    ],
)
def test_a_malformed_generation_config_is_one_line(
    bases: dict[str, Path], tmp_path: Path, content: str, rule: str
) -> None:
    save_base(*load_base(str(bases["t5"])), tmp_path)
    (tmp_path / "generation_config.json").write_text(content)
    config = with_settings(small_config(), {"policy.base": str(tmp_path)})
    for check in (lambda: load_base(str(tmp_path)), lambda: check_locally(config)):
        with pytest.raises(InputError, match=rf"policy\.base = '.*': {rule}.*; restore the file") as raised:
            check()
        assert "\n" not in str(raised.value)


def test_a_tokenizer_needs_an_end_that_the_model_knows(bases: dict[str, Path], tmp_path: Path) -> None:
    chat = CHATS["llama 3"]
    tokenizer = save_chat_model(bases["gpt2"], tmp_path, chat)
    tokenizer.chat_template = None
    tokenizer.eos_token = chat.end_of_turn
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    load_base(str(tmp_path))

    with_generation_settings(tmp_path)  # Now nothing but the config names an end, and that is another one.
    end = tokenizer.convert_tokens_to_ids(chat.end_of_turn)
    with pytest.raises(InputError, match=rf"has a tokenizer with eos_token_id {end}, but the model's is \[1\]; give"):
        load_base(str(tmp_path))

    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"eos_token_id": None}))
    with pytest.raises(InputError, match=r"but the model's is None; name it in the model's config\.json"):
        load_base(str(tmp_path))

    with_generation_settings(tmp_path, eos_token_id=end)
    load_base(str(tmp_path))

    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has a tokenizer without an EOS token, .*; name its eos_token in tokenizer_"):
        load_base(str(tmp_path))


def test_any_end_at_the_end_of_prompts_is_rejected_for_a_causal_model(bases: dict[str, Path], tmp_path: Path) -> None:
    save_base(*load_base(str(bases["llama"])), tmp_path)
    AutoTokenizer.from_pretrained(bases["t5"]).save_pretrained(tmp_path)  # It adds </s>.
    with_generation_settings(tmp_path, eos_token_id=[2])
    with pytest.raises(InputError, match="has a tokenizer that ends every prompt with EOS"):
        load_base(str(tmp_path))
