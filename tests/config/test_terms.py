"""Is a term of a reward understood as it is written, and refused with a reason where it is not?"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from detoxrl.config.edit import config_from_json, config_to_json
from detoxrl.config.recipes import recipe
from detoxrl.config.sources import map_sources, sources, term_labels, with_absolute_paths
from detoxrl.config.terms import TERM_KINDS, Term, parse_term, parse_terms
from detoxrl.errors import InputError


def test_a_term_is_a_kind_and_what_is_set_of_it() -> None:
    assert parse_term("similarity, weight=0.5, gate=0.2") == Term(
        kind="similarity", name="similarity", weight=0.5, gate=0.2
    )
    assert parse_term("length,name=brief,minimum=3,maximum=30") == Term(
        kind="length", name="brief", minimum=3, maximum=30
    )
    assert parse_term("classifier,source=a/b,toxic_label=toxic,plain=true,score=log_odds") == Term(
        kind="classifier", name="classifier", source="a/b", toxic_label="toxic", plain=True, score="log_odds"
    )

    assert parse_term("classifier,source=scorer,good_label=score") == Term(
        kind="classifier", name="classifier", source="scorer", good_label="score"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("similarty", "begins with similarty, which is no kind of term; did you mean similarity?"),
        ("fluency", "no kind of term; choose from classifier, function, similarity"),
        ("", "begins with nothing, which is no kind of term"),
        ("copy,wieght=1", "sets wieght, which a copy does not have; did you mean weight?"),
        ("copy,maximum=3", "sets maximum, which a copy does not have; it has name, weight, gate"),
        ("copy,weight", "gives weight no value; write weight=VALUE"),
        ("copy,weight=1,weight=2", "sets weight twice"),
        ("copy,weight=-1", "sets weight to -1, which is not a number of 0 or more; each kind of term knows which"),
        ("copy,weight=nan", "sets weight to nan"),
        ("copy,gate=much", "sets gate to much, which is not a number"),
        ("classifier,plain=maybe", "sets plain to maybe, which is neither true nor false"),
        ("classifier,score=loud", "sets score to loud, which is not one of logit, log_odds"),
        ("classifier,source=a/b", "names a classifier without a label; add toxic_label=LABEL or good_label=LABEL"),
        ("classifier,source=embedded,toxic_label=hate", "names the source embedded, which only a classifier without"),
        ("classifier,toxic_label=toxic", "names a label without a source"),
        ("length", "has no bounds; add minimum=WORDS or maximum=WORDS"),
        ("length,minimum=5,maximum=2", "ends below its minimum of 5"),
        ("length,minimum=-5", "sets minimum to -5, which is not a number of words"),
        ("copy,name=mean", "has the name mean, which is taken"),
        ("copy,name=a/b", "has no usable name"),
    ],
)
def test_a_term_that_is_not_understood_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"reward\.terms") as refused:
        parse_term(text)
    assert message in str(refused.value)


def test_terms_need_names_of_their_own_and_something_that_measures() -> None:
    with pytest.raises(InputError, match="has the name copy, as another term has; add name=NAME to one of them"):
        parse_terms(["copy", "copy,weight=2"])
    with pytest.raises(InputError, match="holds only rules, and nothing that measures a response"):
        parse_terms(["empty,weight=3", "missing_eos"])


numbers = st.floats(min_value=0, max_value=100, allow_nan=False)


@given(kind=st.sampled_from(sorted(TERM_KINDS)), weight=numbers, gate=st.none() | numbers)
def test_what_is_written_of_a_term_is_read_as_the_same_term(kind: str, weight: float, gate: float | None) -> None:
    allowed = TERM_KINDS[kind].keys
    term = Term(
        kind=kind,
        name="mine",
        weight=weight,
        gate=gate if "gate" in allowed else None,
        plain="plain" in allowed,
        maximum=7 if "maximum" in allowed else None,
    )
    assert parse_term(term.written()) == term


texts = st.text(min_size=1).filter(lambda text: text == text.strip())


@given(source=texts, label=texts)
def test_a_source_and_a_label_may_hold_any_character(source: str, label: str) -> None:
    assume(source != "embedded")
    term = Term(kind="classifier", name="mine", source=source, toxic_label=label)
    assert parse_term(term.written()) == term


def test_a_comma_stands_behind_a_backslash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_term(r"lexicon,source=/data/a\,b\\c/words.txt").source == r"/data/a,b\c/words.txt"

    folder = tmp_path / "a,b"
    folder.mkdir()
    (folder / "words.txt").write_text("clown\n")
    monkeypatch.chdir(folder)
    absolute = with_absolute_paths(recipe("own", {"reward.terms": ["lexicon,source=words.txt"]}))
    assert absolute.reward.measured_terms[0].source == f"{folder}/words.txt"
    assert with_absolute_paths(absolute) == absolute


def test_without_terms_the_classifier_or_the_function_is_the_only_one() -> None:
    assert recipe("own").reward.measured_terms == (Term(kind="classifier", name="classifier"),)
    of_function = recipe("own", {"reward.function": "my.py:score"}).reward
    assert of_function.measured_terms == (Term(kind="function", name="function"),)
    assert not of_function.reads_classifier


def test_none_is_no_list_of_terms() -> None:
    assert recipe("own", {"reward.terms": ["none"]}).reward.terms == ()


def test_rules_among_the_terms_replace_their_settings() -> None:
    config = recipe("own", {"reward.terms": ["classifier", "missing_eos,weight=0.25", "empty,weight=3"]})
    assert [term.kind for term in config.reward.measured_terms] == ["classifier"]
    assert (config.missing_eos_penalty, config.empty_score) == (0.25, -3.0)
    plain = recipe("own")
    assert (plain.missing_eos_penalty, plain.empty_score) == (1.0, plain.reward.empty_score)


def test_a_function_that_no_term_reads_is_refused() -> None:
    with pytest.raises(InputError, match=r"reward.function = 'my.py:score': is read by none of reward.terms = copy"):
        recipe("own", {"reward.function": "my.py:score", "reward.terms": ["copy"]})


def test_a_term_that_compares_responses_needs_two_prompts_a_step() -> None:
    one_prompt = {"rl.batch_size": 4, "rl.minibatch_size": 4, "rl.group_size": 4}
    assert recipe("own", {**one_prompt, "reward.terms": ["copy"]}).rl.prompts_per_step == 1
    with pytest.raises(InputError, match=r"rl\.batch_size = 4: leaves one prompt a step, so the term sameness"):
        recipe("own", {**one_prompt, "reward.terms": ["guarded"]})


def test_a_term_that_reads_the_primary_judge_is_refused() -> None:
    terms = ["classifier,source=a/judge@main,toxic_label=toxic"]
    with pytest.raises(InputError, match="is the reward's own classifier, which cannot judge independently"):
        recipe("own", {"reward.terms": terms, "evaluation.primary_judge": "a/judge"})


def test_sources_in_terms_are_sources_like_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "words.txt").write_text("clown\n")
    (tmp_path / "my.py").write_text("def score(prompts, responses): ...\n")
    terms = [
        "classifier,name=polite,source=a/polite,toxic_label=rude,good_label=civil,weight=2",
        "lexicon,source=words.txt",
        "function,source=my.py:score",
        "copy",
    ]
    config = recipe("own", {"reward.terms": terms})
    found = sources(config)
    assert found["reward.terms polite"] == "a/polite"
    assert "reward.classifier" not in found

    absolute = with_absolute_paths(config).reward.terms
    assert absolute[1:] == (f"lexicon,source={tmp_path}/words.txt", f"function,source={tmp_path}/my.py:score", "copy")

    pinned = map_sources(config, lambda setting, source: f"{source}@1234" if setting.endswith("polite") else source)
    polite = parse_term(pinned.reward.terms[0])
    assert (polite.source, polite.weight) == ("a/polite@1234", 2.0)
    toxic, good = term_labels(pinned, polite)
    assert toxic == {"reward.terms polite, toxic_label": "rude"}
    assert good == {"reward.terms polite, good_label": "civil"}


def test_a_stored_config_has_the_same_terms(tmp_path: Path) -> None:
    config = recipe("own", {"reward.terms": ["classifier", "copy,gate=0.8"]})
    stored = tmp_path / "config.json"
    stored.write_text(config_to_json(config))
    assert config_from_json(stored) == config
