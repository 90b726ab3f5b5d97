"""How does a chat template mark what is said by whom?"""

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

_ANSWER = "the-answer-of-the-assistant"


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
