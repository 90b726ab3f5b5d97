"""Which errors does detoxrl raise on purpose, and how are they worded?"""

# Characters of another library's message that an error repeats.
_LONGEST = 300


class DetoxrlError(Exception):
    """Base of every error that detoxrl raises on purpose."""


class InputError(DetoxrlError):
    """Bad input, in one line: `field = value: rule; remedy`. The command line exits with 2."""

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        message = " ".join(f"{field} = {value!r}: {rule}; {remedy}".split())
        super().__init__("".join(map(_printable, message)))


def _printable(character: str) -> str:
    """Return a character, written out if it is a control character: a column name may hold one, to harm a terminal."""
    return character if character.isprintable() else character.encode("unicode_escape").decode()


class StorageError(DetoxrlError):
    """A file of a run cannot be read or written. The command line exits with 1."""


class TrainingError(DetoxrlError):
    """A run cannot continue, for example because a loss is NaN. The command line exits with 1."""


class ProcessError(DetoxrlError):
    """One of several processes of a run has ended unexpectedly. The command line exits with 1."""


def require(condition: bool, field: str, value: object, rule: str, remedy: str) -> None:
    """Raise InputError unless `condition` holds."""
    if not condition:
        raise InputError(field, value, rule, remedy)


def one_line(error: BaseException) -> str:
    """Return the start of the message of another library's error in one line, or the error's type without one."""
    message = " ".join(str(error).split()) or type(error).__name__
    return message if len(message) <= _LONGEST else f"{message[:_LONGEST]} ..."


def first_line(error: BaseException) -> str:
    """Return the first line of the message of another library's error, or the error's type if it has no message."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]
