"""Which messages does a conversation have, and what is left of them when it is too long?

A conversation is a list of messages with a role (system, user or assistant) and a content, as chat models and data sets
on the hub have them. A text alone is one message of the user.
"""

from collections.abc import Sequence
from typing import Any

from detoxrl.errors import InputError
from detoxrl.models.chat import Message

_ROLES = ("system", "user", "assistant")
_REMEDY = 'give a list of {"role": ..., "content": ...} with the roles system, user and assistant'


def messages_of(value: Any, field: str, column: str, place: str) -> tuple[Message, ...]:
    """Return the messages that a value of a column holds, none for an empty one.

    Raises InputError, with the setting `field`, the name of the column and the record's `place`, for anything else.
    """
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        return (Message(role="user", content=value),)
    if not isinstance(value, list):
        raise InputError(field, column, f"contains {type(value).__name__}, not messages, in {place}", _REMEDY)

    messages = []
    for number, item in enumerate(value, start=1):
        messages.append(_message(item, field, column, f"message {number} of {place}"))
    return tuple(messages)


def _message(item: Any, field: str, column: str, place: str) -> Message:
    if not isinstance(item, dict):
        raise InputError(field, column, f"contains {type(item).__name__}, not a message, as {place}", _REMEDY)

    role = item.get("role")
    if role not in _ROLES:
        raise InputError(field, column, f"contains the role {role!r} in {place}", _REMEDY)
    return Message(role=str(role), content=_content(item.get("content"), field, column, place))


def _content(content: Any, field: str, column: str, place: str) -> str:
    """Return the text of a message, which may stand in parts: `[{"type": "text", "text": ...}]`."""
    if isinstance(content, str):
        return content

    texts = []
    for part in content if isinstance(content, list) else [content]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise InputError(field, column, f"contains other than text in {place}", "leave such rows out")
        texts.append(text)
    return "".join(texts)


def split_reply(messages: tuple[Message, ...]) -> tuple[tuple[Message, ...], str | None]:
    """Return the messages up to the one to reply to, and the reply if the last message is the assistant's."""
    if messages and messages[-1].role == "assistant":
        return messages[:-1], messages[-1].content
    return messages, None


def awaits_reply(messages: Sequence[Message]) -> bool:
    """Return whether the last message is one of the user that says something."""
    return bool(messages) and messages[-1].role == "user" and bool(messages[-1].content.strip())


def as_text(messages: Sequence[Message], only: str | None = None) -> str:
    """Return messages as lines of "User: ...", or the contents of those of one role, one behind the other."""
    if only is not None:
        return "".join(message.content for message in messages if message.role == only)
    return "\n".join(f"{message.role.capitalize()}: {message.content}" for message in messages)


def spoken(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages of user and assistant. Rows of one source often share the system's."""
    return tuple(message for message in messages if message.role != "system")


def user_characters(messages: Sequence[Message]) -> int:
    """Return how many characters the user wrote."""
    return len(as_text(messages, only="user"))


def with_user_text(messages: Sequence[Message], kept: int) -> tuple[Message, ...]:
    """Return the messages with the last `kept` characters that the user wrote: the oldest ones are cut first."""
    left = kept
    cut: list[Message] = []
    for message in reversed(messages):
        content = message.content
        if message.role == "user":
            content = content[max(0, len(content) - left) :]
            left -= len(content)
        cut.append(Message(role=message.role, content=content))
    return tuple(reversed(cut))
