"""A user's own things through the real command line, and one clear line for what does not fit."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM, T5Config, T5ForConditionalGeneration

from conftest import TARGETS, disturb, policy_config
from detoxrl import Config, evaluate, recipe
from detoxrl.commands.prepare import prepare_rows
from detoxrl.commands.responses import ResponseSampler
from detoxrl.config.edit import config_from_json, config_to_json, with_settings
from detoxrl.data.prompts import token_lengths
from detoxrl.errors import DetoxrlError, InputError
from detoxrl.models.loading import load_base, save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.types import Prompt
from detoxrl.rewards.function import function_name, load_function, validated_reward
from detoxrl.runtime.run_folder import RunFolder
from small_runs import SMALL, contents, detoxrl, own
from test_data import ODD, dialogue

PROMPTS = [Prompt(id="0", text="a"), Prompt(id="1", text="b")]


def test_own_dialogues_model_and_classifier_go_through_unharmed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert detoxrl(own("--data.max-prompt-tokens", "120")) == 0
    shown = capsys.readouterr()
    assert "no dialogue" in shown.err
    assert "runs/own/report.html" in shown.out.replace("\n", "")
    run = place / "runs" / "own"
    account = json.loads((run / "rows.json").read_text())
    assert account["splits"]["file"] == {
        "no dialogue": 1, "duplicate": 1, "used for train": 29, "used for validation": 4, "used for test": 8,
    }  # fmt: skip
    assert sum(account["truncated"].values()) == 41
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n") if line]
    assert all(sample["text"].startswith(ODD) or "word" in sample["text"] for sample in samples)
    assert any("😀" in sample["references"][0] for sample in samples)
    found = json.loads((run / "eval.json").read_text())
    assert set(found["toxicity"]) == {"alt-profanity-check", "reward classifier"}
    assert set(found["quality"]) == {
        "score", "length", "empty_rate", "rouge_l", "chrf", "copied", "similarity", "distinct_1", "distinct_2",
        "distinct_3", "entropy", "nll", "refusal_rate",
    }  # fmt: skip
    assert set(found["splits"]) <= {"toxic before", "civil before"}
    assert sum(n for by in found["two_by_two"].values() for n in by.values()) == 8


def test_an_own_reward_function_and_judge(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = ["--evaluation.primary-judge", "classifier", "--evaluation.judge-label", "hate"]
    assert detoxrl([*own("--reward.function", "rewards.py:brevity"), *judge]) == 0
    run = place / "runs" / "own"
    found = json.loads((run / "eval.json").read_text())
    assert list(found["toxicity"]) == [found["primary_judge"]] == ["classifier"]
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().split("\n") if line]
    before = [len(text) / -10 for sample in samples for text in sample["responses"]["before"]]
    assert found["quality"]["score"]["before"] == pytest.approx(sum(before) / len(before), rel=1e-5)
    # The stored config means the same from any folder, so it repeats the run.
    # The classifier has never seen the word; the linear model of single words masks it all the same.
    assert "crap" in json.loads((run / "masked_words.json").read_text())
    again = place / "elsewhere"
    again.mkdir()
    monkeypatch.chdir(again)
    assert detoxrl(["run", "--from", str(run), "--run-dir", str(again / "r")]) == 0
    assert (again / "r" / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
    assert config_from_json(again / "r" / "config.json") == config_from_json(run / "config.json")
    words = ["--rl.steps", "1", "--sft.no-bf16", "--run-dir", "other"]
    assert detoxrl(["run", "--from", str(run / "config.json"), *words]) == 0
    with_settings = config_from_json(Path("other/config.json"))
    assert (with_settings.rl.steps, with_settings.sft.bf16) == (1, False)
    capsys.readouterr()


def test_a_lora_to_start_from_is_the_reference_and_can_be_measured_without_training(
    place: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    trained = load_policy(str(bases["t5"]), None, policy_config("t5", encoder=True), seed=0)
    disturb(trained)
    trained.save(place / "lora")
    assert detoxrl(own("--policy.adapter", "lora", "--rl.steps", "1")) == 0
    first = json.loads((place / "runs/own/metrics.jsonl").read_text().split("\n")[0])
    assert abs(first["kl/reference"]) < 1e-4
    assert first["ratio/first_error"] < 1e-5
    bare = detoxrl_config("model")
    measured = evaluate(place / "runs" / "measured", bare, policies={"lora": place / "lora"})
    trained_run = json.loads((place / "runs/own/eval.json").read_text())
    # What the run started from is what was measured here; before it stands the bare base.
    assert (
        measured["toxicity"]["alt-profanity-check"]["after"] == trained_run["toxicity"]["alt-profanity-check"]["before"]
    )
    assert measured["quality"]["rouge_l"]["before"] != measured["quality"]["rouge_l"]["after"]
    assert (place / "runs" / "measured" / "report.html").is_file()
    assert detoxrl(["run", "--resume", "--run-dir", "runs/measured"]) == 0
    assert not (place / "runs" / "measured" / "metrics.jsonl").exists()
    shorter = evaluate(place / "runs" / "measured", reward=lambda prompts, responses: [-9.0 for _ in responses])
    assert shorter["quality"]["score"]["before"] == -9.0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", ["--sft.steps", "2", "--sft.no-full-weights"]),
        ("llama", ["--sft.steps", "2", "--sft.full-weights", "--policy.full-weights"]),
        ("bart", ["--policy.full-weights", "--policy.train-encoder"]),
    ],
)
def test_causal_models_and_full_weights_go_all_the_way_and_can_be_measured_alone(
    place: Path, bases: dict[str, Path], name: str, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    base = ["--policy.base", str(bases[name]), "--policy.lora-targets", *TARGETS[name]]
    common = own(*base, *words, "--reward.function", "rewards.py:brevity", "--data.max-prompt-tokens", "100")
    assert detoxrl(["doctor", *common[1:]]) == 0
    assert detoxrl(common) == 0
    run = place / "runs/own"
    first = json.loads((run / "metrics.jsonl").read_text().split("\n")[0])
    assert abs(first["kl/reference"]) < 1e-4
    assert first["ratio/first_error"] < 1e-5
    config = config_from_json(run / "config.json")
    begun_from = str(run / "base") if (run / "base").is_dir() else config.policy.base
    start = run / "start" if (run / "start").is_dir() else None
    moved = load_policy(begun_from, start, config.policy, seed=0)
    disturb(moved)
    moved.save(place / "moved")
    bare = replace(config, policy=replace(config.policy, base=begun_from))
    measured = evaluate(place / "runs/measured", bare, policies={"moved": place / "moved"})["quality"]["score"]
    assert measured["after"] != measured["before"]
    if start is None:  # else the run began from that LoRA, and here the bare base is before
        assert measured["before"] == json.loads((run / "eval.json").read_text())["quality"]["score"]["before"]
    capsys.readouterr()


def test_a_causal_model_reads_prompt_and_response_in_a_row_so_both_must_fit(
    place: Path, bases: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = own("--policy.base", str(bases["gpt2"]), "--policy.lora-targets", "c_attn")
    assert detoxrl([*words, "--data.max-prompt-tokens", "250"]) == 2
    assert "data.max_prompt_tokens + generation.max_new_tokens = 262: exceeds the 256" in capfd.readouterr().err
    words += ["--data.max-prompt-tokens", "100", "--policy.full-weights", "--sft.full-weights", "--sft.steps", "2"]
    with (place / "mine.jsonl").open("a") as lines:
        rows = ({"dialogue": dialogue(i), "summary": f"A talk {i}. " * 80} for i in range(90, 99))
        lines.write("".join(json.dumps(row) + "\n" for row in rows))
    assert detoxrl(words) == 2
    told = capfd.readouterr().err
    assert re.search(r"data\.max_prompt_tokens \+ tokens of the longest reference = \d+: exceeds the 256", told), told


def test_what_is_no_policy_is_not_measured_and_nothing_is_written(place: Path) -> None:
    with pytest.raises(InputError, match=r"--policy = "):
        evaluate(place / "runs" / "measured", detoxrl_config("model"), policies={"it": place / "rewards.py"})
    assert not (place / "runs").exists()


def test_a_model_of_another_kind_is_measured_beside_the_start(place: Path, bases: dict[str, Path]) -> None:
    config = with_settings(detoxrl_config("model"), {"data.max_prompt_tokens": 100})
    found = evaluate(place / "runs/measured", config, policies={"causal": bases["gpt2"]})
    assert found["names"] == {"before": "model", "after": "causal"}
    assert found["quality"]["similarity"]["after"] < 1
    assert {"word_filter", "best_of_4", "best_of_16"} <= found["baselines"].keys()


def detoxrl_config(base: str) -> Config:
    """The settings of `own()`, as Python gives them."""
    given = dict(zip((word[2:].replace("-", "_") for word in SMALL[::2]), SMALL[1::2], strict=True))
    return recipe("own", given | {"policy.base": base, "reward.classifier": "classifier", "data.source": "mine.jsonl"})


@pytest.mark.parametrize("kind", ["deeper", "wider", "torn", "unreadable"])
def test_a_lora_of_another_base_is_refused_before_anything_is_written(
    place: Path, capfd: pytest.CaptureFixture[str], kind: str
) -> None:
    model, tokenizer = load_base("model")
    settings = {"num_decoder_layers": 3} if kind == "deeper" else {"d_model": 16} if kind == "wider" else {}
    other = T5ForConditionalGeneration(T5Config(**(model.config.to_dict() | settings)))
    save_base(other, tokenizer, place / "other")
    load_policy("other", None, policy_config("t5"), seed=0).save(place / "lora")
    if kind == "torn":
        (place / "lora" / "adapter_model.safetensors").write_bytes(b"torn")
    if kind == "unreadable":
        (place / "lora" / "adapter_config.json").write_text("{}")
    code = detoxrl(own("--policy.adapter", "lora"))
    assert code == (1 if kind == "torn" else 2)
    told = capfd.readouterr().err
    assert len(told.splitlines()) == 1
    assert "policy.adapter = " in told or "cannot be read" in told
    assert not (place / "runs").exists()
    with pytest.raises(DetoxrlError):
        evaluate(place / "runs" / "measured", detoxrl_config("model"), policies={"lora": place / "lora"})
    assert not (place / "runs").exists()


def test_a_run_is_not_overwritten_by_one_that_needs_it(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert detoxrl(own()) == 0
    before = sorted(place.rglob("*"))
    rows = ["--data.source", "runs/own/data", "--data.text-column", "text"]
    for words in (["--policy.adapter", "runs/own/adapter"], rows):
        assert detoxrl(own("--overwrite", *words)) == 2
        assert "--run-dir = 'runs/own': holds " in capfd.readouterr().err
    with pytest.raises(InputError, match=r"texts = .*do not belong to a run"):
        evaluate("runs/own", texts={"x": "mine.jsonl"})
    with pytest.raises(InputError, match=r"holds .*adapter, which the run needs"):
        evaluate("runs/own", detoxrl_config("model"), policies={"it": "runs/own/adapter"}, overwrite=True)
    assert sorted(place.rglob("*")) == before


# What does not fit


def a_model_of_both_sides(place: Path) -> None:
    tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=300)
    save_base(BertForMaskedLM(tiny), AutoTokenizer.from_pretrained(place / "model"), place / "bert")


def a_tokenizer_too_large(place: Path) -> None:
    copytree(place / "model", place / "misfit")
    tokenizer = AutoTokenizer.from_pretrained(place / "misfit")
    tokenizer.add_tokens([f"extra{i}" for i in range(9)])
    tokenizer.save_pretrained(place / "misfit")


def a_tokenizer_with_another_end(place: Path) -> None:
    copytree(place / "model", place / "misfit")
    AutoTokenizer.from_pretrained(place / "misfit", eos_token="<unk>").save_pretrained(place / "misfit")


def a_model_without_its_head(place: Path) -> None:
    from safetensors.torch import load_file, save_file

    copytree(place / "model", place / "headless")
    weights = load_file(place / "headless" / "model.safetensors")
    del weights["decoder.final_layer_norm.weight"]
    save_file(weights, place / "headless" / "model.safetensors", metadata={"format": "pt"})


def an_unfinished_run(place: Path) -> None:
    (place / "runs" / "own").mkdir(parents=True)
    (place / "runs" / "own" / "config.json").write_text(config_to_json(recipe("own")))


def a_file_for_a_folder(place: Path) -> None:
    (place / "runs").write_text("no folder")


def a_model_without_a_tokenizer(place: Path) -> None:
    for file in (place / "model").glob("tok*"):
        file.unlink()


def models_without_words(place: Path) -> None:
    for name in ("model", "classifier"):
        for file in (place / name).glob("tok*"):
            file.unlink()
        (place / name / "vocab.txt").touch()  # transformers reads an empty tokenizer from it.


def a_classifier_without_words(place: Path) -> None:
    copytree(place / "model", place / "base")
    models_without_words(place)


def a_config_with_a_strange_setting(place: Path) -> None:
    settings = json.loads(config_to_json(recipe("own")))
    settings["rl"]["stepz"] = settings["rl"].pop("steps")
    (place / "config.json").write_text(json.dumps(settings))


def nothing(place: Path) -> None:
    pass


BAD_INPUT = [
    (nothing, ["run", "ovn"], r"recipe = 'ovn': is not a recipe; did you mean own\?"),
    (nothing, ["run", "x"], r"recipe = 'x': is not a recipe; use quickstart, own"),
    (nothing, ["trian", "runs/own"], r"command = 'trian': is not a command; did you mean train\?"),
    (nothing, own("--rl.kl-coeff", "1"), r"not known to `detoxrl run`; did you mean --rl\.kl-coef\?"),
    (nothing, own("--zzz"), r"flag = '--zzz': is not known to `detoxrl run`; choose from --help, --from, .* --rl\.\*,"),
    (nothing, own("--rl.lr", "fast"), r"rl\.lr = 'fast': must be a number; see `detoxrl run RECIPE --help`"),
    (nothing, own("--rl.lr", "-1e-3"), r"rl\.lr = -0\.001: must be above 0"),
    (nothing, own("--data.template", "- {dialog}"), r"data\.template = '- \{dialog\}': must contain \{dialogue\}"),
    (nothing, own("--overwrite=now"), r"--overwrite = '': ignored explicit argument 'now'; see `detoxrl run --help`"),
    (nothing, own("--rl.lr", "nan"), r"rl\.lr = 'nan': must be a finite number"),
    (nothing, own("--rl.lr"), r"--rl\.lr = '': expected one argument; see `detoxrl run --help`"),
    (nothing, own("--data.length-unit", "words"), r"data\.length_unit = 'words': must be 'characters' or 'tok"),
    (nothing, own("--overwrite", "now"), r"argument = 'now': belongs to no flag; put its flag before"),
    (nothing, own("--data.source", "nine.jsonl"), r"data\.source = 'nine\.jsonl': is not a file; did you mean mine"),
    (nothing, own("--data.text-column", "text"), r"data\.text_column = 'text': .*choose from dialogue, summ"),
    (nothing, own("--data.min-length", "99999"), r"leaves 0 rows for train \(42 too short, 1 no dialogue\)"),
    (nothing, own("--reward.good-label", "civil"), r"reward\.good_label = 'civil': .*use one of nothate, hate"),
    (nothing, own("--reward.good-label", "hate", "--reward.toxic-label", "nothate"),
     r"reward\.good_label = 'hate': is reversed: probability 0\.\d\d for a civil sentence, .*name the"),
    (nothing, own("--reward.classifier", "model"), r"reward\.classifier = '.*model': lacks weights such as "),
    (nothing, own("--policy.base", "classifier"), r"is a RobertaForSequenceC.*, which does not"),
    (a_model_of_both_sides, own("--policy.base", "bert"), r"policy\.base = '.*bert': is a BertForMaskedLM, which does"),
    (nothing, own("--policy.full-weights", "--policy.adapter", "model"), r"policy\.adapter = '.*': cannot be com"),
    (nothing, own("--policy.full-weights", "--sft.no-full-weights", "--sft.steps", "2"), r"sft\.full_weights = False"),
    (nothing, own("--policy.base", "nowhere"), r"policy\.base = 'nowhere': is not a local path and not fully cached"),
    (a_tokenizer_too_large, own("--policy.base", "misfit"), r"has a tokenizer of \d+ tokens, but embeddings for 300"),
    (a_tokenizer_with_another_end, own("--policy.base", "misfit"), r"tokenizer with eos_token_id 2, but the mod"),
    (a_model_without_its_head, own("--policy.base", "headless"), r"a generator, for example decoder\.final_layer"),
    (a_model_without_a_tokenizer, own(), r"policy\.base = 'model': holds no tokenizer; give a folder with its tok"),
    (models_without_words, own(), r"policy\.base = '.*model': has a tokenizer that knows no word"),
    (a_classifier_without_words, own("--policy.base", "base"), r"reward\.classifier = '.*classifier': has a tokenizer"),
    (a_config_with_a_strange_setting, ["run", "--from", "config.json"], r"setting = 'rl\.stepz': .*mean rl\.steps"),
    (nothing, own("--sft.bf16", "False", "junk"), r"argument = 'junk': belongs to no flag; .*, or quote a value"),
    (nothing, own("--data.source", ""), r"data\.source = '': must not be empty"),
    (nothing, own("--policy.lora-targets", "q_proj"), r"policy\.lora_targets = 'q_proj': names no linear .*choose"),
    (nothing, own("--policy.adapter", "model"), r"policy\.adapter = '.*model': holds no adapter_config\.json"),
    (an_unfinished_run, own(), r"--run-dir = 'runs/own': already exists; add --resume to resume it, --overwrite"),
    (a_file_for_a_folder, own(), r"--run-dir = 'runs/own': cannot be created: .*runs is not writable"),
    (nothing, own("--run-dir", "/proc/nowhere"), r"--run-dir = '/proc/nowhere': cannot be created"),
    (nothing, own("--reward.function", "rewards.py:short"), r"reward\.function = '.*rewards\.py:short': returned sh"),
    (nothing, own("--reward.function", "rewards.py:undefined"), r"returned nan for response 2 of 3; return one finite"),
    (nothing, own("--reward.function", "rewards.py:brief"), r"defines no function brief; choose from brevity, short"),
    (nothing, own("--reward.function", "reward.py:brevity"), r"there is no file reward\.py; give the path"),
    (nothing, own("--reward.function", "brevity"), r"reward\.function = 'brevity': does not name a function; write"),
    (nothing, own("--evaluation.primary-judge", "classifier"), r"is the reward's own classifier, which cannot judge"),
    (nothing, own("--from", "x"), r"--from = 'x': cannot be combined with a recipe"),
    (nothing, ["run", "--resume", "--run-dir", "gone"], r"run folder = 'gone': does not exist; run `detox"),
    (nothing, own("--accept-changes"), r"--accept-changes = True: requires --resume; add --resume"),
    (nothing, ["prepare", "own", "--resume"], r"flag = '--resume': is not known to `detoxrl prepare`; choose"),
    (nothing, ["run", "--resume"], r"--run-dir = '': is missing; run `detoxrl run --resume --run-dir DIR`"),
    (nothing, ["evaluate", "own"], r"run folder = 'own': does not exist; run `detoxrl prepare RECIPE` first"),
    (nothing, ["train", "nowhere"], r"run folder = 'nowhere': does not exist"),
    (nothing, own("--reward.function", "broken.py:f"), r"line 2 is not valid Python: "),
    (nothing, own("--reward.function", "rewards.py:words"), r"returned list, not numbers; return one finite num"),
    (nothing, own("--reward.classifier", "embedded", "--reward.good-label", "nice"),
     r"reward\.good_label = 'nice': is not a label of the embedded classifier; use nothate"),
]  # fmt: skip


@pytest.mark.parametrize(("arrange", "words", "message"), BAD_INPUT, ids=[row[2][:60] for row in BAD_INPUT])
def test_bad_input_is_one_line_names_the_remedy_and_writes_nothing(
    place: Path, capfd: pytest.CaptureFixture[str], arrange: Callable[[Path], None], words: list[str], message: str
) -> None:
    arrange(place)
    before = contents(place)
    assert detoxrl(words) == 2
    told = capfd.readouterr().err
    assert told.startswith("detoxrl: ")
    assert len(told.splitlines()) == 1
    assert re.search(message, told), told
    assert contents(place) == before


def test_positions_bound_prompts_and_responses(
    place: Path, bases: dict[str, Path], capfd: pytest.CaptureFixture[str]
) -> None:
    words = own("--policy.base", str(bases["bart"]), "--policy.lora-targets", *TARGETS["bart"])
    assert detoxrl(words) == 2
    assert "data.max_prompt_tokens = 512: exceeds the 256 positions of" in capfd.readouterr().err
    assert detoxrl([*words, "--data.max-prompt-tokens", "100", "--generation.max-new-tokens", "300"]) == 2
    assert "generation.max_new_tokens = 300: exceeds the 256 positions of" in capfd.readouterr().err


# Full, broken


def test_a_full_disk_is_exit_1_with_what_was_kept(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(RunFolder, "append", full)
    assert detoxrl(own()) == 1
    told = capfd.readouterr().err.splitlines()[-1]
    assert told.startswith("detoxrl: the disk is full; runs/own keeps adapter, checkpoint.json, config.json, data")


def test_a_torn_file_is_exit_1_and_named(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert detoxrl(own()) == 0
    (place / "runs/own").rename("whole")
    again, resumed = ["evaluate", "runs/own"], ["run", "--resume", "--run-dir", "runs/own"]
    for name, command in (
        ("adapter/adapter_model.safetensors", again), ("data/test.jsonl", again), ("seconds.json", resumed),
    ):  # fmt: skip
        torn = Path(copytree("whole", "runs/own"), name)
        RunFolder(place / "runs/own").write_json("seconds.json", {"prepare": 1.0, "sft": 1.0})
        torn.write_bytes(b"{" if name == "seconds.json" else torn.read_bytes()[:-100])
        assert detoxrl(command) == 1
        told = capfd.readouterr().err.splitlines()[-1]
        assert "cannot be read: " in told, name
        rmtree("runs/own")


# Reward functions


@pytest.mark.parametrize("returned", [[1, 2.5], (1.0, 2.5), torch.tensor([1.0, 2.5], dtype=torch.float64)])
def test_a_reward_function_may_return_any_numbers(returned: object) -> None:
    scores = validated_reward(lambda prompts, responses: returned, "f")(PROMPTS, ["c", "d"])  # type: ignore[arg-type, return-value]
    assert torch.equal(scores, torch.tensor([1.0, 2.5]))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"returned shape \(1,\) for 2 responses"),
        ([[1.0], [2.0]], r"returned shape \(2, 1\) for 2 responses"),
        (["civil", "rude"], r"returned list, not numbers"),
        (None, r"returned NoneType, not numbers"),
        ([1.0, float("inf")], r"returned inf for response 2 of 2"),
    ],
)
def test_a_reward_function_that_returns_something_else_is_refused(returned: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        validated_reward(lambda prompts, responses: returned, "f")(PROMPTS, ["c", "d"])  # type: ignore[arg-type, return-value]


def test_a_reward_file_may_import_its_neighbour_and_a_constant_reward_is_told(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "rewards").mkdir()
    (place / "rewards" / "neighbour_of_mine.py").write_text("SCORE = 2.5")
    source = (
        "from neighbour_of_mine import SCORE\ndef same(prompts, responses):\n    return [SCORE for _ in responses]\n"
    )
    (place / "rewards" / "flat.py").write_text(source)
    assert detoxrl(own("--reward.function", "rewards/flat.py:same")) == 0
    assert "all 16 responses of the initial policy score 2.5" in capfd.readouterr().err.replace("\n", " ")


def test_a_function_given_in_python_is_named_so_that_it_is_found_again_or_says_it_cannot_be(place: Path) -> None:
    function = load_function("rewards.py:brevity")
    assert function_name(function) == f"{place / 'rewards.py'}:brevity"
    name = function_name(lambda prompts, responses: [0.0 for _ in responses])
    with pytest.raises(InputError, match=r"cannot be loaded by its name; pass it again as reward= in"):
        load_function(name)


def test_an_initial_policy_that_was_not_beaten_is_measured_once_and_compared_with_baselines_alone(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampled = []
    sample = ResponseSampler.sample
    monkeypatch.setattr(ResponseSampler, "sample", lambda *words: (sampled.append(words[1].policy), sample(*words))[1])
    assert detoxrl(own("--rl.lr", "1e-12")) == 0
    output = capfd.readouterr()
    assert output.err.count("no checkpoint is better than the initial policy, which is kept (validation toxicity") == 1
    assert output.out.splitlines()[-3].startswith("The initial policy was kept: no checkpoint was less toxic without")
    assert output.out.count("The policy hardly moved") == 1
    assert set(sampled) == {"before"}

    run = place / "runs/own"
    found = json.loads((run / "eval.json").read_text())
    assert found["sharpening"] == {"temperature": None, "left_out": "training kept the initial policy"}
    assert found["perplexity"]["ratio"] is None
    compared = [*found["toxicity"].values(), *found["quality"].values()]
    for split in found["splits"].values():
        compared += [result for name, result in split.items() if name != "n"]
    assert [result for result in compared if result["difference"] is not None] == []
    assert [result for result in compared if result["before"] != result["after"]] == []
    for result in found["toxicity"].values():
        assert (result["verdict"], result["relative"], result["share_removed"]) == ("initial policy kept", None, None)
    best_of = found["baselines"]["best_of_16"]
    assert best_of["toxicity"]["reward classifier"]["difference"]["mean"] != 0
    assert best_of["after"]["toxicity"]["after"] == found["toxicity"]["alt-profanity-check"]["before"]["mean"]
    for line in (run / "samples.jsonl").read_bytes().splitlines():
        responses = json.loads(line)["responses"]
        assert responses["after"] == responses["before"]
    assert "Initial policy kept: no checkpoint was less toxic" in (run / "report.html").read_text()


def test_without_references_quality_is_not_measured_anywhere(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    rows = [json.loads(line) for line in (place / "mine.jsonl").read_text().splitlines()]
    (place / "bare.jsonl").write_text("".join(json.dumps({"dialogue": row["dialogue"]}) + "\n" for row in rows))
    assert detoxrl(own("--data.source", "bare.jsonl")) == 0
    output = capfd.readouterr()
    assert re.search(r"toxicity 0\.\d{3}, quality not measured, score \S+, kl \S+", output.err)
    assert "quality 1.000" not in output.err
    assert re.search(r"(?m)^ Quality +not measured *$", output.out)
    checkpoint = json.loads((place / "runs/own/checkpoint.json").read_text())
    assert checkpoint["quality_by"] == "share with text"
    assert checkpoint["reason"].startswith("the best share of responses with text among policies whose")
    assert "Quality was not measured: " in (place / "runs/own/report.html").read_text()
    assert detoxrl(["export", "runs/own"]) == 0
    assert "Quality was not measured: " in (place / "runs/own-export/README.md").read_text()


def test_too_few_validation_prompts_are_told_once_with_a_remedy(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = own("--reward.function", "rewards.py:brevity")
    monkeypatch.setenv("INTERRUPT_AT", "4")
    assert detoxrl(words) == 130
    warning = r"train: 4 validation prompts are too few to tell a better checkpoint from chance \(toxicity 0\.\d{3}, "
    warning += r"standard error 0\.\d{3}\); set rl.validation_prompts to \d+0 or more"
    assert len(re.findall(warning, capfd.readouterr().err)) == 1
    monkeypatch.delenv("INTERRUPT_AT")
    assert detoxrl([*words, "--resume"]) == 0
    assert "too few" not in capfd.readouterr().err
    assert "4 validation prompts are too few" in (place / "runs/own/report.html").read_text()


def test_cut_prompts_are_counted_and_none_is_above_the_limit(place: Path) -> None:
    settings = {"policy.base": "model", "data.source": "mine.jsonl", "rl.batch_size": 8, "rl.minibatch_size": 4}
    whole = prepare_rows(recipe("own", settings | {"data.max_prompt_tokens": 9999}))
    lengths = sorted(
        length
        for rows in whole.rows.values()
        for length in token_lengths(whole.tokenizer, [row.prompt for row in rows])
    )
    assert sum(whole.account["truncated"].values()) == 0
    assert whole.account["prompt_tokens"]["max"] == lengths[-1]
    limit = lengths[len(lengths) // 2]  # some prompts have exactly so many
    cut = prepare_rows(recipe("own", settings | {"data.max_prompt_tokens": limit})).account
    assert sum(cut["truncated"].values()) == sum(length > limit for length in lengths) < len(lengths)
    assert cut["prompt_tokens"]["max"] == limit


def test_a_function_is_found_in_a_module_too() -> None:
    assert load_function("math:sqrt") is __import__("math").sqrt
    with pytest.raises(InputError, match=r"there is no module nowhere"):
        load_function("nowhere:f")
