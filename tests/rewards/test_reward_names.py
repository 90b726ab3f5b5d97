"""Labels and functions are known to exist before a model is loaded or a user's file is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from detoxrl.config.schema import RewardConfig
from detoxrl.errors import InputError
from detoxrl.rewards import fit
from detoxrl.rewards.function import load_function
from detoxrl.rewards.names import EMBEDDED_LABELS, require_embedded_labels, require_function, require_labels

ID2LABEL = {"0": "nothate", "1": "Hate"}
FILE = """
import neighbour_that_does_not_exist

def score(prompts, responses):
    return [0.0 for _ in responses]

table = {"made": score}
"""


def test_the_labels_of_the_embedded_classifier_are_those_that_it_is_trained_with_and_the_default() -> None:
    good, toxic = fit.LABELS
    assert {"reward.toxic_label": toxic, "reward.good_label": good} == EMBEDDED_LABELS
    defaults = RewardConfig()
    require_embedded_labels({"reward.toxic_label": defaults.toxic_label, "reward.good_label": str(defaults.good_label)})
    with pytest.raises(InputError, match=r"reward\.toxic_label = 'rude': is not a label of the embedded .*use hate"):
        require_embedded_labels({"reward.toxic_label": "rude"})


def test_labels_have_to_exist_and_to_differ_whatever_their_case() -> None:
    require_labels(ID2LABEL, {"reward.toxic_label": "HATE", "reward.good_label": "nothate"})
    with pytest.raises(InputError, match=r"reward\.good_label = 'civil': is not a label .*use one of nothate, hate"):
        require_labels(ID2LABEL, {"reward.toxic_label": "hate", "reward.good_label": "civil"})
    with pytest.raises(InputError, match=r"reward\.good_label = 'Hate': is the label of reward\.toxic_label too"):
        require_labels(ID2LABEL, {"reward.toxic_label": "hate", "reward.good_label": "Hate"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py:scroe", r"mine\.py defines no function scroe; did you mean score\?"),
        ("mine.py:reward", r"mine\.py defines no function reward; choose from score"),
        ("nine.py:score", r"there is no file nine\.py; give the path of a Python file"),
        ("torn.py:score", r"line 1 is not valid Python: "),
        ("mine.py", "does not name a function; write FILE.py:NAME"),
        ("nowhere.at.all:score", r"there is no module nowhere\.at\.all"),
        (":score", "does not name a function"),
        ("./mine:score", r"there is no module \./mine; write FILE\.py:NAME"),
        ("given in Python:partial", "was passed in Python"),
    ],
)
def test_a_function_that_cannot_exist_is_refused_without_running_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE)
    Path("torn.py").write_text("def score(:\n")
    with pytest.raises(InputError, match=rf"^reward\.function = .*: {message}"):
        require_function(name)


def test_what_only_running_a_file_can_tell_is_left_to_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(FILE)
    Path("all.py").write_text("from os.path import *\n")
    Path("late.py").write_text("globals()['made'] = len\n# unmade\n")
    for name in ("mine.py:score", "mine.py:table", "all.py:basename", "all.py:nothing", "late.py:made", "math:sqrt"):
        require_function(name)
    assert load_function("late.py:made") is len
    with pytest.raises(InputError, match="defines no function unmade"):
        load_function("late.py:unmade")
