"""How long does the search for near-duplicates take with texts that share most of their lines?

    python benchmarks/speed/near_duplicates.py

Prints processor seconds for doubling numbers of texts of each kind, and how many pairs were compared.
"""

import random
import time
from collections.abc import Callable

from detoxrl.data.duplicates import candidates, near_duplicate_groups, sets_of, shingles

SIZES = (3_000, 6_000, 12_000, 24_000)
_RNG = random.Random(0)
_WORDS = [f"word{number}" for number in range(400)]


def _words(count: int) -> str:
    return " ".join(_RNG.choices(_WORDS, k=count))


_LINES = [_words(9) for _ in range(60)]
_TEXT = _words(90)
KINDS: dict[str, Callable[[], str]] = {
    "words drawn at random": lambda: _words(90),
    "10 lines of the same 60": lambda: "\n".join(_RNG.sample(_LINES, 10)),
    "10 lines of the same 15": lambda: "\n".join(_RNG.sample(_LINES[:15], 10)),
    "one text with another end each time": lambda: f"{_TEXT} {_words(2)}",
}


def main() -> None:
    for kind, make in KINDS.items():
        texts = [make() for _ in range(SIZES[-1])]
        for size in SIZES:
            started = time.process_time()
            groups = near_duplicate_groups(texts[:size])
            seconds = time.process_time() - started
            found = f"{len(set(groups)):,} groups"
            print(f"{kind}: {size:,} texts, {found}, {seconds:.1f} s", flush=True)

        compared = sum(
            len(earlier) for _, earlier in candidates(sets_of([shingles(text) for text in texts[: SIZES[0]]]))
        )
        print(f"{kind}: {compared:,} of {SIZES[0] * (SIZES[0] - 1) // 2:,} pairs could be near", flush=True)


if __name__ == "__main__":
    main()
