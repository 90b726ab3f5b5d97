"""Which errors are the user's to fix, and how are they worded?"""


class DetoxrlError(Exception):
    """Base of every error detoxrl raises on purpose."""


class InputError(DetoxrlError):
    """Bad input: one line naming the field, its value, the rule and the remedy. The command line exits with 2."""

    def __init__(self, field: str, value: object, rule: str, remedy: str) -> None:
        super().__init__(" ".join(f"{field} = {value!r}: {rule}; {remedy}".split()))


class StorageError(DetoxrlError):
    """A file of a run that cannot be read or written. The command line exits with 1."""


class TrainingError(DetoxrlError):
    """A run that cannot go on (a NaN, say). The command line exits with 1."""


class ProcessError(DetoxrlError):
    """A process of a run over several that is gone. The command line exits with 1."""


def require(condition: bool, field: str, value: object, rule: str, remedy: str) -> None:
    """Raise InputError unless `condition` holds."""
    if not condition:
        raise InputError(field, value, rule, remedy)


def first_line(error: BaseException) -> str:
    """Return the first line of another library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
