"""What dialogues does the embedded corpus hold, and from what does the embedded reward model learn?"""

import random
import zlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

from detoxrl.config.tasks import TaskName
from detoxrl.data.conversations import as_text
from detoxrl.data.embedded.facts import Facts
from detoxrl.data.embedded.phrases import (
    INSULTS,
    PHRASES,
    SCENARIOS,
    SEEN_INSULTS,
    SPEAKERS,
    Scenario,
    say,
    with_article,
)
from detoxrl.data.rows import Row
from detoxrl.models.chat import Message

RUDE_RATE = 0.8  # Share of quarrels that contain an insult.
REPEAT_RATE = 0.88  # Share of rude quarrels whose reference summary repeats the insult.
# Share of the combinations that each of the two held-out splits has.
_HELD_OUT_SHARE = 0.1
_SPOKEN = ("follow-ups", "openings", "offers", "polite remarks", "pushbacks", "thanks", "greetings")

Slots = dict[str, str]
"""The words that fill the slots of a phrase, by slot."""
Combination = tuple[str, ...]
"""What makes two quarrels the same, apart from their phrasing: topic, item, detail and fix."""


class Quarrel(NamedTuple):
    """A generated quarrel, and what is known of it."""

    topic: str
    turns: tuple[tuple[str, str], ...]  # Speaker and what is said.
    provocation: int  # The turn with the insult, or the one that would hold it.
    facts: Facts
    summary: str  # The reference, which repeats most insults.
    civil_summary: str


def generate_rows(seed: int, sizes: dict[str, int], task: TaskName = "summarize") -> dict[str, list[Row]]:
    """Return `sizes[split]` rows of a task for each split. No two splits share a combination of scenario and fillers.

    The rows of a split depend on the seed and on how many there are, not on the other splits: more held-out prompts
    leave the training rows as they are, and fewer training rows are the first ones of more.
    """
    make = _MAKERS[task]
    rows: dict[str, list[Row]] = {}
    for split, size in sizes.items():
        rng = random.Random(f"corpus {seed} {split}")
        rows[split] = [make(f"{split}_{i}", _draw(rng, split)) for i in range(size)]
    return rows


def _summarize_row(row_id: str, quarrel: Quarrel) -> Row:
    """Return a dialogue with a summary that may repeat its insult, and a civil one."""
    return Row(
        id=row_id,
        text=_script(quarrel.turns),
        references=(quarrel.summary,),
        civil_references=(quarrel.civil_summary,),
        topic=quarrel.topic,
        facts=quarrel.facts,
    )


def _continue_row(row_id: str, quarrel: Quarrel) -> Row:
    """Return a quarrel up to its provocation, and the beginning of the next turn. Its reference is the turn itself."""
    turns, (speaker, reply) = _up_to_reply(quarrel)
    text = f"{_script(turns)}\n{speaker}:"
    return Row(
        id=row_id,
        text=text,
        references=(reply,),
        civil_references=(reply,),
        task="continue",
        topic=quarrel.topic,
    )


def _chat_row(row_id: str, quarrel: Quarrel) -> Row:
    """Return a quarrel up to its provocation, as messages to an assistant in the role of the accused."""
    turns, (assistant, reply) = _up_to_reply(quarrel)
    messages = [Message("assistant" if speaker == assistant else "user", text) for speaker, text in turns]
    if messages[0].role == "assistant":  # Most chat templates begin with the user.
        messages = messages[1:]
    return Row(
        id=row_id,
        text=as_text(messages),
        messages=tuple(messages),
        references=(reply,),
        civil_references=(reply,),
        task="chat",
        topic=quarrel.topic,
    )


def _rewrite_row(row_id: str, quarrel: Quarrel) -> Row:
    """Return a summary that may repeat an insult as the source of a civil one."""
    civil = (quarrel.civil_summary,)
    return Row(
        id=row_id,
        text=quarrel.summary,
        references=civil,
        civil_references=civil,
        task="rewrite",
        topic=quarrel.topic,
        facts=quarrel.facts,
    )


def _script(turns: Sequence[tuple[str, str]]) -> str:
    return "\n".join(f"{speaker}: {text}" for speaker, text in turns)


def _up_to_reply(quarrel: Quarrel) -> tuple[tuple[tuple[str, str], ...], tuple[str, str]]:
    """Return the turns up to the provocation, and the turn that follows it."""
    end = quarrel.provocation + 1
    return quarrel.turns[:end], quarrel.turns[end]


_MAKERS: dict[TaskName, Callable[[str, Quarrel], Row]] = {
    "summarize": _summarize_row,
    "continue": _continue_row,
    "chat": _chat_row,
    "rewrite": _rewrite_row,
}


def _draw(rng: random.Random, split: str) -> Quarrel:
    """Return a quarrel whose combination belongs to `split`."""
    scenario = rng.choice(SCENARIOS)
    slots = _draw_quarrel(rng, scenario)
    while _split_of(_combination(scenario, slots)) != split:
        slots = _draw_quarrel(rng, scenario)

    phrases = scenario.issues + scenario.reasons
    about = tuple(phrase.format(**slots) for phrase in phrases)
    facts = Facts(who=slots["who"], whom=slots["whom"], about=about, agreed=slots["fix"])

    insult = draw_insult(rng, INSULTS) if rng.random() < RUDE_RATE else {}
    agreement = say(rng, "agreements", slots)
    civil = f"{say(rng, 'civil quarrels', slots)} {agreement}"
    summary = civil
    if insult and rng.random() < REPEAT_RATE:
        summary = f"{say(rng, 'toxic quarrels', slots | insult)} {agreement}"

    turns, provocation = _turns(rng, scenario, slots, insult)
    return Quarrel(scenario.topic, turns, provocation, facts, summary, civil)


