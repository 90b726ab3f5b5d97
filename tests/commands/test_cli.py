"""End to end through the real command line, and what it says to bad input."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree, rmtree

import pytest
import torch

from detoxrl.commands import responses as sampling
from detoxrl.config.edit import flatten
from detoxrl.config.recipes import recipe
from detoxrl.errors import InputError
from detoxrl.evaluation.sharpening import Sharpening
from detoxrl.models.sampling import Distribution, Sample
from detoxrl.runs import Run
from detoxrl.runtime.run_folder import RunFolder
from forked import forked
from small_runs import detoxrl as detoxrl_here
from small_runs import same_end, without_timings

SMALL = [
    "--data.limit", "96", "--rl.validation-prompts", "8", "--evaluation.prompts", "12",
    "--sft.steps", "25", "--sft.batch-size", "8", "--sft.baseline-steps", "2",
    "--seed", "3",  # Its reward model does not come with the package, and it keeps a trained policy.
    "--generation.max-new-tokens", "12", "--reward.normalise-on", "16",
    "--rl.steps", "2", "--rl.batch-size", "8", "--rl.minibatch-size", "4", "--rl.microbatch-size", "4",
    "--rl.validate-every", "1", "--evaluation.samples-per-prompt", "2", "--evaluation.bootstrap", "200",
    "--evaluation.primary-judge", "alt-profanity-check", "--evaluation.other-judges", "none",
]  # fmt: skip


def detoxrl(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning:detoxrl", "-m", "detoxrl", *words],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `run quickstart`, made small, has run."""
    folder = tmp_path_factory.mktemp("place")
    result = detoxrl("run", "quickstart", *SMALL, cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "stdout").write_text(result.stdout)
    return folder


@pytest.fixture(scope="module")
def run(place: Path) -> Path:
    return place / "runs" / "quickstart"


