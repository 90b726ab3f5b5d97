"""What dialogues does the embedded corpus hold?"""

from __future__ import annotations

import random
from dataclasses import dataclass

from detoxrl.data.facts import Facts
from detoxrl.data.insults import INSULTS, INTENSIFIERS, with_article
from detoxrl.data.phrases import PHRASES, SCENARIOS, SPEAKERS, Scenario, say
from detoxrl.data.rows import Row

# Rates at which a quarrel is rude, and at which a rude quarrel's reference summary repeats the insult.
RUDE_RATE = 0.8
REPEAT_RATE = 0.88


@dataclass(frozen=True, kw_only=True)
class Quarrel:
    """A scenario with every slot filled."""

    scenario: Scenario
    words: dict[str, str]
    """What fills the slots of phrases."""
    facts: Facts
    key: tuple[str, ...]
    """Scenario and fillers, without the phrasing: the combination that no two splits share."""


def draw_quarrel(rng: random.Random, scenario: Scenario) -> Quarrel:
    """Return the scenario with every slot filled at random."""
    who, whom = rng.sample(SPEAKERS, 2)
    slots = {"who": who, "whom": whom, "item": rng.choice(scenario.items), "detail": rng.choice(scenario.details)}
    slots |= {"when": rng.choice(PHRASES["when"]), "amount": rng.choice(PHRASES["amounts"])}
    fix = rng.choice(scenario.fixes)
    words = slots | {
        "spoken_fix": fix.format(you="you", **slots),
        "fix": fix.format(you=who, **slots),
        "complaint": rng.choice(scenario.complaints).format(**slots),
        "issue": rng.choice(scenario.issues).format(**slots),
        "reason": rng.choice(scenario.reasons).format(**slots),
    }
    about = tuple(phrase.format(**slots) for phrase in scenario.issues + scenario.reasons)
    facts = Facts(who=who, whom=whom, about=about, agreed=words["fix"])
    key = (scenario.topic, words["item"], words["detail"], words["spoken_fix"])
    return Quarrel(scenario=scenario, words=words, facts=facts, key=key)


def draw_insult(rng: random.Random, insults: tuple[str, ...]) -> dict[str, str]:
    """Return one of `insults`, with or without an intensifier, as words for the slots of phrases."""
    insult = rng.choice(insults)
    if rng.random() < 0.6:
        insult = f"{rng.choice(INTENSIFIERS)} {insult}"
    return {"insult": insult, "an_insult": with_article(insult)}


def _dialogue(rng: random.Random, quarrel: Quarrel, insult: dict[str, str]) -> str:
    words, who, whom = quarrel.words, quarrel.facts.who, quarrel.facts.whom
    greeted = whom == SPEAKERS[0]
    turns = [(whom, say(rng, "greetings", words))] if greeted else []
    complaint = say(rng, "follow-ups" if greeted else "openings", words)
    remark, pushback = say(rng, "polite remarks", words), say(rng, "pushbacks", words)
    if insult and rng.random() < 0.5:
        remark = say(rng, "thrown insults", insult)
    elif insult:
        pushback = say(rng, "thrown insults", insult)
    turns += [(who, f"{complaint} {remark}"), (whom, rng.choice(quarrel.scenario.excuses)), (who, pushback)]
    turns.append((whom, say(rng, "offers", words)))
    if rng.random() < 0.5:
        turns.append((who, say(rng, "thanks", words)))
    return "\n".join(f"{speaker}: {text}" for speaker, text in turns)


def _summaries(rng: random.Random, words: dict[str, str], insult: dict[str, str]) -> tuple[str, str]:
    """Return the reference summary and its civil twin, which reports the same quarrel without the insult."""
    agreement = say(rng, "agreements", words)
    civil = f"{say(rng, 'civil quarrels', words)} {agreement}"
    if not insult or rng.random() >= REPEAT_RATE:
        return civil, civil
    return f"{say(rng, 'toxic quarrels', words | insult)} {agreement}", civil


def generate_rows(seed: int, sizes: dict[str, int]) -> dict[str, list[Row]]:
    """Return `sizes[split]` rows for each split; no two splits share a combination of scenario and fillers."""
    rng = random.Random(f"corpus {seed}")
    taken: set[tuple[str, ...]] = set()
    rows: dict[str, list[Row]] = {}
    for split in sorted(sizes, key=lambda split: sizes[split]):
        drawn = [_draw_row(rng, f"{split}_{i}", taken) for i in range(sizes[split])]
        taken |= {key for key, _ in drawn}
        rows[split] = [row for _, row in drawn]
    return rows


def _draw_row(rng: random.Random, row_id: str, taken: set[tuple[str, ...]]) -> tuple[tuple[str, ...], Row]:
    scenario = rng.choice(SCENARIOS)
    quarrel = draw_quarrel(rng, scenario)
    while quarrel.key in taken:
        quarrel = draw_quarrel(rng, scenario)
    insult = draw_insult(rng, INSULTS) if rng.random() < RUDE_RATE else {}
    summary, civil = _summaries(rng, quarrel.words, insult)
    dialogue, facts = _dialogue(rng, quarrel, insult), quarrel.facts
    row = Row(id=row_id, dialogue=dialogue, summary=summary, topic=scenario.topic, facts=facts, civil_reference=civil)
    return quarrel.key, row
