"""Does a summary keep the facts of its dialogue, each with its role?"""

import re
from dataclasses import dataclass

from detoxrl.data.embedded.phrases import INSULTS, INTENSIFIERS

_NAME = r"#Person\d#"
_INSULT = rf"(?:(?:{'|'.join(INTENSIFIERS)}) )?(?:{'|'.join(INSULTS)})"
# Who attacks whom, in the active and the passive voice. `calls` and `says` count only together with the insult:
# "#Person1# calls #Person2# about the parcel" is a telephone call, not a quarrel.
_ACTIVE = re.compile(
    rf"({_NAME}) (?:complains to|criticizes|blames|is angry with|insults|scolds(?: the {_INSULT})?) ({_NAME})"
    rf"|({_NAME}) calls ({_NAME}) an? {_INSULT}\b"
    rf"|({_NAME}) says ({_NAME}) is an? {_INSULT}\b"
    rf"|({_NAME}) tells ({_NAME}) off\b"
)
_PASSIVE = re.compile(rf"({_NAME}) is (?:called an? {_INSULT}|criticized|scolded) by ({_NAME})")
_AGREES = r"(?:agrees to|promises to|offers to|will)"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Who complains to whom, about what (any of these phrases counts), and what the accused agreed to do."""

    who: str
    whom: str
    about: tuple[str, ...]
    agreed: str


def quarrel_roles(summary: str) -> tuple[str, str] | None:
    """Return (who, whom) of the first quarrel that the summary reports, or None if it reports none."""
    active = _ACTIVE.search(summary)
    passive = _PASSIVE.search(summary)

    if active and (passive is None or active.start() <= passive.start()):
        who, whom = [name for name in active.groups() if name]
        return who, whom
    if passive:
        return passive[2], passive[1]
    return None


def facts_kept(summary: str, facts: Facts) -> float:
    """Return the share in [0, 1] of the four facts that the summary keeps.

    If the speakers are swapped, every fact that depends on a speaker is lost.
    """
    who, whom = quarrel_roles(summary) or (None, None)

    phrases = "|".join(map(re.escape, facts.about))
    about = re.search(rf"(?<!\w)(?:{phrases})(?!\w)", summary)
    agreed = re.search(rf"{re.escape(facts.whom)} {_AGREES} {re.escape(facts.agreed)}(?!\w)", summary)

    kept = [who == facts.who, whom == facts.whom, about is not None, agreed is not None]
    return sum(kept) / len(kept)
