"""A clock for tests of what depends on the time."""


class Clock:
    """A clock that the test moves by hand, in seconds."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
