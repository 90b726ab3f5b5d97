"""Do the benchmarks on real data ask for what they say?"""

from __future__ import annotations

import json
import random
from argparse import Namespace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fluency
import paradetox
import quarrels
import realtoxicity

words = st.lists(st.sampled_from(["a", "b", "lamp", "soup", "!"]), min_size=4, max_size=9)


@given(words, st.integers(0, 2**32))
def test_a_corrupted_sentence_is_another_one_of_the_same_words(sentence: list[str], seed: int) -> None:
    broken = fluency.corrupted(sentence, random.Random(seed))
    assert broken != sentence
    assert broken
    assert set(broken) <= set(sentence)
    assert len(sentence) // 4 <= len(broken) <= len(sentence) + 2


def test_sentences_are_written_with_their_corrupted_ones(tmp_path: Path) -> None:
    rows = [{"civil": "You are very kind to me."}, {"civil": "Thank you."}, {"civil": None}]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    fluency.write_sentences(str(pairs), "civil", tmp_path / "made/sentences.jsonl")
    (line,) = (tmp_path / "made/sentences.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found["written"] == {"text": "You are very kind to me.", "fluent": 1}
    assert found["broken"]["fluent"] == 0
    assert found["broken"]["text"] != found["written"]["text"]


@pytest.mark.parametrize("seed", [0, 3])
def test_what_measures_has_no_part_in_the_reward(seed: int, tmp_path: Path) -> None:
    settings = paradetox.of_seed(seed, tmp_path)
    rewriting = paradetox.config_of("pairs.jsonl", "a/model", "an/encoder", tmp_path, settings)
    assert rewriting.seed == seed
    start = None if seed == 0 else str(tmp_path / "seed0/start")
    assert (rewriting.sft.steps > 0, rewriting.policy.adapter) == (seed == 0, start)  # Fine-tuned once.
    assert [term.kind for term in rewriting.reward.measured_terms] == ["classifier", "source_similarity"]
    assert all(term.source is None for term in rewriting.reward.measured_terms)
    assert rewriting.evaluation.encoder == "an/encoder"
    assert (rewriting.evaluation.best_of, rewriting.evaluation.sharpened) == (
        ((4,), True) if seed == 0 else ((), False)
    )

    continuing = realtoxicity.config_of("prompts.jsonl", "a/model", tmp_path / "scorer", {"seed": seed})
    options = Namespace(out=tmp_path, model="a/model", encoder="an/encoder", nli=None)
    summarizing = quarrels.config_of(options, seed)
    assert (summarizing.seed, summarizing.sft.steps) == (seed, 0)
    assert summarizing.evaluation.encoder == "an/encoder"
    assert [term.kind for term in continuing.reward.measured_terms] == ["classifier"]
    assert [term.kind for term in summarizing.reward.measured_terms] == ["classifier", "source_similarity"]
    for config in (rewriting, continuing, summarizing):
        assert config.reward.classifier == str(tmp_path / "scorer")
        assert (config.reward.good_label, config.reward.toxic_label) == ("score", None)
        assert config.evaluation.primary_judge == "perspective-minilm"


def test_quarrels_are_the_dialogues_with_the_rudest_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarrels, "LENGTHS", (7, 40))
    turns = [
        "A: Hello!\r\nB: Hi, how are you?",
        "A: You idiot!\nB: Sorry.",
        "A: Fine.\nB: Shut up, you moron.",
        "A: Ok.",
        "Idiot!",  # Too short, and the next one is too long.
        "A: You idiot!\nB: And you are a moron, " + "A." * 20,
    ]
    rows = [{"id": number, "dialogue": text, "summary": f"s{number}"} for number, text in enumerate(turns)]
    path = tmp_path / "dialogues.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = quarrels.quarrels_of(str(path), most=2)
    # In the order of the file.
    assert found == [{"dialogue": turns[number], "summary": f"s{number}"} for number in (1, 2)]


def test_paradetox_is_split_once_with_all_that_is_alike_in_one_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paradetox, "HELD_OUT", {"test": 5, "validation": 3})
    rng = random.Random(0)
    sources = [" ".join(rng.choices(["soup", "lamp", "kettle", "garden", "ticket", "window"], k=12)) for _ in range(40)]
    texts = [*sources, *sources[:20], *(f"{source} now" for source in sources[10:30])]
    rows = [{paradetox.RUDE: text, paradetox.CIVIL: f"civil {number}"} for number, text in enumerate(texts)]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    found: list[dict[str, list[str]]] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        paradetox.write_splits(str(pairs), folder)
        splits = {}
        for path in folder.iterdir():
            splits[path.stem] = [json.loads(line) for line in path.read_text().splitlines()]
        written = sorted((row for of_split in splits.values() for row in of_split), key=str)
        assert written == sorted(rows, key=str)
        found.append({split: [row[paradetox.RUDE] for row in of_split] for split, of_split in splits.items()})

    assert found[0] == found[1]
    stems = {split: {text.removesuffix(" now") for text in of_split} for split, of_split in found[0].items()}
    assert stems.keys() == {"train", "validation", "test"}
    assert (
        not stems["train"] & stems["test"] | stems["train"] & stems["validation"] | stems["validation"] & stems["test"]
    )
    assert 5 <= len(set(found[0]["test"])) <= 6
    assert 3 <= len(set(found[0]["validation"])) <= 4
