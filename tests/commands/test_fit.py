"""`detoxrl fit` from the command line to a judge and a reward: what it makes, says, resumes and refuses."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import detoxrl as package
from detoxrl.commands.fit import resume_fit
from detoxrl.commands.preflight import check_locally
from detoxrl.config.recipes import recipe
from detoxrl.errors import InputError
from detoxrl.rewards import fitting
from detoxrl.rewards.classifier import CIVIL_PROBE, TOXIC_PROBE, load_classifier
from encoders import labelled_rows, make_encoder, pair_rows, write_rows
from small_runs import contents, detoxrl

CPU = torch.device("cpu")
RUDE = "You are a stupid idiot."
CIVIL = "Thank you, that is fine."
FAST = ["--encoder", "encoder", "--lr", "3e-3", "--batch-size", "16", "--max-length", "64"]


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an encoder, labelled texts and pairs."""
    root = tmp_path_factory.mktemp("studio")
    make_encoder("bert", root / "encoder")
    write_rows(root / "texts.jsonl", labelled_rows(600))
    write_rows(root / "pairs.jsonl", pair_rows(300))
    return root


@pytest.fixture(autouse=True)
def _there(studio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(studio)
    monkeypatch.setenv("COLUMNS", "200")


def fit(capsys: pytest.CaptureFixture[str], *words: str) -> list[str]:
    """Fit, and return the lines on stdout."""
    assert detoxrl(["fit", *words]) == 0, capsys.readouterr().err
    return capsys.readouterr().out.splitlines()


def result_of(folder: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(folder, "fit.json").read_text())
    return result


def judged(capsys: pytest.CaptureFixture[str], judge: str, *texts: str) -> list[float]:
    assert detoxrl(["score", "--jsonl", *texts, "--judge", judge]) == 0
    lines = map(json.loads, capsys.readouterr().out.splitlines())
    return [line[judge.partition("=")[0]] for line in lines]


@pytest.fixture(scope="module")
def judge(studio: Path) -> dict[str, Any]:
    """A classifier with all weights, fitted in Python: the content of its fit.json."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(studio)
        settings = {
            "label_columns": "rude", "encoder": "encoder", "lr": 3e-3, "epochs": 4, "batch_size": 16,
            "max_length": 64, "group_column": "who",
        }  # fmt: skip
        return package.fit("texts.jsonl", "judge", settings)


def test_a_fitted_classifier_is_an_ordinary_folder_with_a_card(judge: dict[str, Any], studio: Path) -> None:
    names = {path.name for path in Path("judge").iterdir()}
    files = {"README.md", "config.json", "fit.json", "model.safetensors", "reliability.svg"}
    assert names == files | {"tokenizer.json", "tokenizer_config.json"}
    assert not Path("judge.unfinished").exists()
    assert result_of("judge") == json.loads(json.dumps(judge))
    assert judge["test"]["labels"]["rude"]["metrics"]["auc"]["value"] > 0.95
    assert judge["examples"]["train"] + judge["examples"]["validation"] + judge["examples"]["test"] <= 600
    assert judge["test"]["groups"]["rude"].keys() == {"a", "b"}
    drawing = ElementTree.parse("judge/reliability.svg").getroot()
    assert drawing.tag == "{http://www.w3.org/2000/svg}svg"

    card = Path("judge/README.md").read_text()
    assert str(studio) not in card + Path("judge/fit.json").read_text()
    assert not any(row["text"] in card for row in labelled_rows(600))
    assert "| a | " in card
    assert "detoxrl run own --reward.classifier judge --reward.toxic-label rude --reward.good-label none" in card


def test_transformers_alone_gives_the_calibrated_probability(
    judge: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained("judge").eval()
    tokenizer = AutoTokenizer.from_pretrained("judge")
    assert tokenizer.model_max_length == 64
    with torch.no_grad():
        logits = model(**tokenizer([RUDE, CIVIL], padding=True, return_tensors="pt")).logits[:, 0]
    rude, civil = judged(capsys, "judge=rude", RUDE, CIVIL)
    assert [rude, civil] == pytest.approx(logits.sigmoid().tolist(), abs=1e-5)
    assert rude > 0.8 > 0.2 > civil
    assert judge["calibration"]["method"] == "temperature"


def test_calibration_is_learnt_on_the_validation_texts_and_part_of_the_weights(
    judge: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["texts.jsonl", *FAST, "--label-columns", "rude", "--epochs", "4", "--calibration"]
    fit(capsys, *words, "none", "--out", "plain")
    fit(capsys, *words, "isotonic", "--out", "isotonic")
    temperature, bias = judge["calibration"]["temperature"][0], judge["calibration"]["bias"][0]
    labels = {"reward.toxic_label": "rude"}
    plain, scaled, isotonic = (
        load_classifier(name, "reward.classifier", labels, CPU) for name in ("plain", "judge", "isotonic")
    )
    texts = [RUDE, CIVIL, "Fine."]
    expected = plain.logits(texts) / temperature + bias
    torch.testing.assert_close(scaled.logits(texts), expected, rtol=1e-4, atol=1e-4)

    # Knots change what a judge says, and leave the logits that a reward reads.
    torch.testing.assert_close(isotonic.logits(texts), plain.logits(texts))
    torch.testing.assert_close(isotonic.score(["", ""], texts[:2]), -plain.logits(texts[:2])[:, 0])
    knots = json.loads(Path("isotonic/calibration.json").read_text())["knots"]["rude"]
    levels = torch.tensor(knots["probability"], dtype=torch.float32)
    probabilities = isotonic.toxicity(texts)
    assert float(probabilities.min()) >= float(levels.min())
    assert float(probabilities.max()) <= float(levels.max())
    assert not torch.allclose(probabilities, plain.toxicity(texts))
    assert judged(capsys, "isotonic=rude", *texts) == pytest.approx(probabilities.tolist(), abs=1e-6)
    card = Path("isotonic/README.md").read_text()
    assert "transformers alone does not" in card
    assert detoxrl(["fit", *words, "none", "--out", "plain"]) == 2
    assert "--out = 'plain': already exists; add --overwrite" in capsys.readouterr().err


def test_a_lora_of_several_scores_is_a_judge_and_a_reward(capsys: pytest.CaptureFixture[str], studio: Path) -> None:
    words = ["texts.jsonl", "--out", "lora", "--label-columns", "score", "rude", "--labels", "toxicity", "insult"]
    lines = fit(capsys, *words, *FAST, "--lora-rank", "4", "--epochs", "1")
    assert len(lines) == 3
    assert re.fullmatch(r"Fitted to \d+ texts \(best of step \d+\)\. Mean AUC of 2 labels .* test texts\.", lines[0])
    assert lines[1].startswith("LoRA adapter: lora; read lora/README.md")
    assert lines[2].startswith(
        'next: detoxrl score "You are an idiot" --judge lora=toxicity; with the label that means'
    )
    assert lines[2].endswith("--reward.classifier lora --reward.toxic-label LABEL --reward.good-label none")
    assert result_of("lora")["meaning"]["toxic_label"] is None
    assert "Put the label that means toxic text in place of LABEL" in Path("lora/README.md").read_text()

    settings = json.loads(Path("lora/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(studio / "encoder")
    base = AutoModelForSequenceClassification.from_pretrained("encoder", config=AutoConfig.from_pretrained("lora"))
    model = PeftModel.from_pretrained(base, "lora").eval()
    tokenizer = AutoTokenizer.from_pretrained("lora")
    with torch.no_grad():
        probabilities = model(**tokenizer([RUDE], return_tensors="pt")).logits.sigmoid()[0]
    assert judged(capsys, "lora=toxicity", RUDE) == pytest.approx([float(probabilities[0])], abs=1e-5)
    assert judged(capsys, "lora=insult", RUDE) == pytest.approx([float(probabilities[1])], abs=1e-5)

    reward = {"reward.classifier": "lora", "reward.toxic_label": "insult", "reward.good_label": None}
    copytree("lora", "lora-judge")  # A reward's own classifier is no judge.
    judge = {"evaluation.primary_judge": "lora-judge", "evaluation.judge_label": "toxicity"}
    data = {"data.source": "mine.jsonl", "policy.base": "scratch", "sft.steps": 5}
    write_rows(Path("mine.jsonl"), [{"dialogue": "a b c", "summary": "x"}, {"dialogue": "d e f", "summary": "y"}])
    check_locally(recipe("own", {**data, **reward, **judge}))
    for change, message in (
        ({"evaluation.judge_label": "rude"}, r"evaluation\.judge_label = 'rude': .* use one of toxicity, insult"),
        ({"reward.toxic_label": None}, r"reward\.toxic_label = None: leaves no label to read"),
    ):
        with pytest.raises(InputError, match=message):
            check_locally(recipe("own", {**data, **reward, **judge, **change}))

    Path("encoder").rename("moved")
    try:
        with pytest.raises(InputError, match=r"encoder': is neither an existing path nor a hub id"):
            check_locally(recipe("own", {**data, **reward, **judge}))
    finally:
        Path("moved").rename("encoder")


def test_a_scorer_of_pairs_is_a_reward_by_its_score(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["pairs.jsonl", "--out", "scorer", "--chosen-column", "better", "--rejected-column", "worse", *FAST]
    lines = fit(capsys, *words, "--epochs", "6")
    assert re.match(r"Fitted to \d+ pairs .*The chosen text has the higher score in \d+% of \d+ test pairs", lines[0])
    assert lines[2].endswith("--reward.classifier scorer --reward.good-label score --reward.toxic-label none")
    assert AutoConfig.from_pretrained("scorer").num_labels == 1

    scorer = load_classifier("scorer", "reward.classifier", {}, CPU, {"reward.good_label": "score"})
    assert (scorer.good, scorer.toxic) == (0, None)
    scores = scorer.score(["", ""], [CIVIL, RUDE])
    assert torch.equal(scores, scorer.logits([CIVIL, RUDE])[:, 0])
    assert scores[0] > scores[1] + 1
    torch.testing.assert_close(scorer.toxicity([CIVIL]), 1 - scores[:1].sigmoid())
    # The temperature makes the difference of two scores the log-odds of the better one.
    pairs = result_of("scorer")["test"]["pairs"]
    assert pairs["accuracy"]["value"] > 0.9
    assert pairs["cross_entropy"] < 0.4


def test_thumbs_and_classes_are_labels(capsys: pytest.CaptureFixture[str]) -> None:
    rows = labelled_rows(260)
    thumbs = [{"reply": row["text"], "thumb": "👎" if row["rude"] else "👍"} for row in rows]
    write_rows(Path("thumbs.jsonl"), thumbs)
    few = [*FAST, "--epochs", "1"]
    words = ["thumbs.jsonl", "--out", "liked", "--text-column", "reply", "--label-columns", "thumb"]
    fit(capsys, *words, *few)
    assert result_of("liked")["labels"] == ["thumb"]
    assert judged(capsys, "liked=thumb", RUDE)[0] < 1

    lines = fit(capsys, "texts.jsonl", "--out", "tone", "--label-columns", "tone", *FAST, "--epochs", "4")
    assert lines[0].count("accuracy") + lines[0].count("Accuracy") == 1
    assert lines[2].startswith('next: detoxrl score "You are an idiot" --judge tone=rude; detoxrl run own')
    flags = "--reward.classifier tone --reward.toxic-label rude --reward.good-label civil"
    assert lines[2].endswith(flags)
    card = Path("tone/README.md").read_text()
    assert f"detoxrl run own {flags}" in card
    assert '--judge "tone=rude"' in card
    seen = result_of("tone")["meaning"]["probabilities"]["rude"]
    read = load_classifier(
        "tone", "reward.classifier", {"reward.toxic_label": "rude", "reward.good_label": "civil"}, CPU
    )
    assert [seen["civil"], seen["toxic"]] == pytest.approx(read.toxicity([CIVIL_PROBE, TOXIC_PROBE]).tolist(), abs=1e-4)
    assert f"The probability of rude is {seen['civil']:.3f} for a civil sentence" in card
    assert AutoConfig.from_pretrained("tone").id2label == {0: "civil", 1: "rude"}
    assert judged(capsys, "tone=rude", RUDE) == pytest.approx(read.toxicity([RUDE]).tolist(), abs=1e-5)

    # A label that falls on toxic text means civil text: no judge of toxicity, but a reward.
    polite = [{"text": row["text"], "liked": 1 - row["rude"]} for row in labelled_rows(600)]
    write_rows(Path("polite.jsonl"), polite)
    lines = fit(capsys, "polite.jsonl", "--out", "likes", "--label-columns", "liked", *FAST, "--epochs", "4")
    flags = "--reward.classifier likes --reward.good-label liked --reward.toxic-label none"
    assert lines[2] == f"next: detoxrl run own --data.source my.jsonl {flags}"
    card = Path("likes/README.md").read_text()
    assert flags in card
    assert "--judge" not in card


@pytest.mark.parametrize("rank", ["none", "4"])
def test_a_fit_that_was_stopped_resumes_to_the_same_bytes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rank: str
) -> None:
    Path(tmp_path, "encoder").symlink_to(Path("encoder").resolve())
    monkeypatch.chdir(tmp_path)
    write_rows(Path("texts.jsonl"), labelled_rows(160))
    words = ["texts.jsonl", "--label-columns", "score", *FAST, "--lora-rank", rank, "--epochs", "2"]
    words += ["--validate-every", "7", "--patience", "9", "--overwrite", "--out"]
    fit(capsys, *words, "whole")
    expected = contents(Path("whole"))
    fit(capsys, *words, "parts")
    earlier = contents(Path("parts"))

    rate = fitting._learning_rate

    def stop_at(steps: list[int], step: int, planned: int, config: Any) -> float:
        if steps and step == steps[0]:
            steps.pop(0)
            signal.raise_signal(signal.SIGINT)
        return rate(step, planned, config)

    stops = [10, 3]  # Of the first fit and of the second one.
    monkeypatch.setattr(fitting, "_learning_rate", lambda *given: stop_at(stops, *given))
    assert detoxrl(["fit", *words, "parts", "--seed", "0"]) == 130
    message = "parts.unfinished keeps its state; resume with `detoxrl fit --resume --out parts`"
    assert message in capsys.readouterr().err
    # What there was stays until the new one is complete.
    assert contents(Path("parts")) == earlier
    assert detoxrl(["fit", *[word for word in words if word != "--overwrite"], "new", "--seed", "1"]) == 130
    capsys.readouterr()
    assert detoxrl(["fit", *[word for word in words if word != "--overwrite"], "new"]) == 2
    assert "--out = 'new': has an unfinished fit; run `detoxrl fit --resume --out new`" in capsys.readouterr().err

    fit(capsys, "--resume", "--out", "parts")
    same = contents(Path("parts"))
    card = Path("README.md")
    assert same[card].replace(b"# parts", b"# whole").replace(b"parts", b"whole") == expected[card]
    assert {name: data for name, data in same.items() if name != card} == {
        name: data for name, data in expected.items() if name != card
    }
    assert not Path("parts.unfinished").exists()

    with pytest.raises(InputError, match="has no unfinished fit; leave --resume out"):
        resume_fit("parts")
    write_rows(Path("texts.jsonl"), [*labelled_rows(160), {"text": "one more", "score": 0.2}])
    with pytest.raises(InputError, match="has changed since the fit was stopped"):
        resume_fit("new")
    write_rows(Path("texts.jsonl"), labelled_rows(160))
    # Another fit in its place starts anew.
    fit(capsys, *words, "new")
    assert {name: data for name, data in contents(Path("new")).items() if name != card} == {
        name: data for name, data in expected.items() if name != card
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "new"], "SOURCE = '': is missing; run `detoxrl fit SOURCE --out FOLDER`"),
        (["texts.jsonl"], "--out = '': is missing; name the folder to create"),
        (["none.jsonl", "--out", "new"], "source = 'none.jsonl': is neither an existing path nor a hub id"),
        (["text.jsonl", "--out", "new"], "did you mean texts.jsonl?"),
        (["empty", "--out", "new"], "source = 'empty': has no data file; add"),
        (["texts.jsonl", "--out", "encoder"], "--out = 'encoder': already exists and is not a fitted classifier"),
        (["texts.jsonl", "--out", "texts.jsonl/x"], "--out = 'texts.jsonl/x': cannot be created"),
        (["texts.jsonl", "--out", "new", "--label-columns", "toxic"], "label_columns = 'toxic': is not a column of te"),
        (["texts.jsonl", "--out", "new", "--encoder", "nowhere/x/y"], "encoder = 'nowhere/x/y': is neither an exist"),
        (["texts.jsonl", "--out", "new", "--encoder", "empty"], "encoder = 'empty': holds no config.json"),
        (["texts.jsonl", "--out", "new", "--encoder", "texts.jsonl"], "encoder = 'texts.jsonl': is a file"),
        (["texts.jsonl", "--out", "new", "--encoder", "some/model"], "encoder = 'some/model': is not a local path and"),
        (["texts.jsonl", "--out", "new", "--lr", "-1"], "lr = -1.0: must be above 0"),
        (["texts.jsonl", "--out", "new", "--label-column", "x"], "flag = '--label-column': is not known to `detoxrl"),
        (["--resume", "--out", "new"], "--out = 'new': has no unfinished fit"),
        (["--resume", "--out", "new", "--lr", "1"], "--resume = True: keeps the settings of the stopped fit"),
        (["--resume", "--out", "new", "--seed", "1"], "--resume = True: keeps the settings of the stopped fit"),
        (["texts.jsonl", "--resume", "--out", "new"], "--resume = True: keeps the settings of the stopped fit"),
        (["few.jsonl", "--out", "new"], "source = 'few.jsonl': leaves 3 examples for validation, and at least 5 are"),
    ],
)
def test_bad_input_is_one_line_before_torch_is_imported_and_writes_nothing(
    capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    Path("empty").mkdir(exist_ok=True)
    write_rows(Path("few.jsonl"), [{"text": f"a{n} b{n} c{n}", "label": n % 2} for n in range(30)])
    if "--label-columns" not in words and "--resume" not in words:
        words = [*words, "--label-columns", "label" if "few.jsonl" in words else "rude"]
    if "--encoder" not in words and "--resume" not in words:
        words = [*words, "--encoder", "encoder"]
    before = {path for path in Path(".").rglob("*")}
    assert detoxrl(["fit", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert {path for path in Path(".").rglob("*")} == before


def test_labels_are_checked_without_torch() -> None:
    code = (
        "import sys\n"
        "from detoxrl import cli\n"
        "try:\n"
        "    cli.main(sys.argv[1:])\n"
        "except SystemExit as end:\n"
        "    assert end.code == 2\n"
        "assert not {'torch', 'transformers', 'peft'} & set(sys.modules)\n"
    )
    words = ["fit", "texts.jsonl", "--out", "new", "--label-columns", "who", "rude", "--encoder", "encoder"]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "label_columns = 'who': contains 'a' in row 1 of file, and labels lie in [0, 1]" in run.stderr


SMALL_FIT = ["texts.jsonl", "--label-columns", "rude", *FAST, "--epochs", "1"]


def stopped_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, out: str, *words: str
) -> dict[Path, bytes]:
    """Stop a fit after a step, and return the state that it leaves."""
    with monkeypatch.context() as patch:
        rate = fitting._learning_rate

        def stop(step: int, planned: int, config: Any) -> float:
            if step == 1:
                signal.raise_signal(signal.SIGINT)
            return rate(step, planned, config)

        patch.setattr(fitting, "_learning_rate", stop)
        assert detoxrl(["fit", *SMALL_FIT, "--out", out, *words]) == 130
    capsys.readouterr()
    return contents(Path(f"{out}.unfinished"))


@pytest.fixture
def small(tmp_path: Path, studio: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of its own with an encoder and few texts."""
    copytree(studio / "encoder", tmp_path / "encoder")
    write_rows(tmp_path / "texts.jsonl", labelled_rows(160))
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("small")
def test_a_folder_that_was_made_after_the_fit_began_is_never_replaced(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_fit(capsys, monkeypatch, "judge")
    state = contents(Path("judge.unfinished"))
    Path("judge").mkdir()
    Path("judge/notes.txt").write_text("mine")
    remedy = "move it away and run `detoxrl fit --resume --out judge`; the fit keeps its state"
    assert detoxrl(["fit", "--resume", "--out", "judge"]) == 2
    assert f"--out = 'judge': already exists and is not a fitted classifier; {remedy}" in capsys.readouterr().err
    assert contents(Path("judge.unfinished")) == state

    # A folder may also appear while the fit trains.
    Path("judge").rename("aside")
    total = fitting.fit_classifier

    def train(*given: Any) -> Any:
        trained = total(*given)
        Path("aside").rename("judge")
        return trained

    with monkeypatch.context() as patch:
        patch.setattr("detoxrl.commands.fit.fit_classifier", train)
        assert detoxrl(["fit", "--resume", "--out", "judge"]) == 2
    assert remedy in capsys.readouterr().err
    assert [path.name for path in Path("judge").iterdir()] == ["notes.txt"]
    assert not list(Path().glob(".judge*"))

    Path("judge").rename("aside")
    fit(capsys, "--resume", "--out", "judge")
    assert not Path("judge.unfinished").exists()


@pytest.mark.usefixtures("small")
def test_neither_encoder_nor_source_is_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    Path("encoder/fit.json").write_text("{}")
    write_rows(Path("encoder/inside.jsonl"), labelled_rows(160))
    copytree("encoder", "encoder/deeper")
    before = contents(Path())
    rest = ["--label-columns", "rude", "--overwrite", "--out", "encoder"]
    other = ["--encoder", "encoder/deeper"]
    for words, message in (
        (["texts.jsonl", "--encoder", "./encoder", "--lora-rank", "4"], "would replace encoder = './encoder'; name"),
        (["texts.jsonl", *other], "would replace encoder = 'encoder/deeper'"),
    ):
        assert detoxrl(["fit", *words, *rest]) == 2
        assert f"--out = 'encoder': {message}" in capsys.readouterr().err
    Path("encoder/deeper").rename("other")
    assert detoxrl(["fit", "encoder/inside.jsonl", "--encoder", "other", *rest]) == 2
    assert "--out = 'encoder': would replace source = 'encoder/inside.jsonl'" in capsys.readouterr().err
    Path("other").rename("encoder/deeper")
    assert contents(Path()) == before


@pytest.mark.usefixtures("small")
def test_an_old_state_is_kept_until_the_new_encoder_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    state = stopped_fit(capsys, monkeypatch, "judge")
    config = json.loads(Path("encoder/config.json").read_text())
    folder = make_encoder("bert", Path("broken"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5", "architectures": ["T5"]}))
    assert detoxrl(["fit", *SMALL_FIT, "--encoder", "broken", "--out", "judge", "--overwrite"]) == 2
    assert "encoder = 'broken': " in capsys.readouterr().err
    assert contents(Path("judge.unfinished")) == state

    # A setting that this version knows and the one that began did not.
    path = Path("judge.unfinished/settings.json")
    stored = json.loads(path.read_text())
    del stored["settings"]["balance"]
    path.write_text(json.dumps(stored))
    state = contents(Path("judge.unfinished"))
    assert detoxrl(["fit", "--resume", "--out", "judge"]) == 2
    assert "--out = 'judge': has an unfinished fit whose settings.json has other settings" in capsys.readouterr().err
    assert contents(Path("judge.unfinished")) == state


@pytest.mark.usefixtures("small")
def test_what_a_killed_fit_left_beside_its_folder_is_removed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_fit(capsys, monkeypatch, "judge")
    for name in (".judge.new123", ".judge.gone123", ".judged.new123"):
        Path(name).mkdir()
        Path(name, "model.safetensors").write_text("half")
    fit(capsys, "--resume", "--out", "judge")
    assert [path.name for path in Path().glob(".*")] == [".judged.new123"]


def test_an_encoder_that_does_not_fit_leaves_nothing_behind(capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads(Path("encoder/config.json").read_text())
    folder = make_encoder("bert", Path("broken"))
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "t5", "architectures": ["T5"]}))
    words = ["texts.jsonl", "--out", "new", "--label-columns", "rude", "--encoder", "broken"]
    assert detoxrl(["fit", *words]) == 2
    assert "encoder = 'broken': " in capsys.readouterr().err
    assert not Path("new").exists()
    assert not Path("new.unfinished").exists()
