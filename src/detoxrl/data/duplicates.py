"""Which texts are the same, or nearly so?"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

# Two texts are near-duplicates when the Jaccard similarity of their word trigrams reaches this.
THRESHOLD = 0.7
# A run of letters and digits; in Chinese and Japanese, which have no spaces, a single character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")

Shingle = tuple[str, ...]


def shingles(text: str) -> frozenset[Shingle]:
    """Return the word trigrams of a text, ignoring case; a text of fewer than three words is one shingle."""
    words = _WORD.findall(text.casefold()) or [text]
    trigrams = frozenset(zip(words, words[1:], words[2:], strict=False))
    return trigrams or frozenset({tuple(words)})


def near_duplicate_groups(texts: Sequence[str]) -> list[int]:
    """Return a group number for each text. Near-duplicates share one, also through a chain of other texts.

    The result is exact. Prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007) only saves comparisons.
    """
    from scipy.cluster.hierarchy import DisjointSet  # Imported here because few commands compare texts.

    sets = [shingles(text) for text in texts]
    groups = DisjointSet(range(len(texts)))
    for i, j in _candidate_pairs(sets):
        if not groups.connected(i, j):
            shared = len(sets[i] & sets[j])
            union = len(sets[i]) + len(sets[j]) - shared
            if shared >= THRESHOLD * union:
                groups.merge(i, j)
    return [groups[i] for i in range(len(texts))]


def _candidate_pairs(sets: Sequence[frozenset[Shingle]]) -> Iterator[tuple[int, int]]:
    """Yield every pair that can reach the threshold.

    Sort the elements of each set from the rarest to the most frequent, and call the first 1 - threshold of them its
    prefix, with one more. Two sets whose prefixes have no element in common overlap by less than the threshold.
    """
    counts: Counter[Shingle] = Counter()
    for elements in sets:
        counts.update(elements)

    seen_in: dict[Shingle, list[int]] = defaultdict(list)
    for i in sorted(range(len(sets)), key=lambda i: len(sets[i])):
        rarest = sorted(sets[i], key=lambda shingle: (counts[shingle], shingle))
        prefix = rarest[: int(len(rarest) * (1 - THRESHOLD)) + 1]

        earlier: set[int] = set()
        for shingle in prefix:
            earlier.update(seen_in[shingle])
            seen_in[shingle].append(i)
        for j in earlier:
            yield i, j
