"""Bad input is known before torch is imported, before a hub is asked and before weights are read, whatever is wrong."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import huggingface_hub
import pytest
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM, PreTrainedModel

from conftest import policy_config
from detoxrl import evaluate
from detoxrl import run as run_in_python
from detoxrl.commands import preflight
from detoxrl.commands import run as stages
from detoxrl.config.edit import config_from_json, config_to_json, with_settings
from detoxrl.config.recipes import recipe
from detoxrl.errors import InputError
from detoxrl.models.files import ARCHITECTURES
from detoxrl.models.loading import save_base
from detoxrl.models.lora import load_policy
from detoxrl.runtime.run_folder import RunFolder
from small_runs import SMALL, contents, detoxrl, own

# Each case is run in one process that has imported nothing slow, in a folder of the fixture `place`.
ALONE = """
import contextlib, io, json, socket, sys
from detoxrl import cli

def connect(*_):
    raise SystemExit("a hub was asked")

socket.socket.connect = socket.create_connection = connect
told = []
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        try:
            cli.main(words)
            code = 0
        except SystemExit as end:
            code = end.code
    slow = [name for name in ("torch", "transformers", "peft", "scipy", "datasets") if name in sys.modules]
    told.append([code, errors.getvalue(), slow])
json.dump(told, sys.stdout)
"""


def swapped(flag: str, value: str, *words: str) -> list[str]:
    """Return the words of `own` with another value for one of its flags."""
    given = own(*words)
    given[given.index(flag) + 1] = value
    return given


JUDGED = ("--evaluation.primary-judge", "classifier", "--reward.function", "rewards.py:brevity")
HUB = ("--reward.classifier", "some/classifier", "--policy.base", "some/base")
KNOWN_WITHOUT_TORCH = [
    # Run folders.
    (["train", "runs/typo"], r"run folder = 'runs/typo': does not exist"),
    (["report", "runs/typo"], r"run folder = 'runs/typo': does not exist"),
    (["evaluate", "runs/typo"], r"run folder = 'runs/typo': does not exist"),
    (["evaluate", "model", "--power", "0.2"], r"run folder = 'model': is not the config|config = 'model/config\.json'"),
    (["export", "typo"], r"run folder = 'typo': does not exist"),
    (["run", "--resume", "--run-dir", "typo"], r"run folder = 'typo': does not exist"),
    (own("--run-dir", "model"), r"--run-dir = 'model': is not a run folder"),
    (["doctor", "--from", "typo"], r"--from = 'typo': is not a file"),
    # Data.
    (own("--data.source", "typo.jsonl"), r"data\.source = 'typo\.jsonl': is not a file; \. contains mine\.jsonl"),
    (own("--data.source", "data/my.csv"), r"data\.source = 'data/my\.csv': is not a file; there is no folder data"),
    (own("--data.source", "./data"), r"data\.source = '\./data': is neither an existing path nor a hub id; \. cont"),
    (own("--data.source", "model"), r"data\.source = 'model': .* fits? no single split|no data file"),
    (own("--data.text-column", "text"), r"data\.text_column = 'text': is not a column of mine\.jsonl; choose"),
    (own("--data.reference-column", "gist"), r"data\.reference_column = 'gist': is not a column of mine\.jsonl"),
    (["doctor", *own("--data.source", "typo.jsonl")[1:]], r"data\.source = 'typo\.jsonl'"),
    (["prepare", *own("--data.source", "typo.jsonl")[1:]], r"data\.source = 'typo\.jsonl'"),
    # The local file comes first, although the base would have to be fetched.
    (own(*HUB, "--data.source", "typo.jsonl"), r"data\.source = 'typo\.jsonl'"),
    # Models.
    (own("--policy.base", "./modle"), r"policy\.base = '\./modle': is neither an .*; did you mean model\?"),
    (own("--policy.base", "runs/own/base"), r"policy\.base = 'runs/own/base': is neither an existing path nor a hub"),
    (own("--policy.base", "mine.jsonl"), r"policy\.base = 'mine\.jsonl': is a file"),
    (own("--policy.base", "empty"), r"policy\.base = 'empty': holds no config\.json"),
    (own("--policy.lora-targets", "q_proj"), r"lora_targets = 'q_proj': names no linear .*choose from k, o, q, v, "),
    (own("--reward.classifier", "some/classifier", "--policy.lora-targets", "c_attn"), r"lora_targets = 'c_attn'"),
    (["run", "quickstart", "--policy.lora-targets", "c_attn"], r"lora_targets = 'c_attn': .*choose from k, o, q, v"),
    (["doctor", *own("--policy.lora-targets", "q_proj")[1:]], r"lora_targets = 'q_proj'"),
    (own("--policy.adapter", "./lora"), r"policy\.adapter = '\./lora': is neither"),
    (own("--policy.adapter", "model"), r"policy\.adapter = 'model': holds no adapter_config\.json"),
    # Rewards, judges and readers.
    (own("--reward.classifier", "./typo"), r"reward\.classifier = '\./typo': is neither"),
    (own("--reward.good-label", "civil"), r"reward\.good_label = 'civil': .*use one of nothate, hate"),
    (own("--reward.good-label", "hate"), r"reward\.good_label = 'hate': is the label of reward\.toxic_label too"),
    (["run", "quickstart", "--reward.toxic-label", "rude"], r"toxic_label = 'rude': .*embedded classifier; use hate"),
    (own("--reward.function", "typo.py:score"), r"reward\.function = 'typo\.py:score': there is no file typo\.py"),
    (own("--reward.function", "broken.py:f"), r"reward\.function = 'broken\.py:f': line 2 is not valid Python"),
    (own("--reward.function", "rewards.py:brevty"), r"defines no function brevty; did you mean brevity\?"),
    (own(*JUDGED), r"evaluation\.judge_label = 'toxic': .*use one of nothate, hate"),
    (own("--evaluation.other-judges", "classifier=rude"), r"evaluation\.other_judges = 'rude': is not a label"),
    (own("--evaluation.other-judges", "./typo=rude"), r"evaluation\.other_judges = '\./typo': is neither"),
    (own("--evaluation.nli", "classifier"), r"evaluation\.nli = 'entailment': is not a label of the classifier"),
    (own("--evaluation.fluency", "classifier=good"), r"evaluation\.fluency = 'good': is not a label"),
    (own("--track", "wandbb"), r"--track = 'wandbb': is not a tracker; did you mean wandb\?"),
    (own("--reward.classifier", "listed"), r"reward\.toxic_label = 'hate': belongs to a classifier whose id2label"),
    (own("--data.source", "pipe.jsonl"), r"data\.source = '.*pipe\.jsonl': is a pipe"),
    (["evaluate", "--texts", "pipe.jsonl"], r"--texts = 'pipe\.jsonl': is a pipe"),
    # What is measured.
    (["evaluate", "--texts", "typo.txt"], r"--texts = 'typo\.txt': is not a file"),
    (["evaluate", "--texts", "mine.jsonl"], r"--texts = 'mine\.jsonl': row 1 has no text under 'response'"),
    (["evaluate", *own()[1:8], "--policy", "x=./typo"], r"--policy = '\./typo': is neither"),
    (["evaluate", *own()[1:8], "--policy", "x=classifier", "--data.source", "no.csv"], r"data\.source = 'no\.csv'"),
    (["evaluate", *own()[1:8], "--policy", "before=model"], r"name = 'before': is reserved"),
    # Sweeps and conversions.
    (["sweep", "quickstart", "--over", "rl.typo=1"], r"setting = 'rl\.typo': is not a setting; settings of rl: "),
    (["sweep", "quickstart", "--over", "rl.lr=fast"], r"rl\.lr = 'fast': must be a number"),
    (["sweep", *own()[1:], "--over", "data.source=mine.jsonl,typo.jsonl"], r"data\.source = 'typo\.jsonl'"),
    (["sweep", *own()[1:], "--seeds", "0", "--run-dir", "model"], r"--run-dir = 'model': is not a sweep"),
    (["convert", "./typo", "out"], r"FROM = '\./typo': is neither an existing path nor a hub id"),
    (["convert", "model", "model"], r"TO = 'model': already exists"),
    (["convert", "model", "out"], r"FROM = 'model': has no weights in "),
    (["convert", "typo.gguf", "out"], r"FROM = 'typo\.gguf': is not a file; \. contains "),
    (["convert", "mine.jsonl", "out"], r"FROM = 'mine\.jsonl': is not a GGUF file"),
    (["convert", "torn.gguf", "out"], r"FROM = 'torn\.gguf': is truncated: it ends within its header"),
    # Names.
    (["run", "quikstart"], r"recipe = 'quikstart': is not a recipe; did you mean quickstart\?"),
    (own("--rl.optimizer", "adam"), r"flag = '--rl\.optimizer': is not known to `detoxrl run`; settings of rl: "),
]  # fmt: skip


def test_what_local_files_tell_is_known_without_torch_and_without_a_hub_and_writes_nothing(place: Path) -> None:
    os.mkfifo("pipe.jsonl")
    Path("torn.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    copytree("classifier", "listed")
    settings = json.loads(Path("listed/config.json").read_text())
    Path("listed/config.json").write_text(json.dumps(settings | {"id2label": ["nothate", "hate"]}))
    (place / "empty").mkdir()
    before = contents(place)
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9"}
    del environment["HF_HUB_OFFLINE"]
    result = subprocess.run(
        [sys.executable, "-c", ALONE], input=json.dumps([words for words, _ in KNOWN_WITHOUT_TORCH]), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for (words, message), (code, told, slow) in zip(KNOWN_WITHOUT_TORCH, json.loads(result.stdout), strict=True):
        assert code == 2, (words, told)
        assert re.match(r"detoxrl: [^\n]+\n$", told), (words, told)
        assert re.search(message, told), (words, told)
        assert slow == [], words
    assert contents(place) == before


# What takes torch, but no weights


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail the test when weights are read."""
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))


