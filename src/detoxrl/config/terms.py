"""Of which terms can a reward consist, and how is a term written?

A term is text: its kind, then what is set of it, as in `similarity,weight=0.5,gate=0.2`. A backslash makes the comma or
backslash behind it a part of a value: `lexicon,source=a\\,b.txt`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from detoxrl.config.names import did_you_mean
from detoxrl.errors import InputError, require

FIELD = "reward.terms"
CLASSIFIER_SCORES = ("logit", "log_odds", "log_probability", "probability", "not_toxicity")
"""How a score is read from a classifier: the values of reward.score."""
GUARDED = "guarded"
"""What stands for GUARDED_TERMS among the values of reward.terms."""
GUARDED_TERMS = (
    "classifier,plain=true",
    "lexicon,weight=0.5",
    "similarity,weight=0.25",
    "copy,weight=0,gate=0.8",
    "repetition,weight=0,gate=0.4",
    "sameness,weight=0.25,gate=0.5",
)
"""A classifier, and what makes cheap ways to please it cost more than they gain (docs/attacks.md).

Copying and repetition only shut gates: a little of both is normal, so their amounts must not outweigh an insult.
Sameness also has a small weight, so that a few sentences in turn cost something before the gate shuts.
"""
# Names that mean something else in metrics.jsonl, behind score/.
_RESERVED_NAMES = ("mean", "std", "shaped", "tail")


class TermKind(NamedTuple):
    """What a kind of term measures, and what can be set of it beside name and weight."""

    meaning: str
    better: int  # 1: a larger value is better; -1: a smaller one.
    keys: tuple[str, ...] = ()
    # The smallest standard deviation that values are divided by. Shares hardly vary among the initial policy's
    # responses: without a bound, a repeated word would outweigh every insult.
    least_std: float = 0.0
    is_measured: bool = True  # Whether texts alone give the value; else it is a rule with a cost of its own.
    is_shared: bool = False  # Whether a value depends on the responses to other prompts too.


TERM_KINDS: dict[str, TermKind] = {
    "classifier": TermKind(
        "score of a classifier", 1, ("gate", "source", "toxic_label", "good_label", "score", "plain")
    ),
    "function": TermKind("value of a Python function", 1, ("gate", "source")),
    "similarity": TermKind("similarity to another response of the initial policy", 1, ("gate", "source"), 0.05),
    "source_similarity": TermKind("similarity to the row's text", 1, ("gate", "source"), 0.05),
    "length": TermKind("share of words missing or too many", -1, ("gate", "minimum", "maximum"), 0.05),
    "repetition": TermKind("share of words in triples that occurred before", -1, ("gate",), 0.05),
    "copy": TermKind("share of word 4-grams copied from the row's text", -1, ("gate",), 0.05),
    "sameness": TermKind(
        "share of word 4-grams that a response to another prompt has too", -1, ("gate",), 0.05, is_shared=True
    ),
    "lexicon": TermKind("share of words on a list of insults", -1, ("gate", "source"), 0.05),
    "missing_eos": TermKind("responses that did not end by themselves", -1, is_measured=False),
    "empty": TermKind("responses without a letter or digit", -1, is_measured=False),
}


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a reward. What is None follows from the kind, or from the setting of the same name."""

    kind: str
    name: str
    weight: float = 1.0  # 0: the value is logged and counts for nothing.
    gate: float | None = None  # A value worse than this takes every credit from the response.
    source: str | None = None  # Of a classifier, function, sentence encoder or list of words.
    toxic_label: str | None = None
    good_label: str | None = None
    score: str | None = None
    plain: bool = False  # Whether a classifier also reads the text in plain letters; the worse score counts.
    minimum: int = 0  # Words.
    maximum: int | None = None  # Words.

    @property
    def better(self) -> int:
        """1 where a larger value is better, -1 where a smaller one is."""
        return TERM_KINDS[self.kind].better

    @property
    def meaning(self) -> str:
        """What the value is."""
        return TERM_KINDS[self.kind].meaning

    def written(self) -> str:
        """Return the term as text, from which `parse_term` makes an equal one."""
        parts = [self.kind]
        default = Term(kind=self.kind, name=self.kind)
        for key in ("name", *_PARSERS):
            value = getattr(self, key)
            if value != getattr(default, key):
                parts.append(f"{key}={'true' if value is True else _escaped(str(value))}")
        return ",".join(parts)


def expanded(written: Sequence[str]) -> list[str]:
    """Return terms as they are written, with GUARDED_TERMS in the place of their name."""
    texts: list[str] = []
    for text in written:
        texts += GUARDED_TERMS if text == GUARDED else [text]
    return texts


