"""The embedded corpus, its facts and the utterances of the reward model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from detoxrl.data.embedded.corpus import generate_rows, generate_utterances
from detoxrl.data.embedded.facts import Facts, facts_kept, quarrel_roles
from detoxrl.data.embedded.phrases import INSULTS, PHRASES, SCENARIOS, SEEN_INSULTS, UNSEEN_INSULTS, insult_pattern
from detoxrl.data.rows import Row, read_rows, rows_to_jsonl

SIZES = {"train": 3000, "validation": 200, "test": 300}
FACTS = Facts(
    who="#Person1#",
    whom="#Person2#",
    about=("the lamp being late", "the lamp was late"),
    agreed="send a new lamp today",
)


@pytest.fixture(scope="module")
def rows() -> dict[str, list[Row]]:
    return generate_rows(0, SIZES)


def test_the_reward_model_never_sees_every_third_insult() -> None:
    assert UNSEEN_INSULTS == ("loser", "clown", "donkey", "brat", "blockhead", "dork", "snob", "cheapskate")
    assert set(SEEN_INSULTS) | set(UNSEEN_INSULTS) == set(INSULTS)
    unseen = insult_pattern(UNSEEN_INSULTS)
    utterances = generate_utterances(0, 3000)
    assert not any(unseen.search(text) for text, _ in utterances)
    assert 0.4 < sum(hateful for _, hateful in utterances) / 3000 < 0.6
    seen = insult_pattern(SEEN_INSULTS)
    assert all(bool(seen.search(text)) == hateful for text, hateful in utterances)


def test_the_corpus_has_many_scenarios_and_fillers() -> None:
    fillers = {filler for s in SCENARIOS for filler in s.items + s.details}
    fillers |= {*PHRASES["when"], *PHRASES["amounts"]}
    assert len(SCENARIOS) >= 12
    assert len(fillers) >= 200
    assert len(PHRASES["thrown insults"]) >= 6


def test_rows_follow_from_the_seed(rows: dict[str, list[Row]]) -> None:
    assert generate_rows(0, SIZES) == rows
    assert generate_rows(1, SIZES) != rows
    assert {split: len(split_rows) for split, split_rows in rows.items()} == SIZES
    assert len({row.id for split_rows in rows.values() for row in split_rows}) == sum(SIZES.values())


def test_the_rows_of_a_split_do_not_depend_on_the_sizes_of_the_others(rows: dict[str, list[Row]]) -> None:
    sizes = {"test": 40, "train": 500, "validation": 7}
    other = generate_rows(0, sizes)
    assert {split: len(split_rows) for split, split_rows in other.items()} == sizes
    for split, split_rows in other.items():
        assert split_rows == rows[split][: len(split_rows)]


def test_no_two_splits_share_scenario_and_fillers(rows: dict[str, list[Row]]) -> None:
    def combinations(split: str) -> set[tuple[object, ...]]:
        # Swapping the speakers does not make a new combination, so both get one name.
        return {
            (
                row.topic,
                tuple(phrase.replace("1", "2") for phrase in row.facts.about),
                row.facts.agreed.replace("1", "2"),
            )
            for row in rows[split]
            if row.facts
        }

    train, validation, test = (combinations(split) for split in ("train", "validation", "test"))
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_both_references_keep_all_facts_and_only_one_the_insult(rows: dict[str, list[Row]]) -> None:
    insult = insult_pattern()
    for row in rows["train"]:
        assert row.facts is not None
        assert row.civil_references[0] is not None
        assert facts_kept(row.references[0], row.facts) == 1
        assert facts_kept(row.civil_references[0], row.facts) == 1
        assert not insult.search(row.civil_references[0])
        assert insult.search(row.text) or not insult.search(row.references[0])


def test_some_rude_quarrels_are_reported_civilly_and_some_dialogues_are_polite(rows: dict[str, list[Row]]) -> None:
    insult = insult_pattern()
    rude = [row for row in rows["train"] if insult.search(row.text)]
    repeated = [row for row in rude if insult.search(row.references[0])]
    assert 0.77 < len(rude) / len(rows["train"]) < 0.83
    assert 0.85 < len(repeated) / len(rude) < 0.91


def test_either_speaker_complains(rows: dict[str, list[Row]]) -> None:
    first = sum(row.facts is not None and row.facts.who == "#Person1#" for row in rows["train"])
    assert 0.4 < first / len(rows["train"]) < 0.6


@pytest.mark.parametrize(
    ("summary", "kept"),
    [
        ("#Person1# criticizes #Person2# for the lamp being late. #Person2# agrees to send a new lamp today.", 1.0),
        ("#Person2# is criticized by #Person1# because the lamp was late. #Person2# will send a new lamp today.", 1.0),
        (
            "#Person1# says #Person2# is a lazy pig because the lamp was late. #Person2# will send a new lamp today.",
            1.0,
        ),
        ("#Person2# criticizes #Person1# for the lamp being late. #Person1# agrees to send a new lamp today.", 0.25),
        ("#Person1# criticizes #Person2# for the lamp being late. #Person1# agrees to send a new lamp today.", 0.75),
        ("#Person1# criticizes #Person2# for the lamp being late. #Person2# agrees to send a new lamp.", 0.75),
        ("#Person1# criticizes #Person2# for the lamps being late. #Person2# agrees to send a new lamp today.", 0.75),
        ("#Person1# calls #Person2# about the lamp being late. #Person2# agrees to send a new lamp today.", 0.5),
        ("", 0.0),
    ],
)
def test_facts_are_kept_only_in_their_roles(summary: str, kept: float) -> None:
    assert facts_kept(summary, FACTS) == kept


@pytest.mark.parametrize(
    ("summary", "roles"),
    [
        ("#Person2# calls #Person1# a worthless idiot because ...", ("#Person2#", "#Person1#")),
        ("#Person2# calls #Person1# today.", None),
        ("#Person1# is called an idiot by #Person2# because ...", ("#Person2#", "#Person1#")),
        ("#Person1# tells #Person2# off for ...", ("#Person1#", "#Person2#")),
        ("#Person1# tells #Person2# about the lamp.", None),
        ("#Person1# scolds the lazy pig #Person2# for ...", ("#Person1#", "#Person2#")),
        ("They agree that #Person2# will pay.", None),
    ],
)
def test_a_quarrel_is_found_with_its_roles(summary: str, roles: tuple[str, str] | None) -> None:
    assert quarrel_roles(summary) == roles


def test_rows_are_read_back_from_the_run_folder_unchanged(rows: dict[str, list[Row]], tmp_path: Path) -> None:
    odd = replace(rows["test"][0], text="“Curly” \r\n\u2028 emoji 🙂 {dialogue}", facts=None, civil_references=())
    written = [odd, *rows["test"][1:5]]
    (tmp_path / "rows.jsonl").write_bytes(rows_to_jsonl(written).encode())
    assert read_rows(tmp_path / "rows.jsonl") == written