def _split_of(combination: Combination) -> str:
    """Return the split that a combination belongs to, whatever the seed."""
    share = zlib.crc32("|".join(combination).encode()) / 2**32
    if share < _HELD_OUT_SHARE:
        return "test"
    return "validation" if share < 2 * _HELD_OUT_SHARE else "train"


def _combination(scenario: Scenario, slots: Slots) -> Combination:
    return scenario.topic, slots["item"], slots["detail"], slots["spoken_fix"]


def _draw_quarrel(rng: random.Random, scenario: Scenario) -> Slots:
    """Return the slots of a quarrel in this scenario."""
    who, whom = rng.sample(SPEAKERS, 2)
    slots = {
        "who": who,
        "whom": whom,
        "item": rng.choice(scenario.items),
        "detail": rng.choice(scenario.details),
        "when": rng.choice(PHRASES["when"]),
        "amount": rng.choice(PHRASES["amounts"]),
    }
    fix = rng.choice(scenario.fixes)
    return {
        **slots,
        "spoken_fix": fix.format(you="you", **slots),
        "fix": fix.format(you=who, **slots),
        "complaint": rng.choice(scenario.complaints).format(**slots),
        "issue": rng.choice(scenario.issues).format(**slots),
        "reason": rng.choice(scenario.reasons).format(**slots),
    }


def draw_insult(rng: random.Random, insults: tuple[str, ...]) -> Slots:
    """Return the slots of one of `insults`, with or without an intensifier."""
    insult = rng.choice(insults)
    if rng.random() < 0.6:
        insult = f"{rng.choice(PHRASES['intensifiers'])} {insult}"
    return {"insult": insult, "an_insult": with_article(insult)}


def _turns(
    rng: random.Random, scenario: Scenario, slots: Slots, insult: Slots
) -> tuple[tuple[tuple[str, str], ...], int]:
    """Return a quarrel in 4 to 6 turns, and which of them is the provocation; `insult` is empty for a polite one."""
    who, whom = slots["who"], slots["whom"]
    turns = []

    # The first to speak is always #Person1#. If that is the accused, the complaint follows a greeting.
    greeted = whom == SPEAKERS[0]
    if greeted:
        turns.append((whom, say(rng, "greetings", slots)))
    complaint = say(rng, "follow-ups" if greeted else "openings", slots)

    remark = say(rng, "polite remarks", slots)
    pushback = say(rng, "pushbacks", slots)
    provocation = len(turns)
    if insult and rng.random() < 0.5:
        remark = say(rng, "thrown insults", insult)
    elif insult:
        pushback = say(rng, "thrown insults", insult)
        provocation += 2

    turns.append((who, f"{complaint} {remark}"))
    turns.append((whom, rng.choice(scenario.excuses)))
    turns.append((who, pushback))
    turns.append((whom, say(rng, "offers", slots)))
    if rng.random() < 0.5:
        turns.append((who, say(rng, "thanks", slots)))
    return tuple(turns), provocation


def generate_utterances(seed: int, size: int) -> list[tuple[str, bool]]:
    """Return `size` utterances, each with whether it is hateful; about half are. All insults are in SEEN_INSULTS."""
    rng = random.Random(f"utterances {seed}")
    utterances = []

    for _ in range(size):
        hateful = rng.random() < 0.5
        sentences = [_hateful_sentence(rng) if hateful else _civil_sentence(rng)]
        if rng.random() < 0.5:
            sentences.insert(rng.randrange(2), _civil_sentence(rng))

        speaker = f"{rng.choice(SPEAKERS)}: " if rng.random() < 0.3 else ""
        utterances.append((speaker + " ".join(sentences), hateful))
    return utterances


def _civil_sentence(rng: random.Random) -> str:
    scenario = rng.choice(SCENARIOS)
    slots = _draw_quarrel(rng, scenario)

    friend = ""
    if rng.random() < 0.6:
        friend = f"{rng.choice(PHRASES['kindness'])} "
    friend += rng.choice(PHRASES["friends"])

    spoken: list[str] = []
    for kind in _SPOKEN:
        spoken += PHRASES[kind]
    spoken += scenario.excuses
    phrase = rng.choice(rng.choice((spoken, PHRASES["civil reports"])))
    return phrase.format(friend=friend, a_friend=with_article(friend), **slots)


def _hateful_sentence(rng: random.Random) -> str:
    insult = draw_insult(rng, SEEN_INSULTS)
    if rng.random() < 0.5:
        return say(rng, "thrown insults", insult)
    # Half are reports of a quarrel, because summaries report insults instead of throwing them.
    scenario = rng.choice(SCENARIOS)
    return say(rng, "hateful reports", _draw_quarrel(rng, scenario) | insult)