def parse_terms(written: Sequence[str]) -> tuple[Term, ...]:
    """Return the terms that are written so. Raises InputError for one that is not understood, or a name used twice."""
    texts = expanded(written)
    terms = tuple(parse_term(text) for text in texts)
    names: set[str] = set()
    for term, text in zip(terms, texts, strict=True):
        rule = f"has the name {term.name}, as another term has"
        require(term.name not in names, FIELD, text, rule, "add name=NAME to one of them")
        names.add(term.name)

    measured = [term for term in terms if TERM_KINDS[term.kind].is_measured]
    rule = "holds only rules, and nothing that measures a response"
    require(bool(measured) or not terms, FIELD, " ".join(written), rule, "add a classifier or another term")
    return terms


def parse_term(text: str) -> Term:
    """Return the term that a text describes. Raises InputError."""
    kind, *assignments = [part.strip() for part in _parts(text)]
    known = TERM_KINDS.get(kind)
    if known is None:
        rule = f"begins with {kind or 'nothing'}, which is no kind of term"
        kinds = (*TERM_KINDS, GUARDED)
        raise InputError(FIELD, text, rule, did_you_mean(kind, kinds, f"choose from {', '.join(kinds)}"))

    allowed = ("name", "weight", *known.keys)
    values: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if key not in allowed:
            rule = f"sets {key}, which a {kind} does not have"
            raise InputError(FIELD, text, rule, did_you_mean(key, allowed, f"it has {', '.join(allowed)}"))
        require(bool(equals and value), FIELD, text, f"gives {key} no value", f"write {key}=VALUE")
        require(key not in values, FIELD, text, f"sets {key} twice", "leave one out")
        values[key] = value if key == "name" else _parsed(text, key, value)

    term = replace(Term(kind=kind, name=kind), **values)
    _require_possible(term, text)
    return term


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,")


def _parts(text: str) -> list[str]:
    """Return what stands between commas; a character behind a backslash is taken as it is."""
    parts = [""]
    characters = iter(text)
    for character in characters:
        if character == ",":
            parts.append("")
        elif character == "\\":
            parts[-1] += next(characters, "\\")
        else:
            parts[-1] += character
    return parts


def _parsed(text: str, key: str, value: str) -> Any:
    parse, rule = _PARSERS[key]
    try:
        return parse(value)
    except ValueError:
        raise InputError(FIELD, text, f"sets {key} to {value}, which {rule}", "correct the value") from None


def _number(value: str) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _weight(value: str) -> float:
    number = _number(value)
    if number < 0:
        raise ValueError
    return number


def _count(value: str) -> int:
    number = int(value)
    if number < 0:
        raise ValueError
    return number


def _truth(value: str) -> bool:
    truths = {"true": True, "false": False}
    if value.lower() not in truths:
        raise ValueError
    return truths[value.lower()]


def _score(value: str) -> str:
    if value not in CLASSIFIER_SCORES:
        raise ValueError
    return value


# How the value of each key is read, and what is wrong with one that cannot be.
_PARSERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "weight": (_weight, "is not a number of 0 or more; each kind of term knows which direction is better"),
    "gate": (_number, "is not a number"),
    "source": (str, ""),
    "toxic_label": (str, ""),
    "good_label": (str, ""),
    "score": (_score, f"is not one of {', '.join(CLASSIFIER_SCORES)}"),
    "plain": (_truth, "is neither true nor false"),
    "minimum": (_count, "is not a number of words"),
    "maximum": (_count, "is not a number of words"),
}


def _require_possible(term: Term, text: str) -> None:
    is_name = term.name.replace("_", "").replace("-", "").isalnum() and term.name not in _RESERVED_NAMES
    rule = f"has the name {term.name}, which is taken" if term.name in _RESERVED_NAMES else "has no usable name"
    require(is_name, FIELD, text, rule, "name it with letters, digits, - and _")

    if term.kind == "length":
        bounded = term.minimum > 0 or term.maximum is not None
        require(bounded, FIELD, text, "has no bounds", "add minimum=WORDS or maximum=WORDS")
        ordered = term.maximum is None or term.minimum <= term.maximum
        require(ordered, FIELD, text, f"ends below its minimum of {term.minimum}", "raise maximum or lower minimum")

    rule = "names the source embedded, which only a classifier without a source can be"
    remedy = "leave source and labels out, and keep reward.classifier at embedded"
    require(term.kind != "classifier" or term.source != "embedded", FIELD, text, rule, remedy)
    has_label = term.toxic_label is not None or term.good_label is not None
    labelled = term.source is None or term.kind != "classifier" or has_label
    require(labelled, FIELD, text, "names a classifier without a label", "add toxic_label=LABEL or good_label=LABEL")
    owned = term.source is not None or not has_label
    rule = "names a label without a source; those of reward.classifier are settings of their own"
    require(owned, FIELD, text, rule, "add source=SOURCE, or set reward.toxic_label")
