"""What dialogues does the embedded corpus hold, and from what does the embedded reward model learn?"""

import random

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

# Rates at which a quarrel is rude, and at which a rude quarrel's reference summary repeats the insult.
RUDE_RATE = 0.8
REPEAT_RATE = 0.88
_SPOKEN = ("follow-ups", "openings", "offers", "polite remarks", "pushbacks", "thanks", "greetings")


def _draw_quarrel(rng: random.Random, scenario: Scenario) -> dict[str, str]:
    """Return what fills the slots of phrases in a quarrel of this scenario."""
    who, whom = rng.sample(SPEAKERS, 2)
    slots = {"who": who, "whom": whom, "item": rng.choice(scenario.items), "detail": rng.choice(scenario.details)}
    slots |= {"when": rng.choice(PHRASES["when"]), "amount": rng.choice(PHRASES["amounts"])}
    fix = rng.choice(scenario.fixes)
    return slots | {
        "spoken_fix": fix.format(you="you", **slots),
        "fix": fix.format(you=who, **slots),
        "complaint": rng.choice(scenario.complaints).format(**slots),
        "issue": rng.choice(scenario.issues).format(**slots),
        "reason": rng.choice(scenario.reasons).format(**slots),
    }


def _draw_insult(rng: random.Random, insults: tuple[str, ...]) -> dict[str, str]:
    """Return one of `insults`, with or without an intensifier, as words for the slots of phrases."""
    insult = rng.choice(insults)
    if rng.random() < 0.6:
        insult = f"{rng.choice(PHRASES['intensifiers'])} {insult}"
    return {"insult": insult, "an_insult": with_article(insult)}


def _dialogue(rng: random.Random, scenario: Scenario, words: dict[str, str], insult: dict[str, str]) -> str:
    who, whom = words["who"], words["whom"]
    greeted = whom == SPEAKERS[0]
    turns = [(whom, say(rng, "greetings", words))] if greeted else []
    complaint = say(rng, "follow-ups" if greeted else "openings", words)
    remark, pushback = say(rng, "polite remarks", words), say(rng, "pushbacks", words)
    if insult and rng.random() < 0.5:
        remark = say(rng, "thrown insults", insult)
    elif insult:
        pushback = say(rng, "thrown insults", insult)
    turns += [(who, f"{complaint} {remark}"), (whom, rng.choice(scenario.excuses)), (who, pushback)]
    turns.append((whom, say(rng, "offers", words)))
    if rng.random() < 0.5:
        turns.append((who, say(rng, "thanks", words)))
    return "\n".join(f"{speaker}: {text}" for speaker, text in turns)


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
    """Return a row whose scenario and fillers, the phrasing aside, are not `taken`, and what they are."""
    scenario = rng.choice(SCENARIOS)
    words = _draw_quarrel(rng, scenario)
    while (key := (scenario.topic, words["item"], words["detail"], words["spoken_fix"])) in taken:
        words = _draw_quarrel(rng, scenario)
    about = tuple(phrase.format(**words) for phrase in scenario.issues + scenario.reasons)
    facts = Facts(who=words["who"], whom=words["whom"], about=about, agreed=words["fix"])
    insult = _draw_insult(rng, INSULTS) if rng.random() < RUDE_RATE else {}
    agreement = say(rng, "agreements", words)
    civil = summary = f"{say(rng, 'civil quarrels', words)} {agreement}"
    if insult and rng.random() < REPEAT_RATE:  # the same quarrel with the insult
        summary = f"{say(rng, 'toxic quarrels', words | insult)} {agreement}"
    dialogue = _dialogue(rng, scenario, words, insult)
    row = Row(id=row_id, dialogue=dialogue, summary=summary, topic=scenario.topic, facts=facts, civil_reference=civil)
    return key, row


def generate_utterances(seed: int, size: int) -> list[tuple[str, bool]]:
    """Return `size` utterances, each with whether it is hateful, as half are; no insult is outside SEEN_INSULTS."""
    rng, utterances = random.Random(f"utterances {seed}"), list[tuple[str, bool]]()
    for _ in range(size):
        hateful = rng.random() < 0.5
        sentences = [_hateful(rng) if hateful else _civil(rng)]
        if rng.random() < 0.5:
            sentences.insert(rng.randrange(2), _civil(rng))
        speaker = f"{rng.choice(SPEAKERS)}: " if rng.random() < 0.3 else ""
        utterances.append((speaker + " ".join(sentences), hateful))
    return utterances


def _civil(rng: random.Random) -> str:
    scenario = rng.choice(SCENARIOS)
    words = _draw_quarrel(rng, scenario)
    kindness = f"{rng.choice(PHRASES['kindness'])} " if rng.random() < 0.6 else ""
    friend = kindness + rng.choice(PHRASES["friends"])
    spoken = [phrase for kind in _SPOKEN for phrase in PHRASES[kind]] + list(scenario.excuses)
    phrase = rng.choice(rng.choice((spoken, PHRASES["civil reports"])))
    return phrase.format(friend=friend, a_friend=with_article(friend), **words)


def _hateful(rng: random.Random) -> str:
    insult = _draw_insult(rng, SEEN_INSULTS)
    if rng.random() < 0.5:
        return say(rng, "thrown insults", insult)
    # People also tell of quarrels: with the insult that fell, or civilly.
    return say(rng, "hateful reports", _draw_quarrel(rng, rng.choice(SCENARIOS)) | insult)