def nothing(place: Path) -> None:
    pass


def a_type_that_is_not_known(place: Path) -> None:
    opt = OPTConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=16, word_embed_proj_dim=16,
        eos_token_id=1, bos_token_id=1, pad_token_id=0, max_position_embeddings=999,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(place / "model")
    tokenizer.backend_tokenizer.post_processor = None
    save_base(OPTForCausalLM(opt), tokenizer, place / "opt")
    settings = json.loads((place / "opt/config.json").read_text())
    (place / "opt/config.json").write_text(json.dumps(settings | {"model_type": "opt"}))


def a_row_that_is_torn(place: Path) -> None:
    with (place / "mine.jsonl").open("a") as lines:
        lines.write('{"dialogue": oops}\n')


KNOWN_WITHOUT_WEIGHTS: list[tuple[Callable[[Path], None], list[str], str]] = [
    (nothing, own("--policy.base", "classifier"), r"is a RobertaForSequenceC.*, which does not generate text"),
    (a_row_that_is_torn, own(), r"data\.source = '.*mine\.jsonl': cannot be read: row 44: "),
    (nothing, own("--data.min-length", "99999"), r"leaves 0 rows for train"),
    (nothing, own("--policy.base", "gpt2"), r"data\.max_prompt_tokens \+ generation\.max_new_tokens = 524: exceeds"),
    (nothing, own("--policy.base", "gpt2", "--data.max-prompt-tokens", "99", "--policy.train-encoder"),
     r"policy\.train_encoder = True: needs an encoder, and the base has none"),
    (a_type_that_is_not_known, own("--policy.base", "opt", "--policy.lora-targets", "q"),
     r"policy\.lora_targets = 'q': names no linear layer of the base; choose from fc1, fc2, k_proj, "),
    (nothing, own("--reward.function", "rewards.py:short", "--evaluation.primary-judge", "classifier",
                  "--evaluation.judge-label", "hate"), r"returned shape \(1,\) for 3 responses"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("arrange", "words", "message"), KNOWN_WITHOUT_WEIGHTS, ids=[row[2][:50] for row in KNOWN_WITHOUT_WEIGHTS]
)
def test_what_rows_and_shapes_tell_is_known_before_weights_are_read(
    place: Path,
    bases: dict[str, Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arrange: Callable[[Path], None],
    words: list[str],
    message: str,
) -> None:
    copytree(bases["gpt2"], "gpt2")
    arrange(place)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    before = contents(place)
    for command in ("run", "doctor"):
        assert detoxrl([command, *words[1:]]) == 2
        told = capfd.readouterr().err
        assert re.search(message, told), told
    assert contents(place) == before


def test_python_has_the_same_order(place: Path, no_weights: None) -> None:
    config = recipe("own", {"policy.base": "model", "reward.classifier": "classifier", "data.source": "mine.jsonl"})
    with pytest.raises(InputError, match=r"reward\.good_label = 'civil'"):
        run_in_python("runs/own", with_settings(config, {"reward.good_label": "civil"}))
    with pytest.raises(InputError, match=r"--policy = '\./typo': is neither"):
        evaluate("runs/own", config, policies={"it": "./typo"})
    # A function that is given replaces the classifier, which then need not exist.
    without = with_settings(config, {"reward.classifier": "./gone", "evaluation.primary_judge": "classifier"})
    with pytest.raises(InputError, match=r"evaluation\.judge_label = 'toxic'"):
        run_in_python("runs/own", without, reward=lambda prompts, responses: [0.0 for _ in responses])
    assert not Path("runs").exists()


# Runs that exist


def test_a_stage_that_lacks_a_part_deletes_nothing(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [*own("--sft.steps", "2", "--sft.no-full-weights"), "--run-dir", "run"]
    assert detoxrl(words) == 0
    Path("model").rename("moved")
    before = contents(place)
    for stage in ("sft", "train", "evaluate"):
        assert detoxrl([stage, "run"]) == 2
        assert re.search(r"policy\.base = '.*model': is neither an existing path", capfd.readouterr().err), stage
    with pytest.raises(InputError, match=r"policy\.base"):
        stages.rerun_stage(Path("run"), "train")
    assert contents(place) == before
    assert detoxrl(["report", "run"]) == 0  # It reads the run folder alone.


def test_a_stage_whose_base_is_neither_cached_nor_to_be_had_deletes_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert detoxrl(own("--run-dir", "run")) == 0
    on_hub = with_settings(config_from_json(place / "run/config.json"), {"policy.base": f"some/base@{'0' * 40}"})
    RunFolder(place / "run").write("config.json", config_to_json(on_hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    before = contents(place)
    for stage in ("train", "evaluate"):
        assert detoxrl([stage, "run"]) == 2
        assert "policy.base = 'some/base@0" in capfd.readouterr().err
    assert contents(place) == before


def test_a_new_warm_start_needs_the_base_that_the_old_one_has_replaced(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert detoxrl(own("--sft.steps", "2", "--sft.full-weights", "--run-dir", "run")) == 0
    Path("model").rename("moved")
    before = contents(place)
    assert detoxrl(["sft", "run"]) == 2
    assert re.search(r"policy\.base = '.*model': is neither an existing path", capfd.readouterr().err)
    assert contents(place) == before


def test_a_finished_run_is_read_without_its_rows(place: Path) -> None:
    assert detoxrl(own("--run-dir", "run")) == 0
    rmtree("run/data")
    assert detoxrl(["run", "--resume", "--run-dir", "run"]) == 0


def test_what_the_warm_start_has_replaced_may_be_gone(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert detoxrl(own("--sft.steps", "2", "--sft.full-weights", "--run-dir", "run")) == 0
    rmtree("model")
    rmtree("runs", ignore_errors=True)
    assert detoxrl(["evaluate", "run"]) == 0
    assert detoxrl(["run", "--resume", "--run-dir", "run"]) == 0
    (place / "mine.jsonl").unlink()
    assert detoxrl(["run", "--resume", "--run-dir", "run"]) == 0  # The rows are in the run.


def test_of_a_run_to_resume_only_what_has_changed_is_checked(
    place: Path, capfd: pytest.CaptureFixture[str], no_weights: None
) -> None:
    config = recipe("own", {"policy.base": "./gone", "reward.classifier": "classifier", "data.source": "gone.csv"})
    folder = RunFolder(place / "run")
    folder.write("config.json", config_to_json(config))
    assert preflight.checked_run(place / "run", config, "resume") == preflight.checked_config(config, config)
    for setting, value, message in (
        ("evaluation.primary_judge", "./typo", r"evaluation\.primary_judge = './typo'"),
        ("reward.good_label", "civil", r"reward\.good_label = 'civil'"),
        ("data.id_column", "id", r"data\.source = 'gone\.csv'"),
    ):
        changed = with_settings(config, {setting: value})
        with pytest.raises(InputError, match=message):
            preflight.checked_run(place / "run", changed, "resume")


# LoRA targets


@pytest.mark.parametrize(
    ("name", "targets"),
    [("t5", ("q", "v")), ("bart", ("q_proj", "v_proj")), ("gpt2", ("c_attn",)), ("llama", ("q_proj", "v_proj"))],
)
def test_lora_targets_follow_from_the_type_of_the_base_and_are_stored(
    place: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str], name: str, targets: tuple[str, ...]
) -> None:
    words = [*own("--policy.base", str(bases[name]), "--data.max-prompt-tokens", "100", "--rl.steps", "1")]
    assert detoxrl([*words, "--run-dir", "usual"]) == 0
    assert detoxrl([*words, "--policy.lora-targets", *targets, "--run-dir", "named"]) == 0
    for file in ("config.json", "adapter/adapter_model.safetensors", "samples.jsonl"):
        assert (place / "usual" / file).read_bytes() == (place / "named" / file).read_bytes(), file
    assert config_from_json(place / "usual/config.json").policy.lora_targets == targets
    # A resumed run keeps what it chose, also if it is described as it was at first.
    assert detoxrl([*words, "--run-dir", "usual", "--resume"]) == 0
    assert detoxrl([*words, "--policy.lora-targets", "none", "--run-dir", "named", "--resume"]) == 0


def test_another_base_than_the_stored_one_has_its_own_targets(place: Path, bases: dict[str, Path]) -> None:
    words = own("--policy.base", str(bases["t5"]), "--data.max-prompt-tokens", "100", "--rl.steps", "1")
    assert detoxrl([*words, "--run-dir", "first"]) == 0
    again = ["--from", "first", "--policy.base", str(bases["gpt2"])]
    assert detoxrl(["run", *again, "--run-dir", "second"]) == 0
    assert config_from_json(place / "second/config.json").policy.lora_targets == ("c_attn",)
    assert detoxrl(["run", *again, "--policy.lora-targets", "q", "--run-dir", "third"]) == 2


def test_targets_are_not_looked_for_where_no_adapter_is_made(place: Path, no_weights: None) -> None:
    settings = {"policy.base": "model", "data.source": "mine.jsonl", "reward.classifier": "classifier",
                "policy.lora_targets": ("typo",)}  # fmt: skip
    config = recipe("own", settings)
    with pytest.raises(InputError, match=r"policy\.lora_targets = 'typo'"):
        preflight.check_locally(config)
    preflight.check_locally(with_settings(config, {"policy.full_weights": True}))


def test_the_default_is_the_same_adapter_as_its_names(bases: dict[str, Path], architecture: str) -> None:
    explicit = policy_config(architecture)
    usual = load_policy(str(bases[architecture]), None, replace(explicit, lora_targets=None), seed=0)
    named = load_policy(str(bases[architecture]), None, explicit, seed=0)
    weights = [dict(policy.model.named_parameters()) for policy in (usual, named)]
    assert weights[0].keys() == weights[1].keys()
    assert all(bool((weights[0][name] == weights[1][name]).all()) for name in weights[0])


def test_a_type_of_which_nothing_is_known_needs_names(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a_type_that_is_not_known(place)
    monkeypatch.delitem(ARCHITECTURES, "opt")
    words = own("--policy.base", "opt", "--data.max-prompt-tokens", "100")
    table: dict[str, Any] = {"opt": ["q_proj", "v_proj"]}
    monkeypatch.setattr("detoxrl.models.lora.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", table)
    assert detoxrl([*words, "--rl.steps", "1", "--run-dir", "known"]) == 0  # By peft.
    assert config_from_json(place / "known/config.json").policy.lora_targets == ("q_proj", "v_proj")
    capfd.readouterr()
    for unusable in ({}, {"opt": ".*q_proj"}):
        monkeypatch.setattr("detoxrl.models.lora.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING", unusable)
        assert detoxrl([*words, "--run-dir", "unknown"]) == 2
        rule = "policy.lora_targets = None: has no default for a model of type opt; choose from fc1, fc2, k_proj, "
        assert rule in capfd.readouterr().err


def test_an_old_config_keeps_its_targets_and_a_scratch_base_stores_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["run", "quickstart", *SMALL, "--data.limit", "64", "--sft.steps", "3", "--sft.baseline-steps", "0"]
    assert detoxrl([*words, "--run-dir", "new"]) == 0
    assert config_from_json(tmp_path / "new/config.json").policy.lora_targets is None
    assert detoxrl([*words, "--policy.lora-targets", "q", "v", "--run-dir", "old"]) == 0  # As earlier versions.
    for file in ("adapter/adapter_model.safetensors", "samples.jsonl", "base/model.safetensors"):
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "old" / file).read_bytes(), file
    assert detoxrl([*words, "--run-dir", "old", "--resume"]) == 0
    assert config_from_json(tmp_path / "old/config.json").policy.lora_targets == ("q", "v")
