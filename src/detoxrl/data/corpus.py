"""What dialogues does the embedded corpus hold, and which utterances train the embedded reward model?"""

from __future__ import annotations

import random
from dataclasses import dataclass

from detoxrl.data.facts import Facts
from detoxrl.data.insults import CONSTRUCTIONS, INSULTS, INTENSIFIERS, with_article
from detoxrl.data.rows import Row
from detoxrl.data.scenarios import AMOUNTS, SCENARIOS, SPEAKERS, WHEN, Scenario

# Rates at which a quarrel is rude, and at which a rude quarrel's reference summary repeats the insult.
RUDE_RATE = 0.8
REPEAT_RATE = 0.88

GREETINGS = ("Hello, what is it?", "Hi, how are you?", "You wanted to see me?", "Yes, please?", "Come in.")
OPENINGS = (
    "Hey, {complaint}.",
    "There you are, {complaint}.",
    "I am upset: {complaint}.",
    "We must talk, {complaint}.",
)
FOLLOW_UPS = ("I have to tell you that {complaint}.", "Well, {complaint}.", "I am not happy, {complaint}.")
POLITE = ("I was quite surprised.", "That was not nice for me.", "I hope we can solve this.", "It made me a bit sad.")
PUSHBACKS = ("That does not help me.", "I see, but what now?", "And what will you do about it?", "That is no excuse.")
OFFERS = ("All right, I will {fix}.", "Sorry. I can {fix}.", "How about this: I {fix}?", "I promise to {fix}.")
THANKS = ("Fine.", "Good, thank you.", "Okay, agreed.", "That sounds fair.", "All right then.")

TOXIC_QUARRELS = (
    "{who} calls {whom} {an_insult} because {reason}.",
    "{who} says {whom} is {an_insult} because {reason}.",
    "{who} insults {whom} as {an_insult} over {issue}.",
    "{who} scolds the {insult} {whom} for {issue}.",
    "{whom} is called {an_insult} by {who} because {reason}.",
    "{who} complains to {whom} about {issue} and calls {whom} {an_insult}.",
    "{who} tells {whom} off for {issue} as only {an_insult} would do that.",
)
CIVIL_QUARRELS = (
    "{who} complains to {whom} because {reason}.",
    "{who} complains to {whom} about {issue}.",
    "{who} criticizes {whom} for {issue}.",
    "{who} blames {whom} for {issue}.",
    "{who} is angry with {whom} because {reason}.",
    "{whom} is criticized by {who} because {reason}.",
    "{who} tells {whom} off for {issue}.",
)
AGREEMENTS = (
    "{whom} agrees to {fix}.",
    "{whom} promises to {fix}.",
    "In the end {whom} will {fix}.",
    "They agree that {whom} will {fix}.",
)


@dataclass(frozen=True, kw_only=True)
class Quarrel:
    """A scenario with every slot filled: the combination that no two splits share."""

    topic: str
    who: str
    whom: str
    item: str
    detail: str
    complaint: str
    reason: str
    issue: str
    about: tuple[str, ...]
    spoken_fix: str
    fix: str

    @property
    def key(self) -> tuple[str, ...]:
        """Scenario and fillers, without the phrasing."""
        return (self.topic, self.item, self.detail, self.spoken_fix)


def draw_quarrel(rng: random.Random, scenario: Scenario) -> Quarrel:
    """Return the scenario with every slot filled at random."""
    who, whom = rng.sample(SPEAKERS, 2)
    slots = {
        "item": rng.choice(scenario.items),
        "detail": rng.choice(scenario.details),
        "when": rng.choice(WHEN),
        "amount": rng.choice(AMOUNTS),
        "who": who,
        "whom": whom,
    }
    fix = rng.choice(scenario.fixes)
    about = tuple(phrase.format(**slots) for phrase in scenario.issues + scenario.reasons)
    return Quarrel(
        topic=scenario.topic,
        who=who,
        whom=whom,
        item=slots["item"],
        detail=slots["detail"],
        complaint=rng.choice(scenario.complaints).format(**slots),
        issue=rng.choice(about[: len(scenario.issues)]),
        reason=rng.choice(about[len(scenario.issues) :]),
        about=about,
        spoken_fix=fix.format(you="you", **slots),
        fix=fix.format(you=who, **slots),
    )


def draw_insult(rng: random.Random, insults: tuple[str, ...]) -> str:
    """Return one of `insults`, with or without an intensifier."""
    noun = rng.choice(insults)
    return f"{rng.choice(INTENSIFIERS)} {noun}" if rng.random() < 0.6 else noun


def insult_sentence(rng: random.Random, insult: str) -> str:
    """Return a sentence that throws `insult` at somebody."""
    return rng.choice(CONSTRUCTIONS).format(insult=insult, an_insult=with_article(insult))


def _dialogue(rng: random.Random, quarrel: Quarrel, scenario: Scenario, insult: str | None) -> str:
    who, whom = quarrel.who, quarrel.whom
    turns: list[tuple[str, str]] = []
    greeted = whom == SPEAKERS[0]
    if greeted:
        turns.append((whom, rng.choice(GREETINGS)))
    complaint = rng.choice(FOLLOW_UPS if greeted else OPENINGS).format(complaint=quarrel.complaint)
    remark, pushback = rng.choice(POLITE), rng.choice(PUSHBACKS)
    if insult and rng.random() < 0.5:
        remark = insult_sentence(rng, insult)
    elif insult:
        pushback = insult_sentence(rng, insult)
    turns.append((who, f"{complaint} {remark}"))
    turns.append((whom, rng.choice(scenario.excuses)))
    turns.append((who, pushback))
    turns.append((whom, rng.choice(OFFERS).format(fix=quarrel.spoken_fix)))
    if rng.random() < 0.5:
        turns.append((who, rng.choice(THANKS)))
    return "\n".join(f"{speaker}: {text}" for speaker, text in turns)


def _summaries(rng: random.Random, quarrel: Quarrel, insult: str | None) -> tuple[str, str]:
    """Return the reference summary and its civil twin, which reports the same quarrel without the insult."""
    slots = {"who": quarrel.who, "whom": quarrel.whom, "reason": quarrel.reason, "issue": quarrel.issue}
    agreement = rng.choice(AGREEMENTS).format(whom=quarrel.whom, fix=quarrel.fix)
    civil = f"{rng.choice(CIVIL_QUARRELS).format(**slots)} {agreement}"
    if insult is None or rng.random() >= REPEAT_RATE:
        return civil, civil
    toxic = rng.choice(TOXIC_QUARRELS).format(insult=insult, an_insult=with_article(insult), **slots)
    return f"{toxic} {agreement}", civil


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
    insult = draw_insult(rng, INSULTS) if rng.random() < RUDE_RATE else None
    summary, civil = _summaries(rng, quarrel, insult)
    facts = Facts(who=quarrel.who, whom=quarrel.whom, about=quarrel.about, agreed=quarrel.fix)
    dialogue = _dialogue(rng, quarrel, scenario, insult)
    row = Row(id=row_id, dialogue=dialogue, summary=summary, topic=quarrel.topic, facts=facts, civil_reference=civil)
    return quarrel.key, row
