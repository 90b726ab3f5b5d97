"""What do judges make of disguised insults, of other languages, and of civil mentions of a group?

All texts are generated or written here, and mild.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

from detoxrl.data.embedded.corpus import draw_insult, generate_utterances
from detoxrl.data.embedded.phrases import INSULTS, INTENSIFIERS, insult_pattern, say
from detoxrl.evaluation.attacks import DISGUISES, homoglyph_word, leet_word, spaced_phrase
from detoxrl.evaluation.identity import audit_judge
from detoxrl.evaluation.identity_sentences import DIALECT
from detoxrl.report.words import number, signed
from detoxrl.rewards.obfuscation import plain
from judge_measures import Benchmark, Table, mean, percentage, rated, value
from judged_sets import Labelled
from mild_pairs import MILD_PAIRS

_INSULT = insult_pattern((*INSULTS, *INTENSIFIERS))
_DISGUISED = 200  # Insults per disguise.

Disguise = Callable[[list[str], random.Random], str]  # Of the words of an insult.


class DisguisedInsult(NamedTuple):
    """A sentence with a mild insult, and the same with the insult in disguise."""

    shown: str
    disguised: str


def _leetspeak(words: list[str], rng: random.Random) -> str:
    return " ".join(leet_word(word, rng) for word in words)


def _homoglyphs(words: list[str], rng: random.Random) -> str:
    return " ".join(homoglyph_word(word, rng) for word in words)


_DISGUISE_OF: dict[str, Disguise] = {
    "leetspeak": _leetspeak,
    "spaced": spaced_phrase,
    "homoglyphs": _homoglyphs,
}


def disguised_insults(disguise: str, size: int, seed: int) -> list[DisguisedInsult]:
    """Return `size` distinct generated sentences whose insults are in disguise; one that still reads is left out."""
    rng = random.Random(f"disguised insults {seed} {disguise}")
    hide = _DISGUISE_OF[disguise]

    made: dict[str, DisguisedInsult] = {}
    while len(made) < size:
        slots = draw_insult(rng, INSULTS)
        shown = say(rng, "thrown insults", slots)
        insult = slots["insult"]
        disguised = shown.replace(insult, hide(insult.split(), rng))
        if not _INSULT.search(disguised):
            made.setdefault(shown, DisguisedInsult(shown, disguised))
    return list(made.values())


def disguises(benchmark: Benchmark) -> Table:
    """Return the mean toxicity of insults, of the same in disguise, and of the disguised ones in plain letters."""
    civil = [text for text, hateful in generate_utterances(benchmark.seed, 4 * _DISGUISED) if not hateful][:_DISGUISED]
    rows = []
    for disguise in DISGUISES:
        insults = disguised_insults(disguise, _DISGUISED, benchmark.seed)
        shown = [insult.shown for insult in insults]
        disguised = [insult.disguised for insult in insults]
        for name, judge in benchmark.judges.items():
            texts = (civil, shown, disguised, [plain(text) for text in disguised])
            rows.append([disguise, name, *(mean(judge(list(column))) for column in texts)])

    columns = ["disguise", "judge", "civil texts", "insults", "in disguise", "read in plain letters"]
    return Table(f"Mean toxicity of {_DISGUISED} generated texts each, insults of the embedded corpus.", columns, rows)


def languages(benchmark: Benchmark) -> Table:
    """Return how each judge tells mild insults from civil sentences in each language."""
    rows = []
    for language, pairs in MILD_PAIRS.items():
        insults = [Labelled(insult, True, insult) for insult, _ in pairs]
        civil = [Labelled(sentence, False, sentence) for _, sentence in pairs]
        for name, judge in benchmark.judges.items():
            ratings = rated(judge, insults + civil)
            means = mean(ratings.probabilities[: len(pairs)]), mean(ratings.probabilities[len(pairs) :])
            rows.append([language, name, number(value("auc", ratings)), *means])

    count = len(next(iter(MILD_PAIRS.values())))
    caption = f"{count} mild insults and {count} civil sentences of the same form in each language."
    return Table(caption, ["language", "judge", "AUC", "mean of insults", "mean of civil sentences"], rows)


def identity(benchmark: Benchmark) -> Table:
    """Return which groups each judge rates as more toxic than neutral terms, and how it rates dialects."""
    rows = []
    summaries = []
    for name, judge in benchmark.judges.items():
        audit = audit_judge(judge)
        flagged = audit["flagged"]
        summaries.append(
            f"{name}: {len(flagged)} of {len(audit['groups'])} groups flagged, "
            f"{percentage(audit['toxic_ratio'])} of {audit['sentences']} civil sentences at 0.5 or above, "
            f"neutral terms {number(audit['neutral_range'])} apart."
        )
        dialects = [group for group, result in audit["groups"].items() if result["category"] == DIALECT]
        for group in dict.fromkeys([*flagged, *dialects]):
            result = audit["groups"][group]
            difference = result["difference"]
            interval = f"{number(difference['low'])} to {number(difference['high'])}"
            rows.append(
                [
                    name,
                    group,
                    number(result["mean"]),
                    number(result["neutral"]),
                    f"{signed(difference['mean'])} ({interval})",
                    percentage(result["toxic_ratio"]),
                    "yes" if group in flagged else "no",
                ]
            )
    columns = ["judge", "group or dialect", "mean", "neutral", "difference", "at 0.5 or above", "flagged"]
    return Table(" ".join(summaries), columns, rows)
