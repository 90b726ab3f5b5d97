"""Which texts are the same, or nearly so?"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from detoxrl.data.words import words_of

# Two texts are near-duplicates when the Jaccard similarity of their word trigrams reaches this.
THRESHOLD = 0.7
# So many texts are compared with all earlier ones at once, roughly: with 24,000 texts, that takes about 100 MB.
_TEXTS_AT_ONCE = 256
# So many texts that can be near one are compared with it at once.
_OTHERS_AT_ONCE = 256

Shingle = tuple[str, ...]
Sets = Any
"""Sets as a sparse matrix of scipy (sets, elements), 1 where a set has an element; the rarest elements come first."""


def shingles(text: str) -> frozenset[Shingle]:
    """Return the word trigrams of a text, ignoring case; a text of fewer than three words is one shingle."""
    words = words_of(text) or [text]
    trigrams = frozenset(zip(words, words[1:], words[2:], strict=False))
    return trigrams or frozenset({tuple(words)})


def near_duplicate_groups(texts: Sequence[str]) -> list[int]:
    """Return a group number for each text. Near-duplicates share one, also through a chain of other texts.

    The result is exact. Prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007) only saves comparisons.
    """
    sets = sets_of([shingles(text) for text in texts])
    groups = np.arange(len(texts))
    for i, others in candidates(sets):
        while len(others) > 0:
            first = others[:_OTHERS_AT_ONCE]
            for near in np.unique(groups[first[_are_near(sets, i, first)]]):
                groups[groups == near] = groups[i]

            # Where thousands are near each other, one of them speaks for the others.
            others = others[len(first) :]
            others = others[groups[others] != groups[i]]
    return groups.tolist()


def sets_of(sets: Sequence[frozenset[Shingle]]) -> Sets:
    """Return sets in the form that `candidates` takes."""
    from scipy.sparse import csr_array  # Imported here because few commands compare texts.

    number_of: dict[Shingle, int] = {}
    in_order = [number_of.setdefault(shingle, len(number_of)) for elements in sets for shingle in elements]
    numbers = np.array(in_order, np.int64)
    from_rarest = np.argsort(np.bincount(numbers), kind="stable")
    place_of = np.argsort(from_rarest)

    owners = np.repeat(np.arange(len(sets)), [len(elements) for elements in sets])
    ones = np.ones(len(numbers), np.int32)
    matrix = csr_array((ones, (owners, place_of[numbers])), (len(sets), len(number_of)))
    matrix.sort_indices()
    return matrix


def candidates(sets: Sets) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the numbers of sets, each with those of the earlier ones that can be near it, and of few others.

    Call the rarest 1 - threshold of a set's elements its prefix, with one more. Of two near sets, each has an element
    in the prefix of the other. They have no more in common than their overlap with that prefix, and all that follows
    it: this tells texts apart that are made of the same lines.
    """
    sizes = np.diff(sets.indptr)
    prefix_sizes = (sizes * (1 - THRESHOLD)).astype(np.int64) + 1
    prefixes = _first_elements(sets, prefix_sizes)

    for start in range(0, len(sizes), _TEXTS_AT_ONCE):
        end = start + _TEXTS_AT_ONCE
        overlaps = (sets[start:end] @ prefixes[:end].T).tocoo()
        i = overlaps.row + start
        j = overlaps.col

        behind_prefix = sizes[j] - prefix_sizes[j]
        most_shared = np.minimum(overlaps.data + behind_prefix, sizes[i])
        # What two near sets share is at least threshold / (1 + threshold) of the sum of their sizes.
        least_shared = THRESHOLD / (1 + THRESHOLD) * (sizes[i] + sizes[j])
        can_be_near = (j < i) & (most_shared >= least_shared - 1e-6)

        counts = np.bincount(overlaps.row[can_be_near], minlength=len(sizes[start:end]))
        ends = np.cumsum(counts)
        yield from enumerate(np.split(j[can_be_near], ends[:-1]), start)


def _first_elements(sets: Sets, counts: np.ndarray) -> Sets:
    """Return the sets with their first elements alone, so many of each (sets,)."""
    from scipy.sparse import csr_array

    sizes = np.diff(sets.indptr)
    owners = np.repeat(np.arange(len(sizes)), sizes)
    places = np.arange(len(owners)) - sets.indptr[owners]
    is_first = places < counts[owners]
    return csr_array((sets.data[is_first], (owners[is_first], sets.indices[is_first])), sets.shape)


def _are_near(sets: Sets, i: int, others: np.ndarray) -> np.ndarray:
    """Return which of some other sets are near a set."""
    shared = sets[others] @ sets[[i]].toarray()[0]
    sizes = sets.indptr[others + 1] - sets.indptr[others]
    size = sets.indptr[i + 1] - sets.indptr[i]
    near: np.ndarray = shared >= THRESHOLD * (size + sizes - shared)
    return near
