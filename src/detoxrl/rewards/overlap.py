"""How much do two texts have in common, and how much does a text repeat itself?"""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from sacrebleu.metrics.chrf import CHRF

from detoxrl.data.words import words_of
from detoxrl.models.sentences import Encode, Vectors

_Gram = tuple[str, ...]


_CHRF = CHRF()


def chrf(reference: str, response: str) -> float:
    """Return chrF2 in [0, 1]: F-score of character 1- to 6-grams in which recall weighs twice as much (beta = 2).

    Popović 2015, section 2, as sacreBLEU's sentence score. White space is ignored, and so are the orders for which one
    of the texts is too short.
    """
    return float(_CHRF.sentence_score(response, [reference]).score) / 100


def copied(text: str, response: str) -> float:
    """Return the share in [0, 1] of the response's word 4-grams that also occur in the row's text.

    It is 1 - the share of novel 4-grams (See et al. 2017, section 7.2); a 4-gram counts each time it occurs. A response
    of fewer than four words is one n-gram; an empty one has 0.
    """
    grams = _four_grams(response)
    if not grams:
        return 0.0

    text_grams = set(word_grams(words_of(text), len(grams[0])))
    return sum(gram in text_grams for gram in grams) / len(grams)


def sameness(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return for each response which share of it the response to another prompt has too, on average, in [0, 1].

    It is the mean of `copied(other, response)` over the responses to other prompts: 1 if all say the same, 1 / k if k
    sentences take turns, whatever the number of responses. Without another prompt it is 0. Self-BLEU (Zhu et al. 2018)
    compares each text with all others too, by BLEU.
    """
    grams = [_four_grams(response) for response in responses]
    by_prompt = Counter(prompts)

    # In how many responses an n-gram occurs, and in how many to the same prompt.
    in_all: Counter[_Gram] = Counter()
    in_own: Counter[tuple[str, _Gram]] = Counter()
    for prompt, found in zip(prompts, _comparable_grams(responses, grams), strict=True):
        in_all.update(found)
        in_own.update((prompt, gram) for gram in found)

    values = []
    for prompt, of_response in zip(prompts, grams, strict=True):
        others = len(prompts) - by_prompt[prompt]
        elsewhere = sum(in_all[gram] - in_own[prompt, gram] for gram in of_response)
        pairs = others * len(of_response)
        values.append(elsewhere / pairs if pairs else 0.0)
    return values


def linear_sameness(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return values with the mean of `sameness`, and with the spread over prompts that this mean has.

    A response is compared with all others, so its own sameness varies less than the mean depends on it. The value is
    its sameness, plus what it adds to that of the others, minus the mean: the linear term of a U-statistic (Hoeffding
    1948, section 5), by which intervals over prompts are right.
    """
    grams = [_four_grams(response) for response in responses]
    by_prompt = Counter(prompts)

    # What it costs the responses that have an n-gram if another one has it too.
    cost: defaultdict[_Gram, float] = defaultdict(float)
    own_cost: defaultdict[tuple[str, _Gram], float] = defaultdict(float)
    for prompt, of_response in zip(prompts, grams, strict=True):
        pairs = (len(prompts) - by_prompt[prompt]) * len(of_response)
        for gram in of_response if pairs else ():
            cost[gram] += 1 / pairs
            own_cost[prompt, gram] += 1 / pairs

    values = sameness(prompts, responses)
    mean = sum(values) / max(len(values), 1)
    linear = []
    for prompt, value, found in zip(prompts, values, _comparable_grams(responses, grams), strict=True):
        added = sum(cost[gram] - own_cost[prompt, gram] for gram in found if gram in cost)
        linear.append(value + added - mean)
    return linear


def _comparable_grams(responses: Sequence[str], grams: Sequence[Sequence[_Gram]]) -> list[list[_Gram]]:
    """Return the distinct n-grams of each response, of all lengths that occur in `grams`, in a fixed order."""
    lengths = sorted({len(of_response[0]) for of_response in grams if of_response})
    comparable = []
    for response in responses:
        words = words_of(response)
        comparable.append(list(dict.fromkeys(gram for length in lengths for gram in word_grams(words, length))))
    return comparable


def _four_grams(text: str) -> list[_Gram]:
    """Return the word 4-grams of a text: one n-gram for fewer than four words, none for an empty text."""
    words = words_of(text)
    if not words:
        return []
    return word_grams(words, min(4, len(words)))


def repeated(text: str) -> float:
    """Return the share in [0, 1] of the text's word 3-grams that occurred earlier in it; 0 below four words.

    1 - distinct-3 of the text alone (Li et al. 2016, section 5, over n-grams instead of words).
    """
    grams = word_grams(words_of(text), 3)
    if len(grams) < 2:
        return 0.0
    return 1 - len(set(grams)) / len(grams)


def word_grams(words: Sequence[str], length: int) -> list[_Gram]:
    """Return all n-grams of `length` words, in order."""
    return [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]


def similarity(encode: Encode | None, texts: Sequence[str], others: Sequence[str]) -> Vectors:
    """Return the similarity in [0, 1] of each text to its other text, (N,).

    It is the cosine of their vectors, clipped at 0; without an encoder it is chrF of the text against the other.
    """
    if encode is None:
        scores = [chrf(other, text) for text, other in zip(texts, others, strict=True)]
        return np.array(scores, dtype=np.float64)

    vectors = encode([*texts, *others])
    pairs = zip(vectors[: len(texts)], vectors[len(texts) :], strict=True)
    cosines = [vector @ other for vector, other in pairs]
    return np.array(cosines).clip(0.0, 1.0)
