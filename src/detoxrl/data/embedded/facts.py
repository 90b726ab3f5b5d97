"""Does a summary keep the facts of its dialogue, each with its role?"""

import re
from dataclasses import dataclass

from detoxrl.data.embedded.phrases import INSULTS, INTENSIFIERS

_NAME = r"#Person\d#"
_INSULT = rf"(?:(?:{'|'.join(INTENSIFIERS)}) )?(?:{'|'.join(INSULTS)})"
# Who attacks whom, in the active and in the passive voice. `calls` and `says` count only with the insult they
# introduce: "#Person1# calls #Person2# about the parcel" is a telephone call, not a quarrel.
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
    """Who complains to whom, about what (any of these phrases says it), and what was agreed by the accused."""

    who: str
    whom: str
    about: tuple[str, ...]
    agreed: str


def quarrel_roles(summary: str) -> tuple[str, str] | None:
    """Return (who, whom) of the first quarrel the summary reports, or None when it reports none."""
    active, passive = _ACTIVE.search(summary), _PASSIVE.search(summary)
    if active and not (passive and passive.start() < active.start()):
        who, whom = (name for name in active.groups() if name)
        return who, whom
    return (passive[2], passive[1]) if passive else None


def facts_kept(summary: str, facts: Facts) -> float:
    """Return the share in [0, 1] of the four facts the summary keeps; a swapped speaker loses every role it touches."""
    who, whom = quarrel_roles(summary) or (None, None)
    about = rf"(?<!\w)(?:{'|'.join(map(re.escape, facts.about))})(?!\w)"
    agreed = rf"{re.escape(facts.whom)} {_AGREES} {re.escape(facts.agreed)}(?!\w)"
    said = [re.search(pattern, summary) is not None for pattern in (about, agreed)]
    return sum((who == facts.who, whom == facts.whom, *said)) / 4