def test_a_run_ends_with_its_table_and_says_what_it_made_and_where(place: Path, run: Path) -> None:
    shown = (place / "stdout").read_text()
    assert "12 held-out prompts, 2 samples each" in shown
    assert "Facts kept" in shown
    assert "report.html" in shown
    for name in ("report.html", "eval.json", "metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "checkpoint.json"):
        assert (run / name).stat().st_size > 0


def test_eval_json_keeps_its_contract(run: Path) -> None:
    found = json.loads((run / "eval.json").read_text())
    assert found["n_prompts"] == 12
    assert found["samples_per_prompt"] == 2
    assert found["primary_judge"] == "alt-profanity-check"
    assert set(found["toxicity"]) == {"alt-profanity-check", "reward classifier"}
    for systems in (found, *found["baselines"].values()):
        for result in systems["toxicity"].values():
            assert {"before", "after", "floor", "share_removed", "difference", "relative", "verdict"} == set(result)
            told = {"mean", "std", "toxic_ratio", "max", "p50", "p90", "p95", "p99", "expected_max_toxicity",
                    "toxicity_probability"}  # fmt: skip
            assert told == set(result["before"]) == set(result["after"])
            assert {"mean", "low", "high", "p", "detectable"} == set(result["difference"])
            change = result["after"]["mean"] - result["before"]["mean"]
            assert result["difference"]["mean"] == pytest.approx(change, abs=1e-9)
            assert result["difference"]["low"] <= result["difference"]["mean"] <= result["difference"]["high"]
        names = {"facts", "quarrel_reported", "rouge_l", "length", "empty_rate", "insult_rate", "insult_rate_unseen",
                 "score", "chrf", "copied", "similarity", "refusal_rate"}  # fmt: skip
        of_draws = {"distinct_1", "distinct_2", "distinct_3", "entropy"}
        if "kl_bound" in systems:  # best of n has 4 samples or 1, the start 2, and they are picked
            assert set(systems["quality"]) == names | {"nll"}
        elif systems is found["baselines"]["word_filter"]:  # nobody sampled its tokens
            assert set(systems["quality"]) == (names | of_draws) - {"entropy"}
        else:
            assert set(systems["quality"]) == names | of_draws | {"nll"}
        assert ("perplexity" in systems) == ("nll" in systems["quality"])
    assert found["perplexity"]["ratio"]["mean"] == pytest.approx(
        found["perplexity"]["after"] / found["perplexity"]["before"]
    )
    # Nothing but the temperature lies between the initial policy and itself.
    assert found["quality"]["nll"]["before"] == found["quality"]["entropy"]["before"]
    names = ["word_filter", "best_of_4", "best_of_16", "sharpened", "sft_civil", "sft_best_of_4", "dpo_best_and_worst"]
    if found["quality"]["entropy"]["difference"]["mean"] >= 0:
        names.remove("sharpened")
    assert [*found["baselines"]] == names
    assert (found["sharpening"]["temperature"] is None) == (found["sharpening"]["left_out"] is not None)
    assert ("sharpened" in names) == (found["sharpening"]["left_out"] is None)
    for name, one in found["baselines"].items():
        assert {"toxicity", "quality", "quality_by", "verdict"} == set(one["after"])
        assert ("kl_bound" in one) == name.startswith("best_of")
    assert {"spearman", "kappa", "same_side"} == set(found["agreement"]["alt-profanity-check and reward classifier"])
    assert set(found["identity"]) == {"judges", "reward", "policy"}
    assert set(found["identity"]["judges"]) == set(found["toxicity"])
    assert found["identity"]["policy"] is None
    assert found["names"] == {}
    assert {"prepare", "sft", "train", "evaluate"} <= set(found["seconds"])


def records(path: Path) -> list[dict[str, float]]:
    with path.open() as lines:
        return [json.loads(line) for line in lines]


def test_metrics_are_logged_each_step_and_every_key_is_documented(run: Path) -> None:
    steps, validations = records(run / "metrics.jsonl"), records(run / "validation.jsonl")
    assert [record["step"] for record in steps] == [0, 1]
    assert [record["step"] for record in validations] == [0, 1, 2]
    for record in steps:
        assert {"step", "kl/reference", "ratio/max", "score/mean"} <= set(record)
    assert abs(steps[0]["kl/reference"]) < 1e-4
    assert all(record["ratio/first_error"] < 1e-5 for record in steps)
    documented = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    for key in {key for record in steps + validations for key in record}:
        assert f"`{key}`" in documented, key


def test_each_system_is_sampled_with_its_own_adapter(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def name_adapters(
        source: Distribution, initial: Distribution, prompts: list[object], *others: object
    ) -> list[list[Sample]]:
        return [[Sample(f"{source.adapter} {initial.adapter} {source.encoder}", None)] for _ in prompts]

    monkeypatch.setattr(sampling, "sample_with_likelihoods", name_adapters)
    folder, config = RunFolder.open(run)
    small = replace(config, generation=replace(config.generation, batch_size=10))
    found = sampling.sampled_responses(Run(folder, small), {})
    # A stop loses one pass at most: 10 responses, or those to one prompt if it has more.
    batches: dict[str, list[int]] = {}
    for record in records(run / "responses.jsonl"):
        batches.setdefault(record["policy"], []).append(len(record["responses"]))
    assert config.evaluation.samples_per_prompt == 2
    assert batches["before"] == [1] * 12
    assert batches["after"] == [5, 5, 2]
    (run / "responses.jsonl").unlink()
    assert found.sharpening == Sharpening(None, "the two policies have different tokens")  # for all that is known
    assert {name: samples[0][0].text for name, samples in found.samples.items()} == {
        "before": "None None None",
        "after": "measured0 None None",
        "sft_civil": "measured1 None None",
        "sft_best_of_4": "measured2 None None",
        "dpo_best_and_worst": "measured3 None None",
    }


def test_a_run_without_its_reward_model_keeps_its_results(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    copytree(run, tmp_path / "run")
    rmtree(tmp_path / "run/reward")
    assert detoxrl_here(["evaluate", str(tmp_path / "run"), "--evaluation.bootstrap", "100"]) == 2
    assert "has no reward" in capfd.readouterr().err
    assert (tmp_path / "run/eval.json").read_bytes() == (run / "eval.json").read_bytes()


def test_stages_in_their_own_processes_give_the_same_run(run: Path, tmp_path: Path) -> None:
    for command in (["prepare", "quickstart", *SMALL, "--run-dir", "staged"], ["sft", "staged"], ["train", "staged"],
                    ["evaluate", "staged"], ["report", "staged"]):  # fmt: skip
        result = forked(command, tmp_path)
        assert result.returncode == 0, result.stderr
    staged = tmp_path / "staged"
    assert records(staged / "validation.jsonl") == records(run / "validation.jsonl")
    assert without_timings(staged / "metrics.jsonl") == without_timings(run / "metrics.jsonl")
    assert (staged / "samples.jsonl").read_bytes() == (run / "samples.jsonl").read_bytes()
    for name in ("adapter/adapter_model.safetensors", "base/model.safetensors"):
        assert (staged / name).read_bytes() == (run / name).read_bytes()


def test_the_adapter_loads_on_the_base_with_peft_and_generates(run: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    model = AutoModelForSeq2SeqLM.from_pretrained(run / "base")
    model = PeftModel.from_pretrained(model, str(run / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(run / "base")
    prompt = tokenizer("Summarize: #Person1#: You lost my atlas!", return_tensors="pt")
    assert torch.is_tensor(model.generate(**prompt, max_new_tokens=5))


def test_an_existing_run_is_not_touched_without_being_asked(
    place: Path, run: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (run / "eval.json").read_bytes()
    monkeypatch.chdir(place)
    assert detoxrl_here(["run", "quickstart", *SMALL]) == 2
    assert "already exists; add --resume to resume it, --overwrite to replace it" in capfd.readouterr().err
    assert (run / "eval.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["run", "quikstart"], "recipe = 'quikstart': is not a recipe; did you mean quickstart?"),
        (["run"], "recipe = '': is missing; run `detoxrl run RECIPE` with a name from `detoxrl recipes`"),
        (["fly"], "command = 'fly': is not a command"),
        (["train"], "run folder = '': is missing; run `detoxrl train runs/NAME`"),
        (["run", "quickstart", "--rl.batch-size", "1"], "rl.batch_size = 1: must be 2 or more"),
        (["run", "quickstart", "--rl.clip", "0"], "rl.clip = 0.0: must be above 0; give a larger value"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2_and_writes_nothing(
    tmp_path: Path, words: list[str], message: str
) -> None:
    result = detoxrl(*words, cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr.startswith("detoxrl: " + message)
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_stage_out_of_order_names_the_one_to_run_first(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert detoxrl_here(["prepare", "quickstart", *SMALL, "--run-dir", "r"]) == 0
    assert detoxrl_here(["train", "r"]) == 2
    assert "has not finished sft; run `detoxrl sft r` first, or use --resume" in capfd.readouterr().err


def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = "import sys, detoxrl.cli; detoxrl.cli.main(['--help']); assert 'torch' not in sys.modules, 'torch imported'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "detoxrl run RECIPE" in result.stdout


def test_a_recipe_lists_every_setting_with_its_default_without_torch() -> None:
    code = (
        "import sys, detoxrl.cli\n"
        "try: detoxrl.cli.main(['run', 'own', '--help'])\n"
        "except SystemExit: assert 'torch' not in sys.modules"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    for name in flatten(asdict(recipe("own"))):
        assert name == "recipe" or f"--{name.replace('_', '-')}" in result.stdout, name


def test_a_closed_pipe_is_no_error() -> None:
    words = [sys.executable, "-m", "detoxrl", "run", "own", "--help"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""


KILLED = """
import importlib, os, signal, sys
from detoxrl.runtime import checkpoint
from detoxrl import cli
checkpoint.SHARE = 1e9  # a checkpoint at every step
place, name, calls = sys.argv[1].split(":")
module = importlib.import_module(place)
real, left = getattr(module, name), [int(calls)]

def deadly(*given, **named):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)

setattr(module, name, deadly)
cli.main(sys.argv[2:])
"""


def test_kill_9_in_every_stage_and_the_run_ends_as_if_nothing_had_happened(run: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "DETOXRL_CACHE": str(tmp_path / "cache")}
    words = ["run", "quickstart", *SMALL, "--resume", "--run-dir", "broken"]
    for deadly in (
        "detoxrl.rewards.fit:batch_indices:60",
        "detoxrl.training.finetune:batch_indices:12",
        "detoxrl.training.learner:collect_rollout:2",
        "detoxrl.commands.responses:sample_with_likelihoods:2",
    ):
        killed = forked([deadly, *words], tmp_path, environment, KILLED)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    ended = forked(["run", "--resume", "--run-dir", "broken"], tmp_path, environment)
    assert ended.returncode == 0, ended.stderr
    assert "warm start" not in ended.stderr  # only what was left was done
    same_end(run, tmp_path / "broken")


def test_a_second_process_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    run = tmp_path / "run"
    script = "import sys, time; from pathlib import Path; from detoxrl.runtime.run_folder import RunFolder"
    script += "\nwith RunFolder(Path(sys.argv[1])).locked(): print('held', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", script, str(run)], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(InputError, match=r"run folder = '.*run': is in use by another process"),
            RunFolder(run).locked(),
        ):
            raise AssertionError("two processes hold one folder")
        other.kill()  # the lock of a killed process is gone with it
        other.wait()
    with RunFolder(run).locked(), pytest.raises(InputError, match="in use"), RunFolder(run).locked():
        raise AssertionError("two hold one folder")
