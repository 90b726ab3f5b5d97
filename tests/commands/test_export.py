"""An export loads without detoxrl, and its card reports what was measured; then it can be pushed to a hub."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any, NamedTuple

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from huggingface_hub.utils import _http

import detoxrl as package
from conftest import disturb, policy_config
from detoxrl.config.edit import config_from_json
from detoxrl.errors import InputError
from detoxrl.models.loading import load_base
from detoxrl.models.lora import load_policy, make_policy
from detoxrl.models.policy import Policy
from detoxrl.models.weights import POLICY
from detoxrl.runtime.run_folder import INITIAL_KEPT
from hub import Hub, hub
from small_runs import SMALL, contents, detoxrl, make_place
from stand_in import stand_in
from test_data import dialogue

SMALLEST, LORA, TOKEN = "google/flan-t5-small", "me/lora", "hf_theSecretThatNobodyMaySee"
OFF = "http://127.0.0.1:9"  # Nothing listens there.
PROMPTS = [f"Summarize the following conversation.\n\n{dialogue(i)}\n\nSummary:" for i in range(3)]
TINY = ["--rl.steps", "1", "--evaluation.prompts", "4", "--evaluation.bootstrap", "50", "--reward.normalise-on", "4"]
OWN = ["run", "own", "--data.source", "mine.jsonl", "--reward.function", "rewards.py:brevity", *SMALL, *TINY,
       "--data.max-prompt-tokens", "100"]  # fmt: skip
QUICK = [
    "run", "quickstart", *SMALL, *TINY, "--data.limit", "96", "--sft.steps", "8", "--sft.batch-size", "8",
    "--sft.baseline-steps", "1",
]  # fmt: skip
# The command of each run and the flags of its export. The bases of the first four are on the hub.
RUNS: dict[str, tuple[list[str], list[str]]] = {
    "hub": (["run", "samsum-detoxify", *SMALL, *TINY, "--policy.base", SMALLEST, "--data.limit", "40"], []),
    "warm": ([*OWN, "--policy.base", SMALLEST, "--sft.steps", "2", "--sft.no-full-weights"], []),
    "lora": ([*OWN, "--policy.base", SMALLEST, "--policy.adapter", LORA], ["--merged"]),
    "bf16": ([*OWN, "--policy.base", SMALLEST, "--policy.bf16"], ["--merged"]),
    "quickstart": (QUICK, []),
    "gpt2": ([*OWN, "--policy.base", "gpt2", "--policy.lora-targets", "c_attn", "--sft.steps", "2",
              "--sft.no-full-weights"], []),
    "llama": ([*OWN, "--policy.base", "llama", "--policy.full-weights", "--sft.full-weights", "--sft.steps", "2"], []),
    "bart": ([*OWN, "--policy.base", "bart", "--policy.full-weights", "--policy.train-encoder"], []),
}  # fmt: skip
ADAPTERS = ("hub", "warm")
MEASURED_AGAIN = ("hub", "gpt2")
LOADING = """
import importlib.abc, json, os, sys

