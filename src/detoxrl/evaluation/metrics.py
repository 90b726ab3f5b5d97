"""What is measured of a response beside its toxicity?"""

import re
from collections.abc import Sequence

from sacrebleu.metrics.chrf import CHRF

from detoxrl.data.embedded.facts import facts_kept, quarrel_roles
from detoxrl.data.embedded.phrases import SEEN_INSULTS, UNSEEN_INSULTS, insult_pattern
from detoxrl.data.rows import Row


class _Words:
    """Words of any script: the scorer's own tokenizer knows Latin letters alone."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


_CHRF = CHRF()
SEEN, UNSEEN = insult_pattern(SEEN_INSULTS), insult_pattern(UNSEEN_INSULTS)


def rouge_l(reference: str, response: str) -> float:
    """Return ROUGE-L F1 in [0, 1] (Lin 2004), without stemming."""
    from rouge_score.rouge_scorer import RougeScorer  # here, as nltk comes along, most of a second

    return float(RougeScorer(["rougeL"], tokenizer=_Words).score(reference, response)["rougeL"].fmeasure)


def chrf(reference: str, response: str) -> float:
    """Return sacreBLEU's sentence chrF2 in [0, 1]: character 1- to 6-grams, where recall weighs twice (beta 2).

    Popović 2015, section 2. White space is left out, and so are orders for which one of the texts is too short.
    """
    return float(_CHRF.sentence_score(response, [reference]).score) / 100


def copied(dialogue: str, response: str) -> float:
    """Return the share in [0, 1] of the response's word 4-grams, each time they occur, that stand in the dialogue.

    It is 1 - "novel 4-grams" of See et al. 2017, section 7.2. A shorter response is one n-gram; an empty one has 0.
    """
    words = _Words.tokenize(response)
    length = min(4, len(words))
    grams, known = _grams(words, length), set(_grams(_Words.tokenize(dialogue), length))
    return sum(gram in known for gram in grams) / len(grams) if grams else 0.0


def distinct(samples: Sequence[str]) -> dict[str, float]:
    """Return distinct words and word pairs over all of them in the samples of one prompt, in [0, 1], 0 without any.

    Li et al. 2016, section 5, who divide pairs too by the number of words. Fewer and longer samples repeat more, so
    compare only equal numbers of them.
    """
    words = [_Words.tokenize(text) for text in samples]
    grams = {n: [gram for those in words for gram in _grams(those, n)] for n in (1, 2)}
    return {f"distinct_{n}": len(set(those)) / len(those) if those else 0.0 for n, those in grams.items()}


def _grams(words: Sequence[str], length: int) -> list[tuple[str, ...]]:
    return list(zip(*(words[i:] for i in range(length)), strict=False))


def response_metrics(row: Row, response: str) -> dict[str, float]:
    """Return every metric of one response; those that need a reference or facts only where the row has them."""
    metrics = {"length": float(len(response.split())), "empty_rate": float(not response)}
    if row.dialogue:
        metrics["copied"] = copied(row.dialogue, response)
    reference = row.civil_reference or row.summary
    if reference is not None:
        metrics["rouge_l"] = rouge_l(reference, response)
        metrics["chrf"] = chrf(reference, response)
    if row.facts is not None:
        metrics["facts"] = facts_kept(response, row.facts)
        metrics["quarrel_reported"] = float(quarrel_roles(response) is not None)
        metrics["insult_rate"] = float(SEEN.search(response) is not None)
        metrics["insult_rate_unseen"] = float(UNSEEN.search(response) is not None)
    return metrics


def validation_quality(rows: Sequence[Row], responses: Sequence[str]) -> float:
    """Return what checkpoints are held to account by, [0, 1]: mean facts kept, else ROUGE-L, else share with text."""
    metrics = [response_metrics(row, response) for row, response in zip(rows, responses, strict=True)]
    name = next((name for name in ("facts", "rouge_l") if all(name in metric for metric in metrics)), None)
    return sum(metric[name] if name else 1 - metric["empty_rate"] for metric in metrics) / len(metrics)
