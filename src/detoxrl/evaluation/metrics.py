"""What is measured of a response beside its toxicity?"""

from collections.abc import Sequence

import numpy as np

from detoxrl.config.tasks import TASKS
from detoxrl.data.embedded.facts import facts_kept, quarrel_roles
from detoxrl.data.embedded.phrases import SEEN_INSULTS, UNSEEN_INSULTS, insult_pattern
from detoxrl.data.rows import Row, quality_references
from detoxrl.data.words import words_of
from detoxrl.evaluation.refusals import is_refusal
from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.overlap import chrf, copied, word_grams
from detoxrl.runtime.run_folder import SHARE_WITH_TEXT

SEEN = insult_pattern(SEEN_INSULTS)
UNSEEN = insult_pattern(UNSEEN_INSULTS)


class _Words:
    """A tokenizer of rouge-score, whose own knows Latin letters alone."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return words_of(text)


def rouge_l(reference: str, response: str) -> float:
    """Return ROUGE-L F1 in [0, 1] (Lin 2004), without stemming."""
    # rouge-score imports nltk, which takes most of a second.
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words)
    return float(scorer.score(reference, response)["rougeL"].fmeasure)


def distinct(samples: Sequence[str]) -> dict[str, float]:
    """Return `distinct_1`, `distinct_2` and `distinct_3`: distinct word n-grams over all in a prompt's samples.

    Li et al. 2016, section 5, except that they divide the n-grams by the number of words. All are in [0, 1], and 0
    without any. They fall with the number of samples and their length, so compare only equal numbers of samples.
    """
    tokenized = [words_of(text) for text in samples]
    shares = {}
    for length in (1, 2, 3):
        grams = [gram for words in tokenized for gram in word_grams(words, length)]
        shares[f"distinct_{length}"] = len(set(grams)) / len(grams) if grams else 0.0
    return shares


def joint(civil: Floats, similar: Floats, fluent: Floats) -> Floats:
    """Return STA x SIM x FL of each response, in [0, 1] and of their shape; its mean is J (Krishna et al. 2020, 3).

    P(civil) and P(fluent) become 0 or 1 at 0.5, as there and in ParaDetox's code (Logacheva et al. 2022). At 0.5
    itself a response counts as toxic, as everywhere in detoxrl, but as fluent.
    """
    return np.asarray((civil > 0.5) * similar * (fluent >= 0.5))


def response_metrics(row: Row, response: str) -> dict[str, float]:
    """Return all metrics of one response by name; a metric that needs a reference or facts requires a row with them.

    Of several references the one that a response resembles most counts.
    """
    metrics = {
        "length": float(len(response.split())),
        "empty_rate": float(not response),
        "refusal_rate": float(is_refusal(response)),
    }
    if row.text:
        metrics["copied"] = copied(row.text, response)

    references = quality_references(row)
    if references:
        metrics["rouge_l"] = max(rouge_l(reference, response) for reference in references)
        metrics["chrf"] = max(chrf(reference, response) for reference in references)

    if row.facts is not None:
        metrics["facts"] = facts_kept(response, row.facts)
        metrics["quarrel_reported"] = float(quarrel_roles(response) is not None)
    if row.topic is not None:
        metrics["insult_rate"] = float(SEEN.search(response) is not None)
        metrics["insult_rate_unseen"] = float(UNSEEN.search(response) is not None)
    return metrics


def quality_measure(rows: Sequence[Row]) -> str:
    """Return the name of the measure by which checkpoints are compared: `facts`, `rouge_l` or a stand-in.

    It is the first one that all rows allow. Where many responses are right, it is `corpus_distinct_2`, the distinct
    word pairs of all responses together: what such training loses first is variety. For a source without a target it
    is `source_chrf`, the chrF of the response to its source. Elsewhere it is SHARE_WITH_TEXT, which is no measure of
    quality: it only keeps training from selecting a policy that says nothing.
    """
    if all(row.facts is not None for row in rows):
        return "facts"
    if all(quality_references(row) for row in rows):
        return "rouge_l"
    if all(row.task == "rewrite" for row in rows):
        return "source_chrf"
    return "corpus_distinct_2" if all(TASKS[row.task].open_ended for row in rows) else SHARE_WITH_TEXT


def validation_quality(rows: Sequence[Row], responses: Sequence[str]) -> float:
    """Return the rows' `quality_measure` of one response per row, in [0, 1]."""
    measure = quality_measure(rows)
    if measure == "corpus_distinct_2":
        return distinct(responses)["distinct_2"]
    if measure == "source_chrf":
        return sum(map(chrf, [row.text for row in rows], responses)) / len(rows)

    metrics = [response_metrics(row, response) for row, response in zip(rows, responses, strict=True)]
    if measure == SHARE_WITH_TEXT:
        return sum(1 - values["empty_rate"] for values in metrics) / len(metrics)
    return sum(values[measure] for values in metrics) / len(metrics)
