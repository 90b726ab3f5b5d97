"""Prompts of chat models: token by token what their own template makes, and cut in the user's text alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from chat_templates import FAMILIES, GEMMA2, LLAMA3, QWEN3, SMOLLM2, chat_tokenizer
from conftest import policy_config
from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.data.conversations import as_text, messages_of, user_characters, with_user_text
from detoxrl.data.prompts import PromptWriter
from detoxrl.data.rows import Row
from detoxrl.errors import InputError
from detoxrl.models.chat import Message, render_chat, uses_chat_template
from detoxrl.models.lora import load_policy

TALK = (
    Message("user", "  You lost my parcel, you clown!"),
    Message("assistant", "I am sorry. It will come tomorrow."),
    Message("user", "Tomorrow is too late.\n\nCall them now 😀"),
)


def chat(**data: Any) -> Config:
    config = recipe("own", {"policy.base": "b", "data.task": "chat"})
    return replace(config, data=replace(config.data, **data))


def row(messages: tuple[Message, ...] = TALK) -> Row:
    return Row(id="a", text=as_text(messages), messages=messages)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tokenizer(bases: dict[str, Path], family: str) -> PreTrainedTokenizerFast:
    return chat_tokenizer(bases["gpt2"], FAMILIES[family])


def ids_of(tokenizer: PreTrainedTokenizerFast, messages: list[dict[str, str]]) -> list[int]:
    """Return the token ids that the tokenizer's own template gives."""
    ids = tokenizer.apply_chat_template(
        messages, tokenize=True, add_generation_prompt=True, return_dict=False, enable_thinking=False
    )
    assert isinstance(ids, list)
    return ids


def plain(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [{"role": message.role, "content": message.content} for message in messages]


def test_a_chat_prompt_has_the_tokens_of_the_template_and_no_second_bos(
    tokenizer: PreTrainedTokenizerFast, family: str
) -> None:
    writer = PromptWriter(chat(), tokenizer)
    (prompted,), (length,) = writer.with_prompts([row()])
    expected = ids_of(tokenizer, plain(TALK))
    assert tokenizer(prompted.prompt, add_special_tokens=False).input_ids == expected
    assert length == len(expected)
    assert writer.as_read(prompted.prompt) == tokenizer.decode(expected)
    bos = FAMILIES[family].bos
    if bos is not None:
        assert expected.count(tokenizer.bos_token_id) == 1


def test_a_policy_reads_the_same_tokens(bases: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = chat_tokenizer(bases["llama"], LLAMA3)
    policy = load_policy(str(bases["llama"]), None, policy_config("llama"), seed=0)
    policy.tokenizer = tokenizer
    (prompted,), _ = PromptWriter(chat(), tokenizer).with_prompts([row()])
    encoded = policy.for_prompts_of(chat().data).encode([prompted.prompt])
    assert encoded.states[0].tolist() == ids_of(tokenizer, plain(TALK))
    assert policy.for_prompts_of(chat(chat_template=False).data).encode(["Hi"]).states[0, 0] == tokenizer.bos_token_id


def test_the_text_of_another_task_is_the_users_message(tokenizer: PreTrainedTokenizerFast) -> None:
    config = recipe("own", {"policy.base": "b", "data.template": "Sum up: {dialogue}"})
    (prompted,), _ = PromptWriter(config, tokenizer).with_prompts([Row(id="a", text="A: Hi.")])
    expected = ids_of(tokenizer, [{"role": "user", "content": "Sum up: A: Hi."}])
    assert tokenizer(prompted.prompt, add_special_tokens=False).input_ids == expected


def test_a_continuation_is_plain_text_even_if_there_is_a_template(tokenizer: PreTrainedTokenizerFast) -> None:
    config = recipe("own", {"policy.base": "b", "data.task": "continue"})
    (prompted,), _ = PromptWriter(config, tokenizer).with_prompts([Row(id="a", text="The dog")])
    assert prompted.prompt == "The dog"
    assert not uses_chat_template(config.data, tokenizer)
    asked = replace(config, data=replace(config.data, chat_template=True))
    (prompted,), _ = PromptWriter(asked, tokenizer).with_prompts([Row(id="a", text="The dog")])
    assert tokenizer(prompted.prompt, add_special_tokens=False).input_ids == ids_of(
        tokenizer, [{"role": "user", "content": "The dog"}]
    )


def test_a_system_prompt_is_read_by_every_family(tokenizer: PreTrainedTokenizerFast, family: str) -> None:
    writer = PromptWriter(chat(system_prompt="Answer briefly."), tokenizer)
    (prompted,), _ = writer.with_prompts([row()])
    assert prompted.prompt.count("Answer briefly.") == 1
    system = {"role": "system", "content": "Answer briefly."}
    if FAMILIES[family].has_system_role:
        assert prompted.prompt == render_chat(tokenizer, (Message("system", "Answer briefly."), *TALK))
        ids = ids_of(tokenizer, [system, *plain(TALK)])
    else:
        first, *others = plain(TALK)
        first["content"] = f"Answer briefly.\n\n{first['content']}"
        ids = ids_of(tokenizer, [first, *others])
    assert tokenizer(prompted.prompt, add_special_tokens=False).input_ids == ids


def test_the_system_message_of_a_conversation_replaces_the_configs(bases: dict[str, Path]) -> None:
    tokenizer = chat_tokenizer(bases["gpt2"], SMOLLM2)
    messages = (Message("system", "Be kind."), *TALK)
    (prompted,), _ = PromptWriter(chat(system_prompt="Answer briefly."), tokenizer).with_prompts([row(messages)])
    assert "Be kind." in prompted.prompt
    assert "Answer briefly." not in prompted.prompt


def test_a_model_that_can_think_aloud_is_told_not_to(bases: dict[str, Path]) -> None:
    tokenizer = chat_tokenizer(bases["gpt2"], QWEN3)
    assert render_chat(tokenizer, TALK).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


@pytest.mark.parametrize("limit", [40, 60, 80, 100])
def test_only_the_users_text_is_cut_the_oldest_first(bases: dict[str, Path], limit: int) -> None:
    tokenizer = chat_tokenizer(bases["gpt2"], SMOLLM2)
    long = (
        Message("user", "old words " * 40),
        Message("assistant", "A reply that stays."),
        Message("user", "new words " * 5),
    )
    writer = PromptWriter(chat(max_prompt_tokens=limit), tokenizer)
    shortest = writer.token_lengths([render_chat(tokenizer, with_user_text(long, 0))])[0]
    if shortest > limit:
        with pytest.raises(InputError, match=r"is less than the \d+ tokens of row a without the user's messages"):
            writer.with_prompts([row(long)])
        return

    (cut,), (length,) = writer.with_prompts([row(long)])
    assert length > limit >= writer.token_lengths([cut.prompt])[0]
    assert "A reply that stays." in cut.prompt
    assert cut.prompt.startswith("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n")
    assert cut.prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
    kept = cut.prompt.partition("<|im_start|>user\n")[2].partition("<|im_end|>")[0]
    assert long[0].content.endswith(kept)
    assert kept == "" or kept.startswith(("old", "words"))
    if kept:
        assert long[2].content in cut.prompt


@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=8)), max_size=6), st.integers(0, 50))
def test_a_cut_keeps_the_last_characters_of_the_user_and_every_other_message(
    talk: list[tuple[str, str]], kept: int
) -> None:
    messages = [Message(role, content) for role, content in talk]
    cut = with_user_text(messages, kept)
    assert [message.role for message in cut] == [message.role for message in messages]
    assert as_text(cut, only="assistant") == as_text(messages, only="assistant")
    whole = as_text(messages, only="user")
    assert as_text(cut, only="user") == whole[max(0, len(whole) - kept) :]
    assert user_characters(cut) == min(kept, len(whole))


