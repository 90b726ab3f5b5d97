"""Which known name was meant by one that does not exist, and if none, what is there instead?

A hint is only given for what a typing mistake makes of a name. A word of another meaning that happens to share letters
(`serve` and `sweep`, `rl.algorithm` and `rl.lr`) is no hint.
"""

from collections.abc import Iterable, Sequence

# Settings that have another name today, as users and stored configs may still call them.
RENAMED = {
    "data.dialogue_column": "data.text_column",
    "data.summary_column": "data.reference_column",
}
# A name this short counts as misspelt nowhere, one shorter than _LONG in one place, others in two.
_SHORT = 2
_LONG = 8


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """Return the remedy for an unknown name: the known ones that it is a misspelling of, or `otherwise` if none is."""
    return question(misspelt(word, list(known))) or otherwise


def misspelt(word: str, known: Sequence[str]) -> list[str]:
    """Return the known names that `word` is the smallest misspelling of; none if it is a misspelling of none."""
    distances = {name: _distance(_normal(word), _normal(name)) for name in known if _is_misspelling(word, name)}
    smallest = min(distances.values(), default=0)
    return [name for name, distance in distances.items() if distance == smallest]


def question(names: Sequence[str]) -> str:
    """Return the question whether one of the names was meant; "" without names."""
    if not names:
        return ""
    *others, last = names
    return f"did you mean {', '.join(others)} or {last}?" if others else f"did you mean {last}?"


def did_you_mean_setting(word: str, known: Sequence[str], prefix: str = "") -> str:
    """Return the remedy for an unknown dotted name: the ones that are meant, or those of its section, or the sections.

    A setting is meant by a misspelling of it in its own section, and by its name in another section or without one.
    Each suggestion is shown behind `prefix`.
    """
    new_name = RENAMED.get(_normal(word))
    if new_name is not None:
        return f"it is called {prefix}{new_name} now"

    meant = _same_spelling(word, known) or _in_its_section(word, known) or _in_other_sections(word, known)
    if meant:
        return question([f"{prefix}{name}" for name in meant])

    section, _, _ = word.rpartition(".")
    fields = _fields(section or word, known)
    if fields:
        return f"settings of {_normal(section or word)}: {', '.join(fields)}"

    sections = dict.fromkeys(name.rpartition(".")[0] for name in known if "." in name)
    outside = [f"{prefix}{name}" for name in known if "." not in name]
    return f"choose from {', '.join([*outside, *(f'{prefix}{name}.*' for name in sections)])}"


def _normal(name: str) -> str:
    return name.lower().replace("-", "_")


def _same_spelling(word: str, known: Iterable[str]) -> list[str]:
    """Return the known name that differs from `word` in case, or in dashes for underscores, alone."""
    return [name for name in known if _normal(name) == _normal(word)]


def _in_its_section(word: str, known: Iterable[str]) -> list[str]:
    """Return the known names that `word` is a misspelling of: section and field are compared apart."""
    section, _, field = word.rpartition(".")
    by_field: dict[str, str] = {}
    for name in known:
        its_section, _, its_field = name.rpartition(".")
        if _normal(section) == _normal(its_section) or _is_misspelling(section, its_section):
            by_field[its_field] = name

    exact = [by_field[name] for name in _same_spelling(field, by_field)]
    return exact or [by_field[name] for name in misspelt(field, list(by_field))]


def _in_other_sections(word: str, known: Sequence[str]) -> list[str]:
    """Return the settings that have the field of `word` in another section; without a section, also misspelt."""
    section, _, field = word.rpartition(".")
    in_sections = [name for name in known if "." in name]
    exact = [name for name in in_sections if _normal(_field(name)) == _normal(field)]
    if exact or section:
        return exact

    meant = misspelt(field, list(dict.fromkeys(map(_field, in_sections))))
    return [name for name in in_sections if _field(name) in meant]


def _fields(section: str, known: Iterable[str]) -> list[str]:
    """Return the names of the settings in a section, without the flags that turn a setting off."""
    in_section = [_field(name) for name in known if _normal(name).startswith(f"{_normal(section)}.")]
    return [field for field in in_section if not _normal(field).startswith("no_")]


def _field(name: str) -> str:
    return name.rpartition(".")[2]


def _is_misspelling(word: str, name: str) -> bool:
    """Return whether few typing mistakes make `word` of `name`: one, or two in a longer name."""
    shorter = min(len(word), len(name))
    if shorter <= _SHORT:
        return False
    return _distance(_normal(word), _normal(name)) <= (1 if shorter < _LONG else 2)


def _distance(word: str, name: str) -> int:
    """Return how many letters to insert, delete, replace or swap with their neighbour make `word` of `name`.

    It is the optimal string alignment distance, a restricted Damerau-Levenshtein distance.
    """
    rows = [list(range(len(name) + 1))]
    for i, letter in enumerate(word, start=1):
        row = [i]
        for j, other in enumerate(name, start=1):
            smallest = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (letter != other))
            is_swap = i > 1 and j > 1 and letter == name[j - 2] and word[i - 2] == other
            row.append(min(smallest, rows[-2][j - 2] + 1) if is_swap else smallest)
        rows.append(row)
    return rows[-1][-1]
