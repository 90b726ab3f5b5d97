"""Which texts are the same, or nearly so?"""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence

# Two texts are near when the sets of their word trigrams overlap by this much (Jaccard).
THRESHOLD = 0.7
# A run of letters and digits; in scripts without spaces, each character.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")


def shingles(text: str) -> frozenset[tuple[str, ...]]:
    """Return the word trigrams of a text, case aside; a shorter text is one shingle."""
    words = _WORD.findall(text.casefold()) or [text]
    return frozenset(zip(words, words[1:], words[2:], strict=False)) or frozenset({tuple(words)})


def near_duplicate_groups(texts: Sequence[str]) -> list[int]:
    """Return a group for each text, a number; texts near to each other, directly or through others, share one.

    Exact, by prefix filtering (Chaudhuri et al. 2006; Bayardo et al. 2007): two sets that overlap by the threshold
    share one of the rarest few elements of each, so only texts that do are compared.
    """
    from scipy.cluster.hierarchy import DisjointSet  # here, as few commands compare texts

    sets = [shingles(text) for text in texts]
    counts = Counter(shingle for one in sets for shingle in one)
    groups = DisjointSet(range(len(texts)))
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in sorted(range(len(texts)), key=lambda i: len(sets[i])):
        rarest = sorted(sets[i], key=lambda shingle: (counts[shingle], shingle))
        prefix = rarest[: int(len(rarest) * (1 - THRESHOLD)) + 1]
        for j in {j for shingle in prefix for j in holders[shingle]}:
            if not groups.connected(i, j) and len(sets[i] & sets[j]) >= THRESHOLD * len(sets[i] | sets[j]):
                groups.merge(i, j)
        for shingle in prefix:
            holders[shingle].append(i)
    return [groups[i] for i in range(len(texts))]
