"""Does a run with several terms train, measure and show each of them?"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import detoxrl
from detoxrl.commands import measure
from detoxrl.commands.preflight import check_locally
from detoxrl.commands.responses import without_likelihoods
from detoxrl.config.edit import config_from_json, with_settings
from detoxrl.config.recipes import recipe
from detoxrl.config.terms import parse_term, parse_terms
from detoxrl.data.rows import Row
from detoxrl.evaluation.compare import Measured
from detoxrl.models.types import Prompt
from detoxrl.rewards.function import function_of, is_given
from detoxrl.runs import Run, with_reward_name
from detoxrl.runtime.run_folder import RunFolder
from small_runs import detoxrl as command
from small_runs import make_place, own, without_timings

STOPS = '''
"""A reward that is interrupted at its seventh call, in the third rollout, while the file `stop` exists."""
import signal
from pathlib import Path

calls = []

def brevity(prompts, responses):
    calls.append(len(responses))
    if len(calls) == 7 and Path("stop").is_file():
        Path("stop").unlink()
        signal.raise_signal(signal.SIGINT)
    return [-len(text) / 10 for text in responses]
'''
TERMS = [
    "classifier,weight=2",
    "similarity,weight=0.5",
    "copy,gate=0.9",
    "function,name=brief,source=rewards.py:brevity",
    "sameness,weight=0.5",
]


@pytest.fixture
def place(tmp_path: Path, bases: dict[str, Path], reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return make_place(tmp_path, bases, reward_folder)


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_terms_are_trained_on_logged_measured_and_shown(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(own("--reward.terms", *TERMS)) == 0
    run = place / "runs/own"
    names = ["classifier", "similarity", "copy", "brief", "sameness"]
    assert list(json.loads((run / "normaliser.json").read_text())) == names
    for line in lines(run / "metrics.jsonl"):
        assert {f"score/{name}" for name in names} <= line.keys()
        assert 0 <= line["score/similarity"] <= 1

    found = json.loads((run / "eval.json").read_text())
    assert [term["name"] for term in found["reward_terms"]] == names
    assert {f"score/{name}" for name in names} <= found["quality"].keys()
    # The values are those of the measures of the same meaning.
    assert found["quality"]["score/copy"]["before"] == pytest.approx(found["quality"]["copied"]["before"])
    assert found["quality"]["score/similarity"]["after"] == pytest.approx(found["quality"]["similarity"]["after"])
    assert "reward classifier" in found["toxicity"]

    page = (run / "report.html").read_text().replace("&#39;", "'")
    assert "Terms of the reward" in page
    assert "share of word 4-grams copied from the row's text; weight 1, gate 0.900; lower is better" in page.replace(
        "&#39;", "'"
    )
    assert config_from_json(run / "config.json").reward.terms[0] == "classifier,weight=2"

    # What is measured of the same texts again does not depend on the order of measuring.
    assert command(["evaluate", "runs/own"]) == 0
    again = json.loads((run / "eval.json").read_text())
    assert again["quality"]["score"] == found["quality"]["score"]


def test_the_responses_of_a_policy_are_compared_with_each_other_and_read_once(place: Path) -> None:
    read: list[str] = []

    def length(prompts: list[str], responses: list[str]) -> list[float]:
        read.extend(responses)
        return [float(len(response)) for response in responses]

    config = with_reward_name(recipe("own", {"reward.terms": ["function", "sameness"]}), length)
    run = Run(RunFolder(place / "none"), config, reward=length)
    run.use_rows({"test": [Row(id="a", text="a"), Row(id="b", text="b")]})
    values = run.values()
    read.clear()  # What the function was tried with.

    prompts = [Prompt(id=name, text=name) for name in "abc"]
    assert values(list(zip(prompts, ["I see."] * 3, strict=True))).tolist() == [[6.0, 1.0]] * 3
    varied = list(zip(prompts, ["I see.", "Why?", "No."], strict=True))
    assert values(varied).tolist() == [[6.0, 0.0], [4.0, 0.0], [3.0, 0.0]]
    assert read == ["I see.", "I see.", "I see.", "Why?", "No."]


def test_what_compares_all_responses_has_the_spread_of_its_mean_and_no_value_in_parts() -> None:
    texts = ["I see.", "I see.", "Why?"]
    pairs = [(Prompt(id=name, text=name), text) for name, text in zip("abc", texts, strict=True)]
    values = torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64)
    spread = measure._with_spread_of_mean(parse_term("sameness"), values, pairs)
    assert spread.tolist() == pytest.approx([2 / 3, 2 / 3, -1 / 3])
    assert measure._with_spread_of_mean(parse_term("copy"), values, pairs).tolist() == values.tolist()

    column = np.array([[0.5], [0.5], [0.0]])
    measured = Measured({"judge": {"before": column}}, {"before": {"score/sameness": column, "length": column}}, {})
    samples = {"before": without_likelihoods([[text] for text in texts])}
    part = measure._part(samples, measured, np.array([True, False, True]), {"score/sameness"})
    assert set(part.metrics["before"]) == {"length", "expected_max_toxicity", "toxicity_probability"}
    assert part.metrics["before"]["length"].tolist() == [[0.5], [0.0]]


def test_a_stopped_run_with_several_terms_ends_as_if_it_had_never_stopped(place: Path) -> None:
    (place / "stops.py").write_text(STOPS)
    terms = ["function,source=stops.py:brevity", "similarity,weight=0.5", "sameness"]
    assert command(own("--reward.terms", *terms, "--run-dir", "whole")) == 0

    (place / "stop").touch()
    assert command(own("--reward.terms", *terms, "--run-dir", "parts")) == 130
    assert not (place / "parts/eval.json").exists()
    assert command(["run", "--resume", "--run-dir", "parts"]) == 0
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert without_timings(place / "whole" / name) == without_timings(place / "parts" / name)
    assert (place / "whole/normaliser.json").read_bytes() == (place / "parts/normaliser.json").read_bytes()


def test_functions_given_in_python_are_terms_by_their_names(place: Path) -> None:
    config = recipe("own", {"reward.terms": ["copy", "function,name=loud,weight=3"]})
    named = with_reward_name(config, {"loud": loud, "quiet": lambda prompts, responses: [0.0 for _ in responses]})
    terms = named.reward.measured_terms
    assert [(term.name, term.weight) for term in terms] == [("copy", 1.0), ("loud", 3.0), ("quiet", 1.0)]
    assert terms[1].source is not None
    with pytest.raises(detoxrl.InputError, match="reward = 'copy': has the name of a copy"):
        with_reward_name(config, {"copy": loud})


def loud(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(response.count("!")) for response in responses]


def test_one_function_serves_the_terms_without_a_source_of_their_own() -> None:
    terms = ["function", "function,name=brief,source=rewards.py:brevity", f"function,name=same,source={__file__}:loud"]
    with_source = [function_of(term, loud) for term in parse_terms(terms)]
    assert with_source == [loud, None, loud]
    assert [function_of(term, {"brief": loud}) for term in parse_terms(terms)] == [None, loud, None]
    assert function_of(parse_terms(terms)[0], None) is None


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (["fluency"], "reward.terms = 'fluency': begins with fluency, which is no kind of term"),
        (["function"], "reward.terms = 'function': has the term function, and no function is named"),
        (["classifier,source=nowhere,toxic_label=toxic"], "reward.terms classifier = 'nowhere'"),
        (["function,source=rewards.py:missing"], "rewards.py defines no function missing"),
        (["classifier,source=classifier,toxic_label=rude"], "is not a label of the classifier"),
    ],
)
def test_a_term_that_does_not_fit_is_one_line_and_writes_nothing(
    place: Path, capfd: pytest.CaptureFixture[str], terms: list[str], message: str
) -> None:
    assert command(own("--reward.terms", *terms)) == 2
    shown = " ".join(capfd.readouterr().err.split())
    assert message in shown
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("term", "message"),
    [
        ("lexicon,source=no_words.txt", "no_words.txt': contains no words"),
        (
            "classifier,name=second,source=classifier,toxic_label=nothate",
            "reward.terms second, toxic_label = 'nothate': is reversed",
        ),
        (
            "classifier,name=second,source=classifier,good_label=hate",
            "reward.terms second, good_label = 'hate': is reversed",
        ),
    ],
)
def test_a_term_beside_a_classifier_that_is_yet_to_be_trained_is_tried_before_anything_is_written(
    place: Path, capfd: pytest.CaptureFixture[str], term: str, message: str
) -> None:
    (place / "no_words.txt").write_text("# none\n")
    assert command(own("--reward.classifier", "embedded", "--reward.terms", "classifier", term)) == 2
    assert message in " ".join(capfd.readouterr().err.split())
    assert not (place / "runs").exists()


def test_beside_a_function_given_in_python_the_other_terms_are_checked(place: Path) -> None:
    config = recipe(
        "own", {"policy.base": "model", "data.source": "mine.jsonl", "reward.terms": ["lexicon,source=no.txt"]}
    )
    named = with_reward_name(config, {"loud": loud})
    with pytest.raises(detoxrl.InputError, match=r"there is no file .*no\.txt"):
        check_locally(named, partial(is_given, functions={"loud": loud}))

    given = with_reward_name(
        with_settings(config, {"reward.terms": ["copy"]}), {"quiet": lambda prompts, responses: []}
    )
    check_locally(given, partial(is_given, functions={"quiet": loud}))
    with pytest.raises(detoxrl.InputError, match="was passed in Python"):
        check_locally(given)


def test_the_doctor_tries_a_similarity(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(["doctor", *own("--reward.terms", "classifier", "similarity")[1:]]) == 0
    assert "ready: detoxrl run own" in capsys.readouterr().out
