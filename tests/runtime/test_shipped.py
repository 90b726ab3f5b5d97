"""The models that come with the package: what they were made from, that they are whole, and what they do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSeq2SeqLM

from detoxrl.commands.prepare import Prepared, prepare_rows, reward_ingredients
from detoxrl.config.edit import with_settings
from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.data.embedded.corpus import generate_utterances
from detoxrl.data.rows import rows_to_jsonl
from detoxrl.errors import StorageError
from detoxrl.models.base import Base
from detoxrl.models.loading import scratch_base
from detoxrl.rewards.classifier import load_classifier
from detoxrl.runs import Run
from detoxrl.runtime import cache, shipped
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.finetune import examples, pad_batch
from detoxrl.training.sft import warm_start_ingredients

QUICKSTART = recipe("quickstart")


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    return prepare_rows(QUICKSTART)


def run_with_rows(folder: Path, config: Config, prepared: Prepared) -> Run:
    run = Run(RunFolder(folder), config)
    for split, rows in prepared.rows.items():
        run.folder.write(f"data/{split}.jsonl", rows_to_jsonl(rows))
    return run


@pytest.fixture
def packaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package of our own: a copy of its models, which may be changed."""
    models = tmp_path / "models"
    shutil.copytree(shipped.MODELS, models)
    monkeypatch.setattr(shipped, "MODELS", models)
    shipped.manifest.cache_clear()
    yield models
    shipped.manifest.cache_clear()


def test_the_quickstart_starts_from_the_shipped_models(tmp_path: Path, prepared: Prepared) -> None:
    run = run_with_rows(tmp_path, QUICKSTART, prepared)
    # If this fails, the rows or the settings of the quickstart have changed: run `make models` with --write.
    assert shipped.shipped_model("base", warm_start_ingredients(run)) == shipped.MODELS / "base"
    assert shipped.shipped_model("reward", reward_ingredients(0)) == shipped.MODELS / "reward"


@pytest.mark.parametrize(
    ("settings", "same"),
    [
        ({"evaluation.prompts": 20, "rl.validation_prompts": 30}, True),
        ({"rl.steps": 3, "policy.lora_rank": 4, "sft.baseline_steps": 0}, True),
        ({"sft.steps": 100}, False),
        ({"sft.lr": 1e-3}, False),
        ({"seed": 1}, False),
    ],
)
def test_only_what_the_warm_start_follows_from_needs_another_one(
    tmp_path: Path, prepared: Prepared, settings: dict[str, object], same: bool
) -> None:
    run = run_with_rows(tmp_path, with_settings(QUICKSTART, settings), prepared)
    assert (shipped.shipped_model("base", warm_start_ingredients(run)) is not None) == same


def test_other_rows_or_another_seed_need_other_models(tmp_path: Path, prepared: Prepared) -> None:
    fewer = Prepared(
        rows={**prepared.rows, "train": prepared.rows["train"][:-1]}, account={}, tokenizer=prepared.tokenizer
    )
    run = run_with_rows(tmp_path, QUICKSTART, fewer)
    assert shipped.shipped_model("base", warm_start_ingredients(run)) is None
    assert shipped.shipped_model("reward", reward_ingredients(1)) is None


def test_the_shipped_warm_start_is_the_scratch_base_trained(prepared: Prepared) -> None:
    ours = Base.load(str(shipped.MODELS / "base"))
    untrained = scratch_base(prepared.tokenizer, 0)
    shapes = {name: weight.shape for name, weight in untrained.state_dict().items()}
    assert {name: weight.shape for name, weight in ours.model().state_dict().items()} == shapes
    assert ours.model().config.to_diff_dict().items() >= {"d_model": 128, "num_layers": 2}.items()
    text = prepared.rows["train"][0].prompt
    assert ours.tokenizer(text).input_ids == prepared.tokenizer(text).input_ids


def test_the_shipped_models_do_what_the_manifest_says(prepared: Prepared) -> None:
    measured = {**shipped.manifest()["base"]["made"]["measured"], **shipped.manifest()["reward"]["made"]["measured"]}
    base = Base.load(str(shipped.MODELS / "base"))
    pairs = [(row.prompt, row.references[0]) for row in prepared.rows["validation"]]
    inputs, labels = examples(base.tokenizer, pairs, True)
    with torch.no_grad():
        loss = base.model()(**pad_batch(base.tokenizer.pad_token_id, inputs, labels, torch.device("cpu"))).loss
    assert float(loss) == pytest.approx(measured["held-out loss, nats a token"], abs=2e-3)

    utterances = generate_utterances(1_000_003, 2_000)
    toxic, good = {"reward.toxic_label": "hate"}, {"reward.good_label": "nothate"}
    reward = load_classifier(str(shipped.MODELS / "reward"), "reward", toxic, torch.device("cpu"), good)
    toxicity = reward.toxicity([text for text, _ in utterances]).numpy()
    accuracy = np.mean((toxicity >= 0.5) == [hateful for _, hateful in utterances])
    assert accuracy == pytest.approx(measured["reward accuracy"], abs=1e-3)
    assert accuracy > 0.98


def test_a_run_gets_the_model_in_float32_and_every_other_file_as_it_is(tmp_path: Path) -> None:
    def never(target: Path) -> None:
        raise AssertionError("was trained")

    cache.cached("reward", reward_ingredients(0), tmp_path / "reward", never)
    packed = load_file(shipped.MODELS / "reward/model.safetensors")
    unpacked = load_file(tmp_path / "reward/model.safetensors")
    assert {weight.dtype for weight in packed.values()} == {torch.float16}
    assert {weight.dtype for weight in unpacked.values()} == {torch.float32}
    assert all(torch.equal(unpacked[name], weight.float()) for name, weight in packed.items())
    for file in (shipped.MODELS / "reward").iterdir():
        if file.name != "model.safetensors":
            assert (tmp_path / "reward" / file.name).read_bytes() == file.read_bytes()


def test_a_model_that_is_packed_and_unpacked_is_rounded_to_half_precision(
    tmp_path: Path, packaged: Path, bases: dict[str, Path]
) -> None:
    shipped.pack(bases["t5"], "base", ["these", "ingredients"], {"by": "a test"})
    assert shipped.shipped_model("base", ["theseingredients"]) is None
    folder = shipped.shipped_model("base", ["these", "ingredients"])
    assert folder == packaged / "base"
    assert json.loads((packaged / "manifest.json").read_text())["base"]["made"] == {"by": "a test"}

    shipped.unpack(folder, tmp_path / "base")
    given = AutoModelForSeq2SeqLM.from_pretrained(bases["t5"]).state_dict()
    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base").state_dict()
    assert loaded.keys() == given.keys()
    for name, weight in given.items():
        assert loaded[name].dtype == torch.float32
        assert torch.allclose(loaded[name], weight, rtol=2**-11, atol=2**-25)


def test_a_damaged_package_is_an_error_and_not_a_wrong_model(packaged: Path) -> None:
    weights = bytearray((packaged / "reward/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (packaged / "reward/model.safetensors").write_bytes(weights)
    with pytest.raises(StorageError, match=r"reward does not hold the files that were packaged; install detoxrl again"):
        shipped.shipped_model("reward", reward_ingredients(0))


def test_the_shipped_models_are_small() -> None:
    size = sum(file.stat().st_size for file in shipped.MODELS.rglob("*") if file.is_file())
    assert size < 4 * 2**20
