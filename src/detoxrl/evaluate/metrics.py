"""What is measured of a response beside its toxicity?"""

from __future__ import annotations

from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

from detoxrl.data.corpus import Row
from detoxrl.data.facts import facts_kept, quarrel_roles
from detoxrl.data.insults import SEEN_INSULTS, UNSEEN_INSULTS, insult_pattern

_ROUGE = RougeScorer(["rougeL"], use_stemmer=False)
_SEEN, _UNSEEN = insult_pattern(SEEN_INSULTS), insult_pattern(UNSEEN_INSULTS)


def rouge_l(reference: str, response: str) -> float:
    """Return ROUGE-L F1 in [0, 1] (Lin 2004), without stemming."""
    return float(_ROUGE.score(reference, response)["rougeL"].fmeasure)


def response_metrics(row: Row, response: str) -> dict[str, float]:
    """Return every metric of one response; those that need facts are there only where the row knows its facts."""
    metrics = {
        "rouge_l": rouge_l(row.civil_reference or row.summary, response),
        "length": float(len(response.split())),
        "empty_rate": float(not response),
        "insult_rate": float(_SEEN.search(response) is not None),
        "insult_rate_unseen": float(_UNSEEN.search(response) is not None),
    }
    if row.facts is not None:
        metrics["facts"] = facts_kept(response, row.facts)
        metrics["quarrel_reported"] = float(quarrel_roles(response) is not None)
    return metrics


def validation_quality(rows: Sequence[Row], responses: Sequence[str]) -> float:
    """Return the mean in [0, 1] by which checkpoints are held to account: facts kept, or ROUGE-L without facts."""
    metrics = [response_metrics(row, response) for row, response in zip(rows, responses, strict=True)]
    return sum(metric.get("facts", metric["rouge_l"]) for metric in metrics) / len(metrics)
