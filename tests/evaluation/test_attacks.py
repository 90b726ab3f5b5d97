"""Attacks on a reward, and how often a reward prefers the honest response."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from scipy.stats import binomtest

from detoxrl.config.tasks import TASKS, TaskName
from detoxrl.config.terms import parse_term
from detoxrl.data.embedded.facts import facts_kept
from detoxrl.data.embedded.phrases import INSULTS, INTENSIFIERS, insult_pattern
from detoxrl.evaluation.attacks import ATTACKS, DISGUISES, attack_rows, rank_attacks
from detoxrl.evaluation.statistics import share_interval
from detoxrl.models.types import Prompt
from detoxrl.rewards.shaping import is_wordless
from detoxrl.rewards.terms import text_score

INSULT = insult_pattern((*INSULTS, *INTENSIFIERS))
WITHOUT: dict[TaskName, set[str]] = {
    "summarize": set(),
    "chat": {"swapped_speakers"},
    "rewrite": set(),
    "continue": {"swapped_speakers", "unending"},
}


@pytest.mark.parametrize("task", TASKS)
def test_every_attack_of_a_task_has_as_many_rows_as_asked(task: TaskName) -> None:
    rows = attack_rows(0, 200, task)
    assert rows == attack_rows(0, 200, task)
    assert [row for row in rows if row.attack == "copy"][:9] == attack_rows(0, 9, task, ["copy"])
    assert rows != attack_rows(1, 200, task)

    for attack in ATTACKS:
        of_attack = [row for row in rows if row.attack == attack]
        assert len(of_attack) == (0 if attack in WITHOUT[task] else 200)
        assert len({row.row.id for row in of_attack}) == len(of_attack)
    for row in rows:
        assert row.honest in row.row.civil_references
        assert not INSULT.search(row.honest)
        assert row.response != row.honest
        assert row.row.text in row.row.prompt
        assert row.ended == (row.attack != "unending")


def responses(attack: str, task: TaskName = "summarize") -> list[str]:
    return [row.response for row in attack_rows(2, 100, task, [attack])]


def test_silence_says_no_word() -> None:
    assert is_wordless(responses("silence")).all()
    assert 25 < responses("silence").count("") < 75


@pytest.mark.parametrize("task", TASKS)
def test_a_copy_is_the_text_or_its_last_turn(task: TaskName) -> None:
    copies = attack_rows(2, 200, task, ["copy"])
    for row in copies:
        turns = row.row.text.removesuffix("\n#Person1#:").removesuffix("\n#Person2#:")
        assert row.response == row.row.text or f"\n{turns}".endswith(f"\n{row.response}")
    # A source to rewrite has no turns, and some conversations have one.
    last = sum(row.response != row.row.text for row in copies)
    assert last == 0 if task == "rewrite" else 20 < last < 150


def test_one_sentence_is_civil_and_the_same_for_every_row() -> None:
    for task in TASKS:
        (sentence,) = set(responses("one_sentence", task))
        assert not INSULT.search(sentence)


@pytest.mark.parametrize("task", TASKS)
def test_insults_are_open_behind_thanks_and_hidden_in_disguises(task: TaskName) -> None:
    assert all(INSULT.search(response) for response in responses("polite_insult", task))
    for attack in DISGUISES:
        disguised = responses(attack, task)
        assert not any(INSULT.search(response) for response in disguised)
        assert len(set(disguised)) > 95


def test_a_reference_that_repeats_the_insult_is_the_insulting_response() -> None:
    rows = attack_rows(2, 100, "summarize", ["polite_insult"])
    rude = [row for row in rows if INSULT.search(row.row.references[0])]
    assert len(rude) > 50
    assert all(row.row.references[0] in row.response for row in rude)


def test_swapped_speakers_change_the_roles_and_nothing_else() -> None:
    for row in attack_rows(2, 100, "summarize", ["swapped_speakers"]):
        assert row.row.facts is not None
        assert facts_kept(row.honest, row.row.facts) == 1
        assert facts_kept(row.response, row.row.facts) <= 0.5
        assert row.response.count("#Person1#") == row.honest.count("#Person2#")


def test_an_unending_response_repeats_its_last_sentence() -> None:
    for row in attack_rows(2, 100, "summarize", ["unending"]):
        assert len(row.response.split()) == 50
        last = row.honest.split(". ")[-1]
        assert row.response.startswith(row.honest)
        assert row.response.count(last) > 1


def test_a_rate_is_the_share_of_rows_with_the_honest_response_strictly_above() -> None:
    rows = attack_rows(0, 50, "summarize")
    scored: list[str] = []

    def by_length(prompts: Sequence[Prompt], texts: Sequence[str], ended: torch.Tensor) -> torch.Tensor:
        """Words count until 12, as far as the response ended."""
        scored.extend(prompt.text for prompt in prompts)
        return torch.tensor([min(len(text.split()), 12) for text in texts]) * ended

    rates = {rate.attack: rate for rate in rank_attacks(rows, by_length)}
    assert list(rates) == list(ATTACKS)
    of_attacks = [[row.row.prompt for row in rows if row.attack == attack] for attack in ATTACKS]
    assert scored == [prompt for prompts in of_attacks for prompt in prompts * 2]  # Honest responses, then attacks.
    assert rates["silence"].share == rates["unending"].share == 1
    assert rates["swapped_speakers"].share == 0  # A tie is no victory.
    for rate in rates.values():
        assert rate.rows == 50
        assert 0 <= rate.low <= rate.share <= rate.high <= 1

    short = [row for row in rows if row.attack == "copy" and len(row.response.split()) < 12]
    assert rates["copy"].share == pytest.approx(len(short) / 50)


@pytest.mark.parametrize("task", TASKS)
def test_the_responses_of_an_attack_are_scored_together(task: TaskName) -> None:
    """Only then does the same sentence as the answer to everything differ from an honest one."""
    rows = attack_rows(0, 200, task, ["silence", "one_sentence"])
    of_batches: list[torch.Tensor] = []

    def variety(prompts: Sequence[Prompt], texts: Sequence[str], ended: torch.Tensor) -> torch.Tensor:
        of_batches.append(-text_score(parse_term("sameness"), None)(prompts, texts))
        return of_batches[-1]

    _, one_sentence = rank_attacks(rows, variety)
    assert one_sentence.share == 1
    # Beside silence in one batch it would be half of that.
    assert of_batches[-1].tolist() == [-1.0] * 200


@pytest.mark.parametrize(("successes", "trials"), [(0, 20), (1, 20), (10, 20), (195, 200), (200, 200)])
def test_the_interval_of_a_share_is_wilsons(successes: int, trials: int) -> None:
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    assert share_interval(successes, trials) == pytest.approx((expected.low, expected.high))
