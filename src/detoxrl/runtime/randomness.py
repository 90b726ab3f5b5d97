"""Where does every random draw come from?

Each draw is a function of (seed, stream, step, prompt id, sample index), so it depends neither on the batch that a row
is in nor on the number of processes.
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
    """Return a generator that is independent of those with any other arguments.

    Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") encrypts a counter of four words. It
    advances the lowest word itself, so that one starts at 0; the others and the key name the stream.
    """
    key = np.array([seed, digest(stream)], dtype=np.uint64)
    counter = np.array([0, sample, row, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def uniforms(
    seed: int, stream: str, step: int, prompt_ids: Sequence[str], sample: int, length: int
) -> npt.NDArray[np.float64]:
    """Return uniforms in [0, 1), shape (B, length); row i depends on prompt_ids[i] and not on the other ids."""
    rows = [_generator(seed, stream, step, digest(prompt_id), sample).random(length) for prompt_id in prompt_ids]
    return np.stack(rows)


@lru_cache(maxsize=8)  # every step of one pass over the data asks for the same shuffle
def permutation(seed: int, stream: str, step: int, length: int) -> tuple[int, ...]:
    """Return a shuffle of range(length)."""
    return tuple(_generator(seed, stream, step, 0, 0).permutation(length).tolist())


def batch_indices(seed: int, stream: str, step: int, batch_size: int, length: int) -> list[int]:
    """Return the rows of batch `step` when `length` rows are read in order and shuffled anew for every pass."""
    rows = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        data_pass, offset = divmod(position, length)
        rows.append(permutation(seed, stream, data_pass, length)[offset])
    return rows


def weighted_indices(seed: int, stream: str, step: int, weights: npt.NDArray[np.float64], number: int) -> list[int]:
    """Return `number` different rows, drawn one after the other with probabilities proportional to positive weights.

    Efraimidis and Spirakis 2006, "Weighted random sampling with a reservoir": the rows with the largest u^(1/weight).
    """
    times = -np.log1p(-_generator(seed, stream, step, 0, 0).random(len(weights))) / weights
    return sorted(np.argsort(times, kind="stable")[:number].tolist())


def torch_seed(seed: int, stream: str) -> int:
    """Return a seed for torch's own generator, which draws initial weights and dropout masks; below 2^63."""
    return digest(f"{seed} {stream}") >> 1
