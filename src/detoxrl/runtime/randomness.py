"""Where does every random draw come from?

Each draw is a function of (seed, stream, step, prompt id, sample index), not of a row's batch or the processes' number.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt


def digest(text: str) -> int:
    """Return 64 bits that identify `text`, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _generator(seed: int, stream: str, step: int, row: int, sample: int) -> np.random.Generator:
    # The lowest counter word is Philox's own position in the stream; the upper three say whose stream it is.
    key = np.array([seed, digest(stream)], dtype=np.uint64)
    counter = np.array([0, sample, row, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniforms(
    seed: int, stream: str, step: int, prompt_ids: Sequence[str], sample: int, length: int
) -> npt.NDArray[np.float64]:
    """Return uniforms in [0, 1), shape (B, length): row i belongs to (prompt_ids[i], sample) alone."""
    return np.stack([_generator(seed, stream, step, digest(row), sample).random(length) for row in prompt_ids])


@lru_cache(maxsize=8)  # a pass over the data asks for the same shuffle at every step
def permutation(seed: int, stream: str, step: int, length: int) -> tuple[int, ...]:
    """Return a shuffle of range(length)."""
    return tuple(_generator(seed, stream, step, 0, 0).permutation(length).tolist())


def batch_indices(seed: int, stream: str, step: int, batch_size: int, length: int) -> list[int]:
    """Return the rows of batch `step` when `length` rows are shuffled anew for every pass and read in order."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    return [permutation(seed, stream, i // length, length)[i % length] for i in positions]


def torch_seed(seed: int, stream: str) -> int:
    """Return a seed for torch's own generator: weight initialisation only."""
    return digest(f"{seed} {stream}") >> 1