def test_a_model_without_a_template_reads_plain_text_and_refuses_what_needs_one(bases: dict[str, Path]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bases["gpt2"])
    writer = PromptWriter(chat(), tokenizer)
    assert not writer.in_chat
    (prompted,), _ = writer.with_prompts([row()])
    assert prompted.prompt == f"{as_text(TALK)}\nAssistant:"
    assert prompted.prompt.startswith("User:   You lost my parcel")
    with pytest.raises(InputError, match=r"data\.chat_template = True: needs a chat template, and the tokenizer of b"):
        PromptWriter(chat(chat_template=True), tokenizer)
    with pytest.raises(InputError, match=r"data\.system_prompt = 'x': needs a chat template"):
        PromptWriter(chat(system_prompt="x"), tokenizer)


def test_messages_that_a_template_refuses_are_one_line_with_the_row(bases: dict[str, Path]) -> None:
    tokenizer = chat_tokenizer(bases["gpt2"], GEMMA2)
    twice = (TALK[0], TALK[0])
    with pytest.raises(InputError, match=r"data\.source = .*: row a does not fit the chat template of b: Roles must"):
        PromptWriter(chat(), tokenizer).with_prompts([row(twice)])


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (3, r"data\.text_column = 'messages': contains int, not messages, in row 1"),
        (["hi"], r"contains str, not a message, as message 1 of row 1"),
        ([{"role": "tool", "content": "x"}], r"contains the role 'tool' in message 1 of row 1; give a list of"),
        ([{"role": "user", "content": 3}], r"contains other than text in message 1 of row 1"),
        ([{"role": "user", "content": [{"type": "image"}]}], r"contains other than text in message 1"),
    ],
)
def test_what_is_no_conversation_is_one_line(value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        messages_of(value, "data.text_column", "messages", "row 1")


def test_messages_may_stand_in_parts_and_a_text_alone_is_the_users() -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": ", you."}]
    assert messages_of([{"role": "user", "content": parts}], "f", "c", "p") == (Message("user", "Hello, you."),)
    assert messages_of("Hi", "f", "c", "p") == (Message("user", "Hi"),)
    assert messages_of(None, "f", "c", "p") == messages_of("", "f", "c", "p") == ()


def test_targets_of_a_chat_end_as_a_turn_does(bases: dict[str, Path]) -> None:
    from detoxrl.training.finetune import examples

    tokenizer = chat_tokenizer(bases["gpt2"], GEMMA2)
    prompt = render_chat(tokenizer, TALK)
    (ids,), (labels,) = examples(tokenizer, [(prompt, "Fine.")], encoder_decoder=False, in_chat=True)
    whole = tokenizer.apply_chat_template([*plain(TALK), {"role": "assistant", "content": "Fine."}], tokenize=False)
    assert ids == tokenizer(str(whole).rstrip("\n"), add_special_tokens=False).input_ids
    assert labels[-1] == tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert ids.count(tokenizer.bos_token_id) == 1
