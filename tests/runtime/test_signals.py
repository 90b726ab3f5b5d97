"""A stop waits for the end of the step, a launcher's echo of it changes nothing, and a second one stops at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clock import Clock
from detoxrl.runtime import signals
from detoxrl.runtime.signals import Terminated, resume_hint, stop_signals

MESSAGE = "stopping after this step (Ctrl-C again: stop now and lose this step)"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(signals.time, "monotonic", clock)
    return clock


def receive(*arrivals: tuple[float, signal.Signals], clock: Clock) -> list[str]:
    """Receive signals at these seconds inside a block that waits; return what was announced and reached."""
    start = clock.now
    events: list[str] = []
    try:
        with stop_signals(events.append) as requested:
            assert requested() is None
            for seconds, number in arrivals:
                clock.now = start + seconds
                signal.raise_signal(number)
                events.append(f"went on after {seconds} s")
    except KeyboardInterrupt as stop:
        events.append(type(stop).__name__)
    return events


@pytest.mark.parametrize(("number", "raised"), [(signal.SIGINT, "KeyboardInterrupt"), (signal.SIGTERM, "Terminated")])
def test_a_stop_that_no_step_raised_is_raised_at_the_end_of_the_block(
    clock: Clock, number: signal.Signals, raised: str
) -> None:
    assert receive((0.0, number), clock=clock) == [MESSAGE, "went on after 0.0 s", raised]


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_within_two_seconds_is_the_same_request(clock: Clock, second: signal.Signals) -> None:
    events = receive((0.0, signal.SIGINT), (0.01, second), (1.9, second), clock=clock)
    steps = [f"went on after {seconds} s" for seconds in (0.0, 0.01, 1.9)]
    assert events == [MESSAGE, *steps, "KeyboardInterrupt"]  # what the first asked for


def test_a_later_signal_stops_at_once(clock: Clock) -> None:
    events = receive((0.0, signal.SIGINT), (2.0, signal.SIGTERM), clock=clock)
    assert events == [MESSAGE, "went on after 0.0 s", "Terminated"]


def test_the_two_seconds_count_from_the_first_signal(clock: Clock) -> None:
    events = receive((0.0, signal.SIGTERM), (1.5, signal.SIGTERM), (3.0, signal.SIGINT), clock=clock)
    assert events == [MESSAGE, "went on after 0.0 s", "went on after 1.5 s", "KeyboardInterrupt"]


def test_without_an_announcement_the_first_signal_raises_at_once() -> None:
    reached: list[str] = []

    def work() -> None:
        with stop_signals():
            signal.raise_signal(signal.SIGTERM)
            reached.append("too far")

    with pytest.raises(Terminated):
        work()
    assert reached == []


@contextmanager
def signal_on_the_way_out(clock: Clock, seconds: float) -> Iterator[None]:
    """Receive a SIGTERM so many seconds later when the block raises."""
    try:
        yield
    finally:
        clock.now += seconds
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize(("seconds", "raised"), [(1.0, KeyboardInterrupt), (2.5, Terminated)])
def test_the_rest_of_a_request_is_ignored_in_the_enclosing_block_too(
    clock: Clock, seconds: float, raised: type[KeyboardInterrupt]
) -> None:
    def work() -> None:
        with stop_signals(), signal_on_the_way_out(clock, seconds), stop_signals(print) as requested:
            signal.raise_signal(signal.SIGINT)
            error = requested()
            assert error is KeyboardInterrupt
            raise error

    with pytest.raises(KeyboardInterrupt) as stop:
        work()
    assert stop.type is raised


def test_the_handlers_of_before_come_back() -> None:
    earlier = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with stop_signals(print):
        assert signal.getsignal(signal.SIGINT) is not earlier[0]
        assert signal.getsignal(signal.SIGTERM) is not earlier[1]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == earlier


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    earlier = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts its background jobs
    try:
        with stop_signals(print) as requested:
            signal.raise_signal(signal.SIGINT)
            assert requested() is None
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, earlier)


def test_another_thread_leaves_the_signals_as_they_are() -> None:
    requests: list[object] = []

    def work() -> None:
        with stop_signals(print) as requested:
            requests.append(requested())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert requests == [None]


def test_the_hint_can_be_pasted_into_a_shell() -> None:
    assert resume_hint(Path("runs/own")) == "resume with `detoxrl run --resume --run-dir runs/own`"
    assert resume_hint(Path("my run"), "sweep") == "resume with `detoxrl sweep --resume --run-dir 'my run'`"
