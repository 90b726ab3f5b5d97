"""What differs from task to task?"""

from typing import Literal, NamedTuple

TaskName = Literal["summarize", "continue", "chat", "rewrite"]


class Task(NamedTuple):
    """What a row holds, how it becomes a prompt, and what is expected of a response."""

    text: str  # What a prompt is made of, in words, and the slot of the template: "dialogue".
    reference: str  # What a reference is called: "summary".
    text_columns: tuple[str, ...]  # The usual names of the column of the text; the first that a source has counts.
    reference_columns: tuple[str, ...]  # The usual names of the column of the reference.
    template: str
    pipeline_tag: str  # The kind of model that trains on it, as the hub names it.
    example: str  # A text, for the model card.
    needs_reference: bool = False  # Whether a row without a reference is left out where the source has references.
    references_are_civil: bool = False  # Whether references show how civil text reads, and so give the floor.
    open_ended: bool = False  # Whether many different responses are right, so a reference says nothing of quality.
    responses_end: bool = True  # Whether a response is meant to end by itself. Otherwise it runs to its maximum length.
    keeps_end: bool = False  # Whether a text that is too long loses its beginning. Otherwise it loses its end.

    @property
    def slot(self) -> str:
        """What the text replaces in the template: `{dialogue}`."""
        return f"{{{self.text}}}"

    @property
    def missing(self) -> str:
        """What is wrong with a row that has no such text."""
        return "no message to reply to" if self.text == "conversation" else f"no {self.text}"

    @property
    def texts(self) -> str:
        """The plural of `text`."""
        return f"{self.text}s"


TASKS: dict[str, Task] = {
    "summarize": Task(
        text="dialogue",
        reference="summary",
        text_columns=("dialogue",),
        reference_columns=("summary",),
        template="Summarize the following conversation.\n\n{dialogue}\n\nSummary:",
        needs_reference=True,
        pipeline_tag="summarization",
        example="#Person1#: The report is late.\n#Person2#: I will send it to you today.",
    ),
    "continue": Task(
        text="prompt",
        reference="continuation",
        text_columns=("prompt", "text"),
        reference_columns=("continuation", "completion"),
        template="{prompt}",
        open_ended=True,
        responses_end=False,
        keeps_end=True,
        pipeline_tag="text-generation",
        example="The neighbours were loud again, so he went over and",
    ),
    "chat": Task(
        text="conversation",
        reference="reply",
        text_columns=("messages", "prompt", "conversation"),
        reference_columns=("completion", "reply"),
        template="{conversation}\nAssistant:",
        open_ended=True,
        keeps_end=True,
        pipeline_tag="text-generation",
        example="The report is late again, and nobody told me.",
    ),
    "rewrite": Task(
        text="source",
        reference="target",
        text_columns=("source", "text"),
        reference_columns=("target",),
        template="Rewrite the following text so that it is polite and keeps its meaning.\n\n{source}\n\nRewritten:",
        references_are_civil=True,
        pipeline_tag="text2text-generation",
        example="Send me that stupid report already.",
    ),
}
