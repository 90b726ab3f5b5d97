"""How does a row become a prompt?"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from detoxrl.config.schema import Config
from detoxrl.data.conversations import as_text, user_characters, with_user_text
from detoxrl.data.rows import Row
from detoxrl.errors import InputError, first_line, require
from detoxrl.models.chat import Message, render_chat, uses_chat_template


def token_lengths(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], special_tokens: bool = True) -> list[int]:
    """Return the number of tokens of each text, special tokens included unless `special_tokens` is false."""
    if not texts:
        return []
    return [len(ids) for ids in tokenizer(list(texts), add_special_tokens=special_tokens).input_ids]


class PromptWriter:
    """Writes prompts for one tokenizer: the row's text in the template, and that in the chat template if there is one.

    Raises InputError for a chat template that the config asks for and the tokenizer lacks.
    """

    def __init__(self, config: Config, tokenizer: PreTrainedTokenizerBase, model: str | None = None) -> None:
        """Write prompts as `config` says. `model` is what errors call the tokenizer's model; None: the base."""
        self.tokenizer = tokenizer
        self._model = config.policy.base if model is None else model
        self.in_chat = uses_chat_template(config.data, tokenizer)
        self._config = config
        self._task = config.task
        self._limit = config.data.max_prompt_tokens

        has_template = tokenizer.chat_template is not None
        rule = f"needs a chat template, and the tokenizer of {self._model} has none"
        remedy = "leave it out, or name an instruct model"
        require(has_template or not self.in_chat, "data.chat_template", True, rule, remedy)
        system = config.data.system_prompt
        require(self.in_chat or system is None, "data.system_prompt", system, rule, remedy)

    def with_prompts(self, rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
        """Return the rows with prompts of at most `data.max_prompt_tokens`, and their lengths before they were cut.

        Raises InputError when the templates alone, or the messages of others than the user, are longer.
        """
        prompts = [self._prompt(row, self._size(row)) for row in rows]
        lengths = self.token_lengths(prompts)
        for i, length in enumerate(lengths):
            if length > self._limit:
                prompts[i] = self._cut_prompt(rows[i])

        prompted = [replace(row, prompt=prompt) for row, prompt in zip(rows, prompts, strict=True)]
        return prompted, lengths

    def token_lengths(self, prompts: Sequence[str]) -> list[int]:
        """Return the number of tokens that the policy reads of each prompt."""
        # A chat template has written every special token already; a second BOS would follow otherwise.
        return token_lengths(self.tokenizer, prompts, special_tokens=not self.in_chat)

    def as_read(self, prompt: str) -> str:
        """Return a prompt exactly as the model reads it: its tokens as text, special tokens included."""
        ids = self.tokenizer(prompt, add_special_tokens=not self.in_chat).input_ids
        return str(self.tokenizer.decode(ids))

    def _size(self, row: Row) -> int:
        """Return how many characters of a row may be cut."""
        return user_characters(row.messages) if row.messages else len(row.text)

    def _prompt(self, row: Row, kept: int) -> str:
        """Return the prompt of a row with `kept` characters of its text, or of the user's messages."""
        messages = with_user_text(row.messages, kept)
        if messages and self.in_chat:
            return self._render(row, messages)

        text = row.text[len(row.text) - kept :] if self._task.keeps_end else row.text[:kept]
        if messages:
            text = as_text(messages)
        filled = self._config.template.replace(self._task.slot, text)
        if not self.in_chat:
            return filled
        return self._render(row, (Message(role="user", content=filled),))

    def _render(self, row: Row, messages: tuple[Message, ...]) -> str:
        system = self._config.data.system_prompt
        if system is not None and messages[0].role != "system":
            messages = (Message(role="system", content=system), *messages)
        try:
            return render_chat(self.tokenizer, messages)
        except TemplateError as error:
            rule = f"row {row.id} does not fit the chat template of {self._model}: {first_line(error)}"
            remedy = "leave the row out, or correct its messages"
            raise InputError("data.source", self._config.data.source, rule, remedy) from error

    def _cut_prompt(self, row: Row) -> str:
        """Return the prompt with as many characters as fit, cut between words where possible."""

        def tokens(characters: int) -> int:
            (length,) = self.token_lengths([self._prompt(row, characters)])
            return length

        fitting = bisect_right(range(self._size(row)), self._limit, key=tokens) - 1
        if fitting < 0:
            rule = f"is less than the {tokens(0)} tokens of row {row.id} without its {self._task.text}"
            remedy = "raise it, or shorten the template"
            if row.messages:
                rule = f"is less than the {tokens(0)} tokens of row {row.id} without the user's messages"
                remedy = "raise it, or leave long conversations out with data.max_length"
            raise InputError("data.max_prompt_tokens", self._limit, rule, remedy)
        return self._prompt(row, self._whole_words(row, fitting))

    def _whole_words(self, row: Row, kept: int) -> int:
        """Return how many characters are left of `kept` ones without the part of a word at the cut.

        It is all of them if that part is everything that is left.
        """
        text = as_text(row.messages, only="user") if row.messages else row.text
        if self._task.keeps_end:
            # One more character shows whether the first word is complete.
            first_space = re.search(r"\s", text[len(text) - kept - 1 :])
            whole = kept + 1 - first_space.end() if first_space else 0
        else:
            last_space = re.match(r".*(?=\s)", text[: kept + 1], re.DOTALL)
            whole = len(last_space[0]) if last_space else 0

        left = text[len(text) - whole :] if self._task.keeps_end else text[:whole]
        return whole if left.strip() else kept
