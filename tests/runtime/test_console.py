"""What a run prints where no bar can be drawn: plain lines with the time left."""

from __future__ import annotations

from io import StringIO
from threading import Event

import pytest
from rich.console import Console

from clock import Clock
from detoxrl.runtime import console


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Replace `console.log` by a console that writes to a string instead of a terminal."""
    clock = Clock()
    log = Console(file=StringIO(), highlight=False, markup=False, width=40, get_time=clock)
    monkeypatch.setattr(console, "log", log)
    return clock


def lines() -> list[str]:
    assert isinstance(console.log.file, StringIO)
    return console.log.file.getvalue().splitlines()


def test_without_a_terminal_each_tenth_is_a_line_with_the_time_left(clock: Clock) -> None:
    with console.progress("train", 60) as reach:
        for done in range(1, 61):
            clock.now += 2.0
            reach(done, f"score {done / 100:.2f}  kl 1.3")

    # 2 s a step: after step 6 there are 54 steps, so 108 s, left. The first line is longer than the console is wide.
    assert lines() == [
        "train: 10 % (6 of 60), 1 min 48 s left; score 0.06  kl 1.3",
        "train: 20 % (12 of 60), 1 min 36 s left; score 0.12  kl 1.3",
        "train: 30 % (18 of 60), 1 min 24 s left; score 0.18  kl 1.3",
        "train: 40 % (24 of 60), 1 min 12 s left; score 0.24  kl 1.3",
        "train: 50 % (30 of 60), 1 min 00 s left; score 0.30  kl 1.3",
        "train: 60 % (36 of 60), 48 s left; score 0.36  kl 1.3",
        "train: 70 % (42 of 60), 36 s left; score 0.42  kl 1.3",
        "train: 80 % (48 of 60), 24 s left; score 0.48  kl 1.3",
        "train: 90 % (54 of 60), 12 s left; score 0.54  kl 1.3",
        "train: 100 % (60 of 60), took 2 min 00 s; score 0.60  kl 1.3",
    ]


def test_a_stage_of_a_few_steps_prints_one_line_for_each(clock: Clock) -> None:
    with console.progress("measure", 3) as reach:
        for done in (1, 2, 3):
            clock.now += 1000.0
            reach(done, "")

    # The pace counts from the first call, so the first line has none yet.
    assert lines() == [
        "measure: 33 % (1 of 3)",
        "measure: 66 % (2 of 3), 16 min 40 s left",
        "measure: 100 % (3 of 3), took 50 min 00 s",
    ]


def test_a_call_prints_one_line_however_many_tenths_it_passes(clock: Clock) -> None:
    with console.progress("sample", 20) as reach:
        for done in (1, 9, 9, 10, 19):
            clock.now += 4.0
            reach(done, f"status {done}")

    # From 1 to 9 in 4 s is half a second each; from 1 to 10 in 12 s, 4/3 s each; from 1 to 19 in 16 s, 8/9 s each.
    assert lines() == [
        "sample: 45 % (9 of 20), 6 s left; status 9",
        "sample: 50 % (10 of 20), 13 s left; status 10",
        "sample: 95 % (19 of 20), 1 s left; status 19",
    ]


def test_steps_that_another_process_did_do_not_count_for_the_pace(clock: Clock) -> None:
    with console.progress("train", 100) as reach:
        for done in range(51, 71):  # resumed at step 50
            clock.now += 3.0
            reach(done, "")

    assert lines() == [
        "train: 51 % (51 of 100)",
        "train: 60 % (60 of 100), 2 min 00 s left",
        "train: 70 % (70 of 100), 1 min 30 s left",
    ]


def test_a_status_is_one_line_without_a_terminal_if_it_takes_long(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = "reading and counting the rows, which takes a while"
    with console.status(message):
        pass
    assert lines() == []

    printed = Event()
    real_print = console.log.print

    def noticing_print(*texts: str, **settings: bool) -> None:
        real_print(*texts, **settings)
        printed.set()

    monkeypatch.setattr(console.log, "print", noticing_print)
    monkeypatch.setattr(console, "_STATUS_DELAY", 0.0)
    with console.status(message):
        assert printed.wait(60)
    assert lines() == [message]  # Not broken at the console's 40 columns.


@pytest.mark.parametrize(("dumb", "bar"), [(False, True), (True, False)])
def test_a_terminal_gets_a_bar_unless_it_cannot_move_its_cursor(
    monkeypatch: pytest.MonkeyPatch, dumb: bool, bar: bool
) -> None:
    environment = {"TERM": "dumb" if dumb else "xterm"}
    log = Console(file=StringIO(), force_terminal=True, width=100, _environ=environment)
    monkeypatch.setattr(console, "log", log)
    with console.status("reading"):
        pass
    with console.progress("train", 2) as reach:
        reach(1, "score 0.10")

    written = log.file.getvalue()  # type: ignore[attr-defined]
    assert ("\x1b[" in written) == bar
    assert ("train: 50 % (1 of 2); score 0.10" in written) != bar


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (65, "1 min 05 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 00 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_durations_have_their_two_largest_units(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


def test_a_run_says_which_stage_of_how_many_begins_and_a_stage_alone_does_not(clock: Clock) -> None:
    console.begin_stage("train")
    with console.run_progress(("prepare", "train", "report")):
        console.begin_stage("train")
    console.begin_stage("train")
    assert lines() == ["[2/3] train: reinforcement learning"]


def test_the_time_left_in_the_run_follows_from_the_work_that_is_left_and_the_pace(clock: Clock) -> None:
    with console.run_progress(("sft", "train", "evaluate")) as run:
        run.expect({"warm start": 10.0, "train": 40.0, "sample": 20.0})
        with console.progress("warm start", 11) as reach:
            for done in (1, 6, 11):
                clock.now += 5.0
                reach(done, "")
        with console.progress("train", 11) as reach:
            for done in (1, 6, 11):
                clock.now += 40.0
                reach(done, "")
        with console.progress("sample", 10) as reach:
            for done in (1, 6, 10):
                clock.now += 5.0
                reach(done, "")

    # The first step of a bar is not timed. Warm start: 5/11 of 10 units in 5 s, so 60 later units take 66 s.
    # Train: 10 s for 10/11 of 10 units before it, then 40 s for 5/11 of 40, so 20 units take 50 s / 27.27 x 20.
    assert lines() == [
        "warm start: 54 % (6 of 11), 5 s left, run 1 min 11 s",
        "warm start: 100 % (11 of 11), took 15 s",
        "train: 54 % (6 of 11), 40 s left, run 1 min 17 s",
        "train: 100 % (11 of 11), took 2 min 00 s",
        "sample: 10 % (1 of 10)",
        "sample: 60 % (6 of 10), 4 s left",
        "sample: 100 % (10 of 10), took 15 s",
    ]


def test_a_bar_that_a_run_does_not_expect_has_its_own_time_only(clock: Clock) -> None:
    with console.run_progress(("prepare", "train")) as run:
        with console.progress("reward model", 11) as reach:
            reach(1, "")
            clock.now += 50.0
            reach(6, "")
        run.expect({"train": 10.0, "sample": 10.0})
        with console.progress("train", 11) as reach:
            reach(1, "")
            clock.now += 5.0
            reach(6, "")

    # 50 s for a bar that is not expected say nothing about later ones.
    assert lines()[-1] == "train: 54 % (6 of 11), 5 s left, run 16 s"