class Nowhere(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "detoxrl":
            raise ImportError("there is no detoxrl here")

sys.meta_path.insert(0, Nowhere())
try:
    import detoxrl
except ImportError:
    pass
else:
    sys.exit("detoxrl is here")
results = {}
for name, case in json.load(sys.stdin).items():
    os.chdir(case["folder"])
    defined = {}
    exec(case["code"], defined)
    torch, model, tokenizer = defined["torch"], defined["model"], defined["tokenizer"]
    greedy, logprobs = [], []
    for prompt, ids in zip(case["prompts"], case["ids"]):
        read, ids = tokenizer(prompt, return_tensors="pt"), torch.tensor([ids])
        ask = {"input_ids": read.input_ids, "attention_mask": read.attention_mask}
        with torch.no_grad():
            if model.config.is_encoder_decoder:
                start = torch.full((1, 1), model.config.decoder_start_token_id)
                logits = model(**ask, decoder_input_ids=torch.cat([start, ids[:, :-1]], 1)).logits
            else:
                both = torch.cat([read.input_ids, ids], 1)
                logits = model(input_ids=both).logits[:, read.input_ids.shape[1] - 1 : -1]
        logprobs.append(logits.float().log_softmax(-1).gather(-1, ids[..., None])[0, :, 0].tolist())
        response = model.generate(**ask, do_sample=False, top_p=None, top_k=None, temperature=None)[0]
        greedy.append(response[1 if model.config.is_encoder_decoder else read.input_ids.shape[1] :].tolist())
    results[name] = {
        "logprobs": logprobs,
        "greedy": greedy,
        "generation": model.generation_config.to_dict(),
        "text": tokenizer.decode(defined["output"]),
    }
assert not any(name.partition(".")[0] == "detoxrl" for name in sys.modules)
print(json.dumps(results))
"""


class Shared(NamedTuple):
    """A folder with a run and an export of each kind, with outputs of the policy here and of the export elsewhere."""

    place: Path
    policies: dict[str, dict[str, Any]]
    elsewhere: dict[str, dict[str, Any]]


Point = Callable[..., None]


def pointing(patch: pytest.MonkeyPatch, cache: Path) -> Point:
    """Return a function that sets the hub's address from then on, and whether HF_HUB_OFFLINE is set."""

    def point(address: str, offline: bool = False) -> None:
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {"ENDPOINT": address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(cache),
                    "HF_HUB_OFFLINE": offline}  # fmt: skip
        for name, value in settings.items():
            patch.setattr(constants, name, value)

    return point


def policy_of(run: Path) -> Policy:
    """Return the policy that a run trained, loaded as the run loads it."""
    config = config_from_json(run / "config.json")
    if config.policy.full_weights:
        return load_policy(str(run / "adapter"), None, config.policy, 0)
    base = str(run / "base") if (run / "base").is_dir() else config.policy.base
    model, tokenizer = load_base(base, bf16=config.policy.bf16)
    # The weights are those of a bfloat16 base. Computing with them in float32 rounds as the export does.
    return make_policy(model.float(), tokenizer, run / "adapter", replace(config.policy, adapter=None), 0)


def outputs(policy: Policy) -> dict[str, Any]:
    """Return what a policy samples, with its log-probs, and its greedy responses."""
    encoded, draws = policy.encode(PROMPTS), torch.rand(3, 12, generator=torch.Generator().manual_seed(0))
    sampled = policy.sample(encoded, draws, 1.0, POLICY)
    likeliest = policy.sample(encoded, draws, 1e-4, POLICY)
    with torch.no_grad():
        logprobs = policy.logprobs(encoded, sampled.ids, 1.0)[0]
    greedy = [row[mask].tolist() for row, mask in zip(likeliest.ids, likeliest.response_mask, strict=True)]
    return {"ids": sampled.ids.tolist(), "logprobs": logprobs.tolist(), "greedy": greedy}


def snippet(export: Path) -> str:
    """Return the code in the card that loads the export."""
    (code,) = re.findall(r"```python\n(.*?)```", (export / "README.md").read_text(), re.DOTALL)
    return str(code)


def load_elsewhere(cases: dict[str, dict[str, Any]], address: str, cache: Path) -> dict[str, dict[str, Any]]:
    """Run the code of each case in a process without detoxrl, and return what its model does."""
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0"}
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error::UserWarning", "-c", LOADING], input=json.dumps(cases), env=environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return dict(json.loads(result.stdout.splitlines()[-1]))


def keep_step(run: Path, step: int) -> None:
    """Make a run one that kept the policy of this step."""
    checkpoint = json.loads((run / "checkpoint.json").read_text())
    (run / "checkpoint.json").write_text(json.dumps(checkpoint | {"kept_step": step}))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """Serve a hub with small models, and a LoRA for the smallest of them."""
    folders = stand_in(tmp_path_factory.mktemp("repositories"), rows=40)
    trained = load_policy(str(folders[SMALLEST]), None, policy_config("t5"), seed=0)
    disturb(trained)
    folders[LORA] = tmp_path_factory.mktemp("lora") / "lora"
    trained.save(folders[LORA])
    (folders[LORA] / "README.md").unlink()
    with hub(folders) as server:
        yield server


@pytest.fixture(scope="module")
def shared(
    served: Hub, bases: dict[str, Path], reward_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Shared:
    place = make_place(tmp_path_factory.mktemp("place"), bases, reward_folder)
    for name in ("gpt2", "llama", "bart"):
        copytree(bases[name], place / name)
    policies = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        pointing(patch, tmp_path_factory.mktemp("cache"))(served.address)
        for name, (words, flags) in RUNS.items():
            run = place / "runs" / name
            assert detoxrl([*words, "--run-dir", str(run)]) == 0, name
            # A tiny run may have kept its initial policy. The export has to differ from that.
            moved = policy_of(run)
            disturb(moved)
            moved.save(run / "adapter")
            if name in MEASURED_AGAIN:
                keep_step(run, 1)
                assert detoxrl(["evaluate", f"runs/{name}"]) == 0
            policies[name] = outputs(policy_of(run))
            assert detoxrl(["export", f"runs/{name}", *flags]) == 0, name
    _http.close_session()
    cases = {
        name: {"folder": str(place / f"runs/{name}-export"), "code": snippet(place / f"runs/{name}-export"),
               "prompts": PROMPTS, "ids": policies[name]["ids"]}
        for name in RUNS
    }  # fmt: skip
    return Shared(place, policies, load_elsewhere(cases, served.address, tmp_path_factory.mktemp("home")))


@pytest.fixture
def here(shared: Shared, served: Hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Change to the folder with the runs; the hub stores what `me` and `you` push."""
    monkeypatch.chdir(shared.place)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    served.writers, served.kept = {TOKEN: "me", "another": "you"}, tmp_path / "pushed"
    pointing(monkeypatch, tmp_path / "cache")(served.address)
    yield shared.place
    served.heal()
    _http.close_session()


# Weights


@pytest.mark.parametrize("name", RUNS)
def test_the_code_in_the_card_loads_the_policy_without_detoxrl(shared: Shared, name: str) -> None:
    here, elsewhere = shared.policies[name], shared.elsewhere[name]
    for expected, logprobs in zip(here["logprobs"], elsewhere["logprobs"], strict=True):
        assert expected == pytest.approx(logprobs, abs=1e-4)

    greedy = [ids[: len(expected)] for expected, ids in zip(here["greedy"], elsewhere["greedy"], strict=True)]
    assert greedy == here["greedy"]
    assert elsewhere["text"].strip()
    assert "report is late" not in elsewhere["text"]  # It is the response, not the prompt.
    settings = ("do_sample", "temperature", "top_k", "top_p", "max_new_tokens")
    generation = {setting: elsewhere["generation"][setting] for setting in settings}
    assert generation == {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "max_new_tokens": 12}


def test_an_adapter_names_its_base_on_the_hub_and_a_local_base_is_exported_whole(shared: Shared, served: Hub) -> None:
    for name in RUNS:
        export = shared.place / f"runs/{name}-export"
        files = {path.name for path in export.iterdir()}
        assert {"README.md", "generation_config.json", "tokenizer.json"} < files
        assert ("adapter_model.safetensors" in files) == (name in ADAPTERS) != ("model.safetensors" in files)
        if name in ADAPTERS:
            settings = json.loads((export / "adapter_config.json").read_text())
            assert settings["base_model_name_or_path"] == SMALLEST
            assert settings["revision"] == served.main[SMALLEST]


# The card


@pytest.mark.parametrize("name", RUNS)
def test_the_card_has_the_numbers_of_the_run_and_neither_texts_nor_paths(shared: Shared, name: str) -> None:
    run, export = shared.place / "runs" / name, shared.place / f"runs/{name}-export"
    evaluation = json.loads((run / "eval.json").read_text())
    card = ModelCard.load(export / "README.md")
    results = {result.metric_name: (result.metric_type, result.metric_value) for result in card.data.eval_results}
    expected = {}
    primary = evaluation["primary_judge"]
    kept = evaluation["toxicity"][primary]["verdict"] == INITIAL_KEPT
    models = {"after": "this model"} if kept else {"after": "this model", "before": "the initial policy"}
    for side, whose in models.items():
        for judge, toxicity in evaluation["toxicity"].items():
            expected[f"toxicity by {judge}, {whose}"] = ("toxicity", toxicity[side]["mean"])
        for measure, values in evaluation["quality"].items():
            expected[f"{measure}, {whose}"] = (measure, values[side])
    assert results == expected
    if name in MEASURED_AGAIN:
        assert evaluation["quality"]["score"]["before"] != evaluation["quality"]["score"]["after"]

    assert f"{evaluation['n_prompts']} held-out prompts" in card.text
    assert f"{evaluation['samples_per_prompt']} samples each" in card.text
    row = next(line for line in card.text.splitlines() if f"| Toxicity by {primary} |" in line)
    if kept:
        before = evaluation["toxicity"][primary]["before"]["mean"]
        assert row == f"| Toxicity by {primary} | {before:.3f} |"
        assert not re.search("interval|after minus", card.text)
    else:
        interval = evaluation["toxicity"][primary]["difference"]
        for value in interval["low"], interval["high"]:
            assert f"{abs(value):.3f}" in row
    assert "No licence is stated" in card.text
    assert card.data.license is None
    responses: set[str] = set()
    for line in (run / "samples.jsonl").read_bytes().splitlines():
        for texts in json.loads(line)["responses"].values():
            responses.update(texts)
    assert not [text for text in responses if len(text) > 20 and text in card.text]
    everything = b"".join(data for path, data in contents(export).items() if path.suffix != ".safetensors")
    for secret in (str(shared.place), str(shared.place.parent), str(Path.home()), "snapshots"):
        assert secret.encode() not in everything, secret


def test_the_card_names_base_data_and_command(shared: Shared, served: Hub) -> None:
    card = ModelCard.load(shared.place / "runs/hub-export/README.md")
    assert (card.data.base_model, card.data.library_name) == (SMALLEST, "peft")
    assert card.data.datasets == ["knkarthick/samsum"]
    commit = served.main["datasets/knkarthick/samsum"]
    assert {result.dataset_revision for result in card.data.eval_results} == {commit}
    assert "detoxrl run samsum-detoxify --seed 0" in card.text
    assert f"--data.source knkarthick/samsum@{commit}" in card.text
    card = ModelCard.load(shared.place / "runs/gpt2-export/README.md")
    assert (card.data.base_model, card.data.library_name) == (None, "transformers")
    assert "--policy.base gpt2" in card.text
    assert "--data.source mine.jsonl" in card.text
    assert "--reward.function rewards.py:brevity" in card.text
    assert "Local paths are shown as file or folder names only." in card.text
    quick = (shared.place / "runs/quickstart-export/README.md").read_text()
    assert "(not independent: the reward model itself)" in quick
    assert "very small model, trained on generated dialogues" in quick
    assert "Local paths" not in quick


@pytest.mark.parametrize(
    ("verdict", "kept", "words"),
    [
        ("less toxic", 1, []),
        (
            "no detectable difference",
            1,
            ["**This model is not shown to be less toxic than the model that training started from.**"],
        ),
        ("more toxic", 1, ["**This model is more toxic than the model that training started from.**"]),
        (
            "no detectable difference",
            0,
            [
                "**Training found no policy better than the initial one, so this is the model that training started",
                "Initial policy kept: no checkpoint was less toxic without losing quality (mean toxicity by ",
                "a complete model: the initial policy of a run of detoxrl, unchanged by its",
            ],
        ),
    ],
)
def test_a_run_that_failed_says_so_first(here: Path, tmp_path: Path, verdict: str, kept: int, words: list[str]) -> None:
    run = copytree(here / "runs/gpt2", tmp_path / "run")
    evaluation = json.loads((run / "eval.json").read_text())
    evaluation["toxicity"][evaluation["primary_judge"]]["verdict"] = verdict
    (run / "eval.json").write_text(json.dumps(evaluation))
    keep_step(run, kept)
    exported = package.export(run)
    assert exported.folder == tmp_path / "run-export"
    said = exported.what.startswith("initial policy, because training found none better; whole model")
    assert said is (kept == 0)
    head = (exported.folder / "README.md").read_text().partition("## How to load it")[0]
    assert [word for word in words if word not in head] == []
    assert ("**" in head) == bool(words)


# Bad input


def refused(words: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """Return the line with which an export is refused; fail if it writes anything or prints the token."""
    before = contents(Path())
    capfd.readouterr()
    assert detoxrl(["export", *words]) == 2
    output = capfd.readouterr()
    assert len(output.err.splitlines()) == 1, output.err
    assert TOKEN not in output.err + output.out
    assert contents(Path()) == before
    return output.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "run folder = '': is missing; run `detoxrl export runs/NAME`"),
        (["runs/none"], "run folder = 'runs/none': does not exist"),
        (["gpt2"], "is not the config of a run"),
        (["runs/gpt2"], "--to = 'runs/gpt2-export': already exists; add --overwrite, or name another folder"),
        (["runs/gpt2", "--to", "runs/bart", "--overwrite"], "already exists and is not an export; name a new folder"),
        (["runs/gpt2", "--to", "runs/gpt2/adapter", "--overwrite"], "already exists and is not an export"),
        (["runs/gpt2", "--to", "mine.jsonl/x"], "--to = 'mine.jsonl/x': cannot be created: "),
        (["runs/gpt2", "--to", "new", "--private"], "--private = True: requires --push; add --push OWNER/NAME"),
        (["runs/gpt2", "--to", "new", "--push", "name"], "--push = 'name': is not the name of a repository; write"),
        (["runs/gpt2", "--to", "new", "--push", "me/a/b"], "--push = 'me/a/b': is not the name of a repository"),
        (["runs/gpt2", "--to", "new", "--pushed", "me/a"], "flag = '--pushed': is not known"),
    ],
)
def test_an_export_that_is_refused_is_one_line(
    here: Path, words: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(words, capfd)


def test_only_a_measured_run_that_trained_is_exported(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    copytree(here / "runs/gpt2", tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    Path("run/.lock").touch()
    seconds = json.loads(Path("run/seconds.json").read_text())
    Path("run/seconds.json").write_text(
        json.dumps({k: v for k, v in seconds.items() if k not in ("evaluate", "report")})
    )
    assert "has no evaluation for the model card; run `detoxrl evaluate run` first" in refused(["run"], capfd)
    account = json.loads(Path("run/run.json").read_text())
    measures = account["measures"] | {"names": {"before": "a", "after": "b"}}
    Path("run/run.json").write_text(json.dumps(account | {"measures": measures}))
    assert "measures policies that it did not train; name a run that trained one" in refused(["run"], capfd)
    Path("run/run.json").write_text(json.dumps(account))
    Path("run/adapter").rename("elsewhere")
    assert "has no adapter; run `detoxrl train run` first" in refused(["run"], capfd)


def test_an_earlier_export_is_replaced_whole(here: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "it"
    exported = package.export("runs/warm", to=target)
    assert exported.what == f"LoRA adapter of {config_from_json(here / 'runs/warm/config.json').policy.base}"
    with pytest.raises(InputError, match="already exists; add --overwrite"):
        package.export("runs/warm", to=target)
    capfd.readouterr()
    assert detoxrl(["export", "runs/warm", "--to", str(target), "--merged", "--overwrite"]) == 0
    assert not (target / "adapter_model.safetensors").exists()
    assert capfd.readouterr().out.splitlines() == [
        f"whole model with the LoRA merged into it, as asked: {target}",
        f"next: read {target / 'README.md'}, then share it: --overwrite --push OWNER/NAME",
    ]
    assert "because its base is not on a hub" in package.export("runs/gpt2", to=tmp_path / "other").what


# The hub


@pytest.mark.parametrize("name", ["warm", "quickstart"])
def test_a_pushed_export_comes_back_the_same_and_loads_by_its_name(
    here: Path, served: Hub, shared: Shared, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    repository = f"me/{name}"
    assert detoxrl(["export", f"runs/{name}", "--to", str(tmp_path / "it"), "--push", repository, "--private"]) == 0
    output = capfd.readouterr()
    assert f"look at {served.address}/{repository}" in output.out
    assert repository in served.private
    back = Path(huggingface_hub.snapshot_download(repository))
    downloaded = {path: data for path, data in contents(back).items() if path.name != ".gitattributes"}
    assert downloaded == contents(tmp_path / "it")
    assert TOKEN.encode() not in b"".join(downloaded.values()) + (output.out + output.err).encode()
    assert ModelCard.load(repository).data.eval_results == ModelCard.load(tmp_path / "it/README.md").data.eval_results
    case = {"folder": str(tmp_path), "code": snippet(back), "prompts": PROMPTS, "ids": shared.policies[name]["ids"]}
    result = load_elsewhere({name: case}, served.address, tmp_path / "home")[name]
    assert result["logprobs"] == shared.elsewhere[name]["logprobs"]


def test_only_an_earlier_export_is_replaced_on_the_hub(
    here: Path, served: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["export", "runs/warm", "--to", str(tmp_path / "it"), "--overwrite", "--push"]
    assert detoxrl([*words, "me/replaced"]) == 0
    with pytest.raises(InputError, match=r"exists already at http.*; choose another name, or add --overwrite"):
        package.export("runs/warm", to=tmp_path / "new", push="me/replaced")
    assert detoxrl([*words, "me/replaced", "--merged"]) == 0
    pushed = served.commits["me/replaced"][served.main["me/replaced"]]
    assert {path.name for path in pushed.iterdir()} == {*map(str, contents(tmp_path / "it")), ".gitattributes"}
    capfd.readouterr()
    assert detoxrl([*words, "me/replaced", "--private"]) == 2
    assert "exists already and is public; make it private on the hub" in capfd.readouterr().err
    before = served.main[LORA]
    assert detoxrl([*words, LORA]) == 2
    assert "is not an export of detoxrl; choose another name" in capfd.readouterr().err
    assert served.main[LORA] == before


@pytest.mark.parametrize(
    ("fault", "name", "message"),
    [
        (None, "you/it", "was refused by HUB: the token may not write there; set HF_TOKEN to a token with write"),
        ("not shown", "me/it", "was refused by HUB: the token is not valid; set HF_TOKEN"),
        ("too many", "me/it", "was answered by HUB with status 429; try again later"),
        ("down", "me/it", "was answered by HUB with status 503; try again later"),
        ("nobody", "me/it", "could not be sent to HUB (ConnectError); try again later"),
    ],
)
def test_a_refused_push_is_one_line_and_the_export_stays(
    here: Path,
    served: Hub,
    tmp_path: Path,
    fault: str | None,
    name: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    if fault == "nobody":
        pointing(monkeypatch, tmp_path / "cache")(OFF)
    elif fault:
        served.fail(name, fault)
    assert detoxrl(["export", "runs/gpt2", "--to", str(tmp_path / "it"), "--push", name]) == 2
    output = capfd.readouterr()
    assert message.replace("HUB", constants.ENDPOINT) in output.err
    assert output.err.rstrip().endswith(f"; the export stays in {tmp_path / 'it'}")
    assert len(output.err.splitlines()) == 1
    assert TOKEN not in output.err + output.out
    assert (tmp_path / "it/model.safetensors").is_file()
    assert name not in served.main


@pytest.mark.parametrize(
    ("token", "offline", "message"),
    [("", False, "needs a token, and there is none; set HF_TOKEN, or run `hf auth login`"),
     (TOKEN, True, "needs the hub, and HF_HUB_OFFLINE is set; unset it,"),
     ("hf_\x01theSecret", False, "was refused by HUB: the token is not valid; set HF_TOKEN to")],
)  # fmt: skip
def test_a_push_that_cannot_succeed_writes_nothing_and_prints_no_token(
    here: Path, served: Hub, tmp_path: Path, token: str, offline: bool, message: str, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    pointing(monkeypatch, tmp_path / "cache")(served.address, offline)
    assert detoxrl(["export", "runs/gpt2", "--to", str(tmp_path / "it"), "--push", "me/it"]) == 2
    output = capfd.readouterr()
    assert message.replace("by HUB", f"by {served.address}") in output.err
    assert "theSecret" not in output.err + output.out
    assert (tmp_path / "it").exists() == token.startswith("hf_\x01")
