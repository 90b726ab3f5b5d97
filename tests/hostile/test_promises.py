"""What never happens, whatever a user's files hold: foreign code runs, a run is lost, hours are lost."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from backbones import _LLAMA, save_backbone
from detoxrl.config.recipes import recipe
from detoxrl.errors import InputError
from detoxrl.runtime import cache
from detoxrl.runtime.run_folder import RunFolder
from small_runs import contents, detoxrl, own

Said = Callable[[], str]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    """Return a function that returns the one line with which a command has ended, and demands that it is one."""

    def last_line() -> str:
        lines = capfd.readouterr().err.strip().splitlines()
        assert not any("Traceback" in line for line in lines)
        errors = [line for line in lines if line.startswith("detoxrl: ")]
        assert errors == lines[-1:]
        return errors[0]

    return last_line


def refused(words: list[str], place: Path) -> None:
    """Demand that a command ends with 2 and leaves everything as it was."""
    before = contents(place)
    assert detoxrl(words) == 2
    assert contents(place) == before


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil(path: Path, value: float) -> None:
    """Make a weight of a file of safetensors a number that is not finite."""
    weights = load_file(path)
    name = min(name for name, weight in weights.items() if weight.dim() == 2)
    weights[name][0, 0] = value
    save_file(weights, path, metadata={"format": "pt"})


def save_lora(place: Path, base: Path | None = None, **settings: object) -> None:
    """Save a LoRA of the user's model, or of a causal one, with some of peft's settings."""
    kind = AutoModelForSeq2SeqLM if base is None else AutoModelForCausalLM
    settings = {
        "target_modules": ["q", "v"],
        "task_type": "SEQ_2_SEQ_LM" if base is None else "CAUSAL_LM",
        "r": 4,
        **settings,
    }
    model = get_peft_model(kind.from_pretrained(base or place / "model"), LoraConfig(**settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    model.save_pretrained(str(place / "lora"))


# Code of others


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_code_of_a_model_folder_never_runs(part: str, place: Path, said: Said, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        f"open({str(place / 'RAN')!r}, 'w')\nfrom transformers import T5Config as C, T5ForConditionalGeneration as M\n"
    )
    Path("model/mine.py").write_text(code)
    if part == "config":
        edit(
            Path("model/config.json"),
            model_type="mine",
            auto_map={"AutoConfig": "mine.C", "AutoModelForSeq2SeqLM": "mine.M"},
        )
    else:
        edit(Path("model/tokenizer_config.json"), tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.C", None]})
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    if part == "config":
        refused(own("--run-dir", "run"), place)
        assert "needs code that comes with it, which detoxrl never runs" in said()
    else:
        detoxrl(own("--run-dir", "run"))
    assert not Path("RAN").exists()


def test_no_pickle_is_read_under_the_name_of_safetensors(
    place: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_file("model/model.safetensors")
    torch.save(weights, "model/weights.bin")
    os.remove("model/model.safetensors")
    index = Path("model/model.safetensors.index.json")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("a pickle is read"))
    for name in (
        "weights.bin",
        "../weights.safetensors",
        "sub/weights.safetensors",
        "weights.safetensors.bin",
        ".safetensors",
    ):
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
        refused(own("--run-dir", "run"), place)
        assert f"names {name!r} in model.safetensors.index.json" in said()


# Old runs


def test_a_run_is_replaced_only_by_one_that_can_be_written(place: Path, said: Said) -> None:
    assert detoxrl(["prepare", *own("--run-dir", "run")[1:]]) == 0
    before = contents(place / "run")
    for flag, value in (("--data.source", os.fsdecode(b"rows\xff.jsonl")), ("--reward.empty-score", "nan")):
        refused(["prepare", *own("--run-dir", "run", "--overwrite", flag, value)[1:]], place)
        said()

    folder = RunFolder(place / "run")
    with pytest.raises(InputError, match="holds a character that no file can be written with; rename the file"):
        folder.begin(recipe("quickstart"), {"measures": os.fsdecode(b"lora\xff")}, overwrite=True)
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.begin(recipe("quickstart"), {"measures": float("nan")}, overwrite=True)
    assert contents(place / "run") == before


def test_a_folder_that_only_resembles_a_run_is_never_replaced(place: Path, said: Said) -> None:
    for content in (
        '{"recipe": "carrot cake"}',
        '["recipe"]',
        "{" * 100_000,
        '{"recipe": {}, "data": 1, "policy": 2, "rl": 3}',
    ):
        Path("book").mkdir(exist_ok=True)
        Path("book/config.json").write_text(content)
        refused(own("--run-dir", "book", "--overwrite"), place)
        assert "is not a run folder; name another folder; nothing was deleted" in said()


# A user's own code


@pytest.mark.parametrize("when", ["when it is loaded", "when it is called"])
def test_a_function_that_ends_python_is_no_success(when: str, place: Path, said: Said) -> None:
    indent = "    " if when == "when it is called" else ""
    Path("ends.py").write_text(f"import sys\ndef f(prompts, responses):\n    pass\n{indent}sys.exit(0)\n")
    refused(own("--run-dir", "run", "--reward.function", "ends.py:f"), place)
    assert "ends.py:f': ended Python with sys.exit(0); raise an exception instead" in said()


def test_a_function_that_changes_the_folder_does_not_move_the_run(place: Path) -> None:
    Path("moves.py").write_text(
        "import os\nos.chdir('model')\n"
        "def f(prompts, responses):\n    os.chdir('/')\n    return [0.0] * len(responses)\n"
    )
    words = own("--run-dir", "run", "--reward.function", "moves.py:f", "--rl.steps", "1")
    assert detoxrl(words) == 0
    assert Path("run/report.html").is_file()
    assert Path.cwd() == place
    assert not Path("model/run").exists()


# Numbers that would be wrong in silence, or after hours


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("part", ["policy.base", "policy.adapter", "reward.classifier", "evaluation.primary_judge"])
def test_weights_that_are_not_finite_are_found_first(part: str, value: float, place: Path, said: Said) -> None:
    words = own("--run-dir", "run")
    if part == "policy.base":
        spoil(Path("model/model.safetensors"), value)
    elif part == "policy.adapter":
        save_lora(place)
        spoil(Path("lora/adapter_model.safetensors"), value)
        words += ["--policy.adapter", "lora"]
    else:
        copytree("classifier", "spoilt")
        spoil(Path("spoilt/model.safetensors"), value)
        words += [f"--{part}".replace("_", "-"), "spoilt"]
        if part == "evaluation.primary_judge":
            words += ["--evaluation.judge-label", "hate"]
    refused(words, place)
    line = said()
    assert line.startswith(f"detoxrl: {part} = ")
    assert "has weights that are not finite, " in line


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "unknown"])
def test_a_lora_that_changes_its_base_when_it_is_loaded_is_refused(start: str, place: Path, said: Said) -> None:
    save_lora(place)
    edit(Path("lora/adapter_config.json"), init_lora_weights=start)
    refused(own("--run-dir", "run", "--policy.adapter", "lora"), place)
    assert f"was begun with init_lora_weights = '{start}', which changes the base" in said()


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal"])
def test_other_beginnings_of_a_lora_are_taken(start: object, place: Path) -> None:
    save_lora(place)
    edit(Path("lora/adapter_config.json"), init_lora_weights=start)
    words = own("--run-dir", "run", "--policy.adapter", "lora")
    assert detoxrl(["prepare", *words[1:]]) == 0


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_a_lora_with_biases_is_refused_in_one_line(bias: str, place: Path, said: Said) -> None:
    save_lora(place)
    edit(Path("lora/adapter_config.json"), bias=bias)
    refused(own("--run-dir", "run", "--policy.adapter", "lora"), place)
    assert f"changes biases too (bias = '{bias}'), and peft cannot hold two such adapters" in said()


@pytest.mark.parametrize("layer", ["embed_tokens", "lm_head"])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`")
def test_a_lora_on_embeddings_loads_and_comes_back(layer: str, place: Path, bases: dict[str, Path]) -> None:
    save_lora(place, bases["llama"], target_modules=["q_proj", layer])
    assert any(name.endswith("base_layer.weight") for name in load_file("lora/adapter_model.safetensors"))
    words = ["--policy.base", str(bases["llama"]), "--policy.adapter", "lora", "--run-dir", "run", "--rl.steps", "1"]
    assert detoxrl(own(*words, "--data.max-prompt-tokens", "100")) == 0
    assert json.loads(Path("run/validation.jsonl").read_text().splitlines()[0])["kl"] == pytest.approx(0, abs=1e-4)


@pytest.mark.filterwarnings("ignore:You have requested `ensure_weight_tying`")
def test_a_lora_with_a_copy_of_tied_weights_is_refused(place: Path, said: Said) -> None:
    base = save_backbone(lambda: LlamaForCausalLM(LlamaConfig(**_LLAMA, tie_word_embeddings=True)), place / "tied")
    save_lora(place, base, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    words = ["--policy.base", "tied", "--policy.adapter", "lora", "--run-dir", "run", "--data.max-prompt-tokens", "100"]
    refused(own(*words), place)
    assert said().startswith("detoxrl: policy.adapter = ")


def test_a_policy_that_is_not_its_own_reference_is_refused(
    place: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    from detoxrl.models.weights import LoraWeights

    save_lora(place)
    add = LoraWeights.__init__

    def wrong(self: LoraWeights, model: object, reference: str | None, train_encoder: bool) -> None:
        add(self, model, None, train_encoder)  # type: ignore[arg-type]

    monkeypatch.setattr(LoraWeights, "__init__", wrong)  # The reference is the bare base, as in trl 0.11.
    refused(own("--run-dir", "run", "--policy.adapter", "lora"), place)
    line = said()
    assert line.startswith("detoxrl: policy.adapter = ")
    assert "nats a token away from its own reference, so the KL would not begin at 0" in line


# The cache


def test_a_cache_that_cannot_be_written_is_known_before_anything_is_trained(
    place: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETOXRL_CACHE", "mine.jsonl/cache")
    words = ["prepare", "quickstart", "--seed", "77", "--data.limit", "64", "--run-dir", "run"]
    refused(words, place)
    assert "DETOXRL_CACHE = 'mine.jsonl/cache': cannot be written: " in said()


def test_without_a_home_the_cache_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DETOXRL_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(InputError, match="HOME = None: is not set, and this user has no home folder; set DETOXRL_"):
        cache.cache_dir()


# Exports


@pytest.mark.filterwarnings("ignore:Input and output embeddings are no longer tied")
def test_an_export_is_what_was_measured_or_is_refused(place: Path, said: Said) -> None:
    model = AutoModelForSeq2SeqLM.from_pretrained("model")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() + 0.1)
    model.save_pretrained("model")
    save_lora(place, modules_to_save=["shared"])
    words = ["--policy.adapter", "lora", "--policy.lora-targets", "q", "--run-dir", "run", "--rl.steps", "1"]
    assert detoxrl(own(*words)) == 0
    before = contents(place)
    assert detoxrl(["export", "run", "--to", "exported"]) == 2
    assert (
        "trains weights that its base uses twice, so a whole model gives other logits once it is read again" in said()
    )
    assert contents(place) == before
