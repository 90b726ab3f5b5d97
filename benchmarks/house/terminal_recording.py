"""What does a run look like in a terminal, as an animated picture?

    pip install pyte
    python benchmarks/house/terminal_recording.py docs/terminal.svg .venv/bin/detoxrl run quickstart --overwrite

It runs the command in a pseudo-terminal, reads the screen at a few moments, and writes them as one SVG that shows them
in turn. Where animations are off, the last screen is shown. Nothing on the screen is changed.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import struct
import sys
import termios
import time
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import pyte

COLUMNS = 100
ROWS = 30
FRAMES = 12
SECONDS_PER_FRAME = 1.2
LAST_FRAME_SECONDS = 6.0
CELL_WIDTH = 8.4
CELL_HEIGHT = 18
MARGIN = 14
BACKGROUND = "#16181d"
FOREGROUND = "#d7dae0"
# The terminal's colours by pyte's names; others are hexadecimal already.
COLOURS = {
    "default": FOREGROUND, "black": "#4b5263", "red": "#e06c75", "green": "#98c379", "brown": "#e5c07b",
    "blue": "#61afef", "magenta": "#c678dd", "cyan": "#56b6c2", "white": "#ffffff",
}  # fmt: skip


class Output(NamedTuple):
    """What the command wrote, and when."""

    seconds: float
    text: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="the SVG to write")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command to run")
    arguments = parser.parse_args()

    outputs, code = recorded(arguments.command)
    prompt = f"$ {' '.join([Path(arguments.command[0]).name, *arguments.command[1:]])}\r\n"
    screens = screens_of([Output(0.0, prompt), *outputs])
    arguments.picture.write_text(svg(screens), encoding="utf-8")
    print(f"{arguments.picture}: {len(screens)} screens of {outputs[-1].seconds:.0f} s")
    sys.exit(code)


def recorded(command: list[str]) -> tuple[list[Output], int]:
    """Run a command in a pseudo-terminal; return what it wrote and its exit code."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
        os.execvp(command[0], command)

    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    started = time.perf_counter()
    outputs = []
    while True:
        try:
            written = os.read(terminal, 1 << 16)
        except OSError:  # the command has ended
            break
        if not written:
            break
        outputs.append(Output(time.perf_counter() - started, written.decode("utf-8", "replace")))

    _, status = os.waitpid(child, 0)
    return outputs, os.waitstatus_to_exitcode(status)


def screens_of(outputs: list[Output]) -> list[list[list[tuple[str, str]]]]:
    """Return the screen at equal distances of time and at the end: rows of (text, colour)."""
    screen = pyte.Screen(COLUMNS, ROWS)
    stream = pyte.Stream(screen)
    distance = outputs[-1].seconds / FRAMES
    due = distance
    screens = []
    for output in outputs:
        if output.seconds >= due:
            screens.append(_rows(screen))
            due += distance
        stream.feed(output.text)
    return [*screens[: FRAMES - 1], _rows(screen)]


def _rows(screen: Any) -> list[list[tuple[str, str]]]:
    return [_runs(screen.buffer[row]) for row in range(ROWS)]


def _runs(line: Any) -> list[tuple[str, str]]:
    """Return a line as stretches of one colour each."""
    runs: list[tuple[str, str]] = []
    for column in range(COLUMNS):
        cell = line[column]
        colour = COLOURS.get(cell.fg, f"#{cell.fg}")
        if runs and runs[-1][1] == colour:
            runs[-1] = (runs[-1][0] + cell.data, colour)
        else:
            runs.append((cell.data, colour))
    return runs


def svg(screens: list[list[list[tuple[str, str]]]]) -> str:
    """Return screens as one picture that shows them in turn, the last one longest."""
    width = round(COLUMNS * CELL_WIDTH + 2 * MARGIN)
    height = ROWS * CELL_HEIGHT + 2 * MARGIN
    total = SECONDS_PER_FRAME * (len(screens) - 1) + LAST_FRAME_SECONDS
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="A run in a terminal, from its first stage to the result">',
        "<style>",
        f"text{{font:14px ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace;fill:{FOREGROUND};white-space:pre}}",
    ]
    for number in range(len(screens) - 1):
        parts.append(_animation(number, SECONDS_PER_FRAME * number / total, SECONDS_PER_FRAME / total, total))
    parts.append(_animation(len(screens) - 1, 1 - LAST_FRAME_SECONDS / total, 1.0, total))
    parts.append("</style>")
    parts.append(f'<rect width="{width}" height="{height}" rx="8" fill="{BACKGROUND}"/>')

    for number, rows in enumerate(screens):
        hidden = "" if number == len(screens) - 1 else ' opacity="0"'
        parts.append(f'<g class="f{number}"{hidden}>')
        parts.extend(_line(row, runs) for row, runs in enumerate(rows) if any(text.strip() for text, _ in runs))
        parts.append("</g>")
    parts.append("</svg>\n")
    return "\n".join(parts)


def _animation(number: int, begin: float, length: float, total: float) -> str:
    first = 100 * begin
    last = min(100.0, 100 * (begin + length))
    steps = f"0%,{first:.2f}%{{opacity:0}}{first + 0.01:.2f}%,{last:.2f}%{{opacity:1}}"
    if first == 0:
        steps = f"0%,{last:.2f}%{{opacity:1}}"
    if last < 100:
        steps += f"{last + 0.01:.2f}%,100%{{opacity:0}}"
    return f".f{number}{{animation:k{number} {total:.1f}s infinite step-end}}@keyframes k{number}{{{steps}}}"


def _line(row: int, runs: list[tuple[str, str]]) -> str:
    y = MARGIN + (row + 0.75) * CELL_HEIGHT
    spans = []
    column = 0
    for text, colour in runs:
        if text.strip():
            x = MARGIN + column * CELL_WIDTH
            length = f' textLength="{len(text) * CELL_WIDTH:.1f}"'
            fill = "" if colour == FOREGROUND else f' fill="{colour}"'
            spans.append(f'<tspan x="{x:.1f}"{length}{fill}>{escape(text)}</tspan>')
        column += len(text)
    return f'<text y="{y:.1f}" xml:space="preserve">{"".join(spans)}</text>'


if __name__ == "__main__":
    main()
