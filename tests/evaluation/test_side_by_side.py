"""Policies and texts compared side by side, through the command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest

from conftest import disturb, policy_config
from detoxrl.models.loading import load_base, save_base
from detoxrl.models.lora import load_policy
from small_runs import SMALL, detoxrl, own

JUDGE = "alt-profanity-check"


def write(name: str, responses: list[str], **columns: Any) -> None:
    """A file of texts: one row a response, with other columns beside it."""
    rows = [
        {"response": text} | {key: values[i] for key, values in columns.items()} for i, text in enumerate(responses)
    ]
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def result(root: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(root, "eval.json").read_text())
    return found


RUDE = [f"Number {i} is an idiot and a fool." for i in range(30)]
CIVIL = [f"Number {i} is a friend of mine." for i in range(30)]


def test_texts_are_compared_row_by_row_with_the_first_file(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("rude.jsonl", RUDE, id=[*range(30)], dialogue=["We talk."] * 30, summary=CIVIL)
    write("civil.jsonl", CIVIL[::-1], id=[*range(30)][::-1])
    Path("plain.txt").write_text("\u2028 \n".join(RUDE))  # \u2028 ends no line
    words = ["--run-dir", "runs/t", "--evaluation.other-judges", "classifier=hate"]
    assert detoxrl(["evaluate", "--texts", "old=rude.jsonl", "new=civil.jsonl", *words]) == 0
    shown = capsys.readouterr().out
    assert "new is less toxic than old: 0.0" in shown
    found = result("runs/t")
    assert found["names"] == {"before": "old", "after": "new"}
    assert found["toxicity"][JUDGE]["verdict"] == "less toxic"
    assert found["quality"]["rouge_l"]["after"] == 1.0  # matched by id, though the rows come in another order
    assert [*found["toxicity"]] == [JUDGE, "classifier"]
    assert 0 <= found["agreement"][f"{JUDGE} and classifier"]["same_side"] <= 1
    filtered = found["baselines"]["word_filter"]
    assert filtered["toxicity"][JUDGE]["after"]["mean"] < found["toxicity"][JUDGE]["before"]["mean"] / 2
    assert "score" not in found["quality"]
    page = Path("runs/t/report.html").read_text()
    assert "Before is old, after is new." in page
    assert "detoxrl evaluate quickstart --seed 0" in page
    Path("runs/t/kept.jsonl").write_text(Path("rude.jsonl").read_text())
    asked = ["evaluate", "--texts", "runs/t/kept.jsonl", "--run-dir", "runs/t", "--overwrite"]
    assert detoxrl(asked) == 2
    assert "holds runs/t/kept.jsonl, which the run needs" in capsys.readouterr().err
    assert Path("runs/t/kept.jsonl").is_file()
    # A single file stands beside its summaries, and plain lines beside others of the same number.
    assert detoxrl(["evaluate", "--texts", "rude.jsonl", "--run-dir", "runs/one"]) == 0
    assert result("runs/one")["names"] == {"before": "its references", "after": "rude.jsonl"}
    assert result("runs/one")["toxicity"][JUDGE]["verdict"] == "more toxic"
    write("bare.jsonl", RUDE, id=[*range(30)], dialogue=["We talk."] * 30)
    assert detoxrl(["evaluate", "own", "--texts", "bare.jsonl", "civil.jsonl", "--run-dir", "runs/bare"]) == 0
    assert "chrf" not in result("runs/bare")["quality"]
    assert "compared.csv" not in capsys.readouterr().out
    assert detoxrl(["evaluate", "--texts", "a=plain.txt", "b=plain.txt", "--run-dir", "runs/plain"]) == 0
    assert result("runs/plain")["toxicity"][JUDGE]["verdict"] == "no detectable difference"
    assert "smallest change detectable" not in Path("runs/plain/report.html").read_text()  # no spread, no estimate
    assert result("runs/plain")["quality"].keys().isdisjoint({"copied", "similarity"})


def test_an_encoder_an_nli_model_and_a_fluency_classifier_are_read_where_they_are_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, texts in (("rude.jsonl", RUDE), ("civil.jsonl", CIVIL)):
        write(name, texts, dialogue=[f"We talk {i // 2}." for i in range(30)])
    copytree("classifier", "nli")
    config = json.loads(Path("nli/config.json").read_text())
    Path("nli/config.json").write_text(json.dumps(config | {"id2label": {"0": "neutral", "1": "entailment"}}))
    words = ["evaluate", "--texts", "a=rude.jsonl", "b=civil.jsonl", "--evaluation.fluency", "nli=neutral"]
    assert detoxrl([*words, "--evaluation.nli", "nli"]) == 0
    shown, found = capsys.readouterr().out, result("runs/texts")["quality"]
    assert "Civil, similar" in shown
    assert "Entailed by the prompt: " in shown.splitlines()[-2]  # stands in for quality
    assert "not measured" not in shown
    assert found["entailment"]["after"] + found["fluency"]["after"] == pytest.approx(1, abs=1e-3)  # the two labels
    assert found["joint"]["before"] == 0.0  # nothing rude is civil
    assert found["joint"]["after"] == pytest.approx(found["similarity"]["after"])
    settings = json.loads(Path("runs/texts/config.json").read_text())["evaluation"]
    assert settings["fluency"] == f"{Path('nli').resolve()}=neutral"
    assert detoxrl([*words, "--evaluation.encoder", "classifier", "--overwrite"]) == 0
    # To a model that knows nothing but toxicity, texts are alike or opposite.
    assert (result("runs/texts")["quality"]["similarity"]["before"]) == pytest.approx(1, abs=1e-3)
    assert (result("runs/texts")["quality"]["similarity"]["after"]) == pytest.approx(0, abs=1e-3)


def test_a_file_of_several_samples_stands_beside_one_of_one_and_half_an_emoji_breaks_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write("many.jsonl", ["ok \ud83d", *RUDE[1:]], id=[i // 3 for i in range(30)], summary=CIVIL)
    Path("a=b").mkdir()
    write("a=b/one.jsonl", CIVIL[:10], id=[*range(10)])
    assert detoxrl(["evaluate", "--texts", "many.jsonl", "--run-dir", "runs/own"]) == 0
    found = result("runs/own")
    assert found["names"] == {"before": "its references", "after": "many.jsonl"}
    assert found["baselines"]["word_filter"]["after"]["quality_by"] == "share with text"
    assert "rouge_l" not in found["quality"]  # the summaries are what is compared with
    words = ["one=a=b/one.jsonl", "many.jsonl", "--evaluation.other-judges", "classifier=hate"]
    assert detoxrl(["evaluate", "--texts", *words, "--run-dir", "runs/both"]) == 0
    assert "distinct_1" not in result("runs/both")["quality"]
    assert "not independent" not in capsys.readouterr().out


def test_rows_of_one_id_are_samples_of_one_prompt(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write("a.jsonl", [(RUDE if i % 2 else CIVIL)[i] for i in range(30)], id=[i // 3 for i in range(30)])
    write("b.jsonl", [*CIVIL[:27], *RUDE[27:]], id=[i // 3 for i in range(30)])
    assert detoxrl(["evaluate", "--texts", "a=a.jsonl", "b=b.jsonl"]) == 0
    found = result("runs/texts")
    assert (found["n_prompts"], found["samples_per_prompt"]) == (10, 3)
    assert found["toxicity"][JUDGE]["after"]["toxicity_probability"] == pytest.approx(0.1)
    assert detoxrl(["evaluate", "runs/texts", "--power", "0.5"]) == 0
    assert re.search(r"to detect a drop of 50% .* \d+ prompts with 3 samples each", capsys.readouterr().out)


def test_policies_stand_beside_the_start_and_later_beside_a_run(
    place: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    moved = load_policy(str(bases["t5"]), None, policy_config("t5"), seed=0)
    disturb(moved)
    moved.save(place / "lora")
    recipe = own()[2:]
    start = ["evaluate", "own", *recipe[: recipe.index("--rl.steps")], *SMALL]
    assert detoxrl([*start, "--policy", "lora", f"whole={bases['t5']}", "--run-dir", "runs/m"]) == 0
    found = result("runs/m")
    assert found["names"]["after"] == "lora"
    assert [*found["baselines"]] == ["word_filter", "best_of_4", "best_of_16", "whole"]
    assert found["baselines"]["best_of_16"]["kl_bound"] == pytest.approx(1.8351, abs=1e-4)
    # The same weights, sampled with the same draws, write the same.
    samples = [json.loads(line)["responses"] for line in Path("runs/m/samples.jsonl").read_bytes().splitlines()]
    assert all(sample["whole"] == sample["before"] for sample in samples)
    assert any(sample["after"] != sample["before"] for sample in samples)
    # A whole model with the same tokens is rated by the initial policy too, which it is.
    whole, quality = found["baselines"]["whole"]["quality"], found["quality"]
    for name in ("nll", "entropy"):
        assert whole[name]["after"] == pytest.approx(quality["nll"]["before"], rel=1e-5)
    assert quality["nll"]["after"] > quality["entropy"]["after"]  # by the KL
    scores = found["baselines"]["best_of_16"]["quality"]["score"]
    assert scores["after"] > scores["before"]
    assert detoxrl(own()) == 0
    run = result("runs/own")
    assert detoxrl(["evaluate", "runs/own", "--policy", "lora"]) == 0
    beside = result("runs/own")
    assert beside["toxicity"] == run["toxicity"]
    assert beside["baselines"]["lora"]["quality"]["length"]["after"] == found["quality"]["length"]["after"]
    assert detoxrl(["evaluate", "runs/own", "--evaluation.other-judges", "classifier=hate"]) == 0
    assert [*result("runs/own")["toxicity"]] == [JUDGE, "classifier", "reward classifier"]
    assert "lora" in result("runs/own")["baselines"]
    capsys.readouterr()


def test_a_policy_with_other_tokens_has_no_perplexity_by_the_initial_one(
    place: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = load_base(str(bases["t5"]))
    tokenizer.add_tokens(["overdue"])
    model.resize_token_embeddings(len(tokenizer))
    save_base(model, tokenizer, place / "other")
    recipe = own()[2:]
    start = ["evaluate", "own", *recipe[: recipe.index("--rl.steps")], *SMALL]
    assert detoxrl([*start, "--policy", "other", "--run-dir", "runs/m"]) == 0
    found = result("runs/m")
    assert "length" in found["quality"]
    assert found["quality"].keys().isdisjoint({"nll", "entropy"})
    assert "perplexity" not in found
    assert "nll" in found["baselines"]["best_of_4"]["quality"]
    capsys.readouterr()


def test_a_lora_stands_beside_a_run_of_full_weights(
    place: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    moved = load_policy(str(bases["t5"]), None, policy_config("t5"), seed=0)
    disturb(moved)
    moved.save(place / "lora")
    assert detoxrl(own("--policy.full-weights", "--rl.steps", "1")) == 0
    assert detoxrl(["evaluate", "runs/own", "--policy", "lora"]) == 0
    lines = Path("runs/own/samples.jsonl").read_bytes().splitlines()
    samples = [json.loads(line)["responses"] for line in lines]
    assert any(sample["lora"] != sample["before"] for sample in samples)
    assert any(sample["lora"] != sample["after"] for sample in samples)
    capsys.readouterr()


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (
            ["--texts", "a=rude.jsonl", "b=short.jsonl"],
            "'short.jsonl': differs from rude.jsonl in 21 prompts",
        ),
        (["--texts", "a=rude.jsonl", "b=none.jsonl"], r"--texts = 'none.jsonl': is not a file"),
        (["--texts", "a=rude.jsonl", "b=mine.jsonl"], r"--texts = 'mine.jsonl': row 1 has no text under 'response'"),
        (["--texts", "a=twice.jsonl", "b=rude.jsonl"], r"--texts = 'twice.jsonl': has 1 to 2 responses per prompt"),
        (["--texts", "civil.jsonl"], r"--texts = 'civil.jsonl': has nothing to compare with"),
        (["--texts", "before=rude.jsonl", "b=civil.jsonl"], r"name = 'before': is reserved for another policy"),
        (["--texts", "a=rude.jsonl", "a=civil.jsonl"], r"--texts = 'a=civil.jsonl': repeats the name a"),
        (["--texts"], r"--texts = '': expected at least one argument"),
        (["--texts", "rude.jsonl", "civil.jsonl", "--policy", "lora"], r"or texts are required, and not both"),
        (["--texts", "rude.jsonl", "civil.jsonl", "--evaluation.other-judges", "classifier"], "nor SOURCE=LABEL"),
        (["--texts", "rude.jsonl", "civil.jsonl", "--evaluation.other-judges", "classifier=bad"], "is not a label"),
        (
            ["--texts", "rude.jsonl", "civil.jsonl", "--evaluation.fluency", "nothing=x"],
            "fluency = 'nothing'",
        ),
        (["--texts", "rude.jsonl", "civil.jsonl", "--power", "0.2"], "cannot be combined with a recipe"),
        (["runs/none", "--power", "0.2"], "run folder = 'runs/none': does not exist"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_writes_nothing(
    place: Path, capfd: pytest.CaptureFixture[str], arguments: list[str], rule: str
) -> None:
    write("rude.jsonl", RUDE)
    write("civil.jsonl", CIVIL)
    write("short.jsonl", CIVIL[:9])
    write("twice.jsonl", RUDE, id=[1, 1, *range(2, 30)])
    assert detoxrl(["evaluate", *arguments]) == 2
    line = capfd.readouterr().err
    assert len(line.splitlines()) == 1
    assert re.search(rule, line), line
    assert not Path("runs").exists()
