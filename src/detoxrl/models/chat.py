"""How does a conversation become the text that a chat model reads?"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from detoxrl.config.schema import DataConfig

_PROBE = "Be brief."
_ANSWER = "the-answer-of-the-assistant"


@dataclass(frozen=True)
class Message:
    """One message of a conversation: who wrote it (system, user or assistant), and its text."""

    role: str
    content: str


def uses_chat_template(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether prompts go through the chat template of a tokenizer, special tokens included."""
    if config.chat_template is not None:
        return config.chat_template
    return tokenizer.chat_template is not None and config.task != "continue"


def render_chat(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """Return what a chat model reads before its reply, special tokens included, by the tokenizer's own template.

    The assistant's reply is begun as the template begins it, and models that can think aloud first are told not to.
    Where a template has no role for the system, its message stands at the beginning of the user's first one. Raises
    jinja2's TemplateError for messages that the template refuses.
    """
    if messages[0].role == "system" and not has_system_role(tokenizer):
        messages = _with_system_in_user(messages)
    return _render(tokenizer, messages)


def _render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    plain = [asdict(message) for message in messages]
    rendered = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    return str(rendered)


def has_system_role(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether a template shows the system's message; some refuse it, and some leave it out."""
    messages = [Message(role="system", content=_PROBE), Message(role="user", content="Hello")]
    try:
        return _PROBE in _render(tokenizer, messages)
    except TemplateError:
        return False


def _with_system_in_user(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the system's at the beginning of the user's first one."""
    system, *others = messages
    first = next(index for index, message in enumerate(others) if message.role == "user")
    others[first] = Message(role="user", content=f"{system.content}\n\n{others[first].content}")
    return others


def end_of_turn_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the special token that the chat template puts behind an assistant's message.

    None means that the tokenizer has no template, or that its template puts no special token there or is broken.
    """
    if tokenizer.chat_template is None:
        return None

    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _ANSWER}]
    try:
        rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except TemplateError:
        return None

    after_answer = rendered.partition(_ANSWER)[2]
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    ids = tokenizer(after_answer, add_special_tokens=False).input_ids
    return next((id for id in ids if id in special), None)
