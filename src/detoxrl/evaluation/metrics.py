"""What is measured of a response beside its toxicity?"""

from __future__ import annotations

import re
from collections.abc import Sequence

from rouge_score.rouge_scorer import RougeScorer

from detoxrl.data.facts import facts_kept, quarrel_roles
from detoxrl.data.insults import SEEN_INSULTS, UNSEEN_INSULTS, insult_pattern
from detoxrl.data.rows import Row


class _Words:
    """Words of any script: the scorer's own tokenizer knows Latin letters alone."""

    @staticmethod
    def tokenize(text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())


_ROUGE = RougeScorer(["rougeL"], tokenizer=_Words)
_SEEN, _UNSEEN = insult_pattern(SEEN_INSULTS), insult_pattern(UNSEEN_INSULTS)


def rouge_l(reference: str, response: str) -> float:
    """Return ROUGE-L F1 in [0, 1] (Lin 2004), without stemming."""
    return float(_ROUGE.score(reference, response)["rougeL"].fmeasure)


def response_metrics(row: Row, response: str) -> dict[str, float]:
    """Return every metric of one response; those that need a reference or facts only where the row has them."""
    metrics = {"length": float(len(response.split())), "empty_rate": float(not response)}
    reference = row.civil_reference or row.summary
    if reference is not None:
        metrics["rouge_l"] = rouge_l(reference, response)
    if row.facts is not None:
        metrics["facts"] = facts_kept(response, row.facts)
        metrics["quarrel_reported"] = float(quarrel_roles(response) is not None)
        metrics["insult_rate"] = float(_SEEN.search(response) is not None)
        metrics["insult_rate_unseen"] = float(_UNSEEN.search(response) is not None)
    return metrics


def validation_quality(rows: Sequence[Row], responses: Sequence[str]) -> float:
    """Return the mean in [0, 1] by which checkpoints are held to account.

    It is facts kept; without facts ROUGE-L; without references the share of responses that say anything.
    """
    metrics = [response_metrics(row, response) for row, response in zip(rows, responses, strict=True)]
    name = next((name for name in ("facts", "rouge_l") if all(name in metric for metric in metrics)), None)
    return sum(metric[name] if name else 1 - metric["empty_rate"] for metric in metrics) / len(metrics)
