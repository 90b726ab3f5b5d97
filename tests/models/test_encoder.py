"""Encoders under a new head, and LoRAs of classifiers: what is written is what is read, by us and by peft alone."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from detoxrl.errors import InputError
from detoxrl.models.encoder import load_under_new_head, output_layer, save_classifier, with_lora
from detoxrl.models.reader import load_reader
from encoders import make_encoder

CPU = torch.device("cpu")
TEXTS = ["You are a stupid pig.", "Thank you."]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_encoder(request.param, tmp_path_factory.mktemp("encoder") / str(request.param))


@pytest.fixture(scope="module")
def adapter(encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A LoRA far from its start, in a folder, and its logits of the texts."""
    model, tokenizer = load_under_new_head(str(encoder), "encoder", ("a", "b", "c"), 3, "multi_label_classification")
    adapted = with_lora(model, 4, str(encoder), 4).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in adapted.parameters():
            if weight.requires_grad:
                weight.add_(0.2 * torch.randn_like(weight))
    folder = tmp_path_factory.mktemp("adapter") / "fitted"
    save_classifier(adapted, tokenizer, folder)
    with torch.no_grad():
        return folder, adapted(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits


def test_a_new_head_follows_from_its_seed_and_leaves_torchs_generator_alone(encoder: Path) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    weights = []
    for seed in (3, 3, 4):
        model, _ = load_under_new_head(str(encoder), "encoder", ("a", "b"), seed)
        layer = output_layer(model)
        assert layer is not None
        weights.append(layer.weight)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert model.config.id2label == {0: "a", 1: "b"}


def test_a_lora_changes_every_linear_layer_of_the_encoder_and_saves_the_whole_head(encoder: Path) -> None:
    model, _ = load_under_new_head(str(encoder), "encoder", ("a", "b"), 3)
    adapted = with_lora(model, 4, str(encoder), 4)
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".encoder." in name and "lora" not in name
    ]
    assert sum(name.endswith("base_layer") for name in linear) == len(linear) == 2 * 6
    trained = {name for name, weight in adapted.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or "modules_to_save" in name for name in trained)
    assert any("classifier" in name for name in trained)
    head = [name for name, _ in model.named_parameters() if "pooler" in name or "classifier" in name]
    assert not any("lora_" in name for name in head)
    assert any("pooler" in name for name in trained) == any("pooler" in name for name in head)


def test_an_adapter_is_read_as_a_classifier_and_merged(adapter: tuple[Path, torch.Tensor]) -> None:
    folder, expected = adapter
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    model, tokenizer = load_reader(str(folder), "field", "remedy", CPU)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not isinstance(model, PeftModel)
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    logits = model.eval()(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)


def test_peft_alone_reads_the_adapter_as_its_card_says(encoder: Path, adapter: tuple[Path, torch.Tensor]) -> None:
    folder, expected = adapter
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForSequenceClassification.from_pretrained(encoder, config=AutoConfig.from_pretrained(folder))
    model = PeftModel.from_pretrained(base, folder).eval()
    logits = model(**tokenizer(TEXTS, return_tensors="pt", padding=True)).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["task_type"] == "SEQ_CLS"
    assert settings["base_model_name_or_path"] == str(encoder)
    assert "classifier" in settings["modules_to_save"]


def test_an_adapter_of_another_base_or_without_a_part_is_bad_input(
    adapter: tuple[Path, torch.Tensor], tmp_path: Path
) -> None:
    folder = copytree(adapter[0], tmp_path / "copy")
    weights = load_file(folder / "adapter_model.safetensors")
    save_file({name: weight for name, weight in weights.items() if "classifier" not in name},
              folder / "adapter_model.safetensors")  # fmt: skip
    with pytest.raises(InputError, match=r"field = .*: does not load on the base: .*classifier"):
        load_reader(str(folder), "field", "remedy", CPU)

    settings = json.loads((folder / "adapter_config.json").read_text())
    for change, message in (
        ({"base_model_name_or_path": str(tmp_path / "gone")}, "gone': is neither an existing path nor a hub id"),
        ({"base_model_name_or_path": None}, "names no model in base_model_name_or_path"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps(settings | change))
        with pytest.raises(InputError, match=message):
            load_reader(str(folder), "field", "remedy", CPU)


def test_an_encoder_with_missing_layers_is_bad_input(encoder: Path, tmp_path: Path) -> None:
    folder = copytree(encoder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"encoder = .*: lacks weights such as .*encoder\.layer\.1\.output\.dense"):
        load_under_new_head(str(folder), "encoder", ("a", "b"), 3)


def test_a_head_for_other_labels_is_replaced(encoder: Path, tmp_path: Path) -> None:
    model, tokenizer = load_under_new_head(str(encoder), "encoder", ("a", "b", "c"), 3)
    save_classifier(model, tokenizer, tmp_path / "three")
    again, _ = load_under_new_head(str(tmp_path / "three"), "encoder", ("x",), 3, "regression")
    assert again.config.num_labels == 1
    assert again.config.problem_type == "regression"
    same, _ = load_under_new_head(str(tmp_path / "three"), "encoder", ("x", "y", "z"), 9)
    for (name, weight), (_, other) in zip(model.named_parameters(), same.named_parameters(), strict=True):
        assert torch.equal(weight, other), name


@pytest.mark.parametrize("rank", [None, 4])
def test_a_causal_model_whose_config_names_no_padding_reads_several_texts(tmp_path: Path, rank: int | None) -> None:
    folder = make_encoder("qwen2", tmp_path / "base")
    assert AutoConfig.from_pretrained(folder).pad_token_id is None
    model, tokenizer = load_under_new_head(str(folder), "encoder", ("a", "b"), 3)
    adapted = model if rank is None else with_lora(model, rank, str(folder), 4)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        logits = adapted.eval()(**inputs).logits
    save_classifier(adapted, tokenizer, tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved").pad_token_id == tokenizer.pad_token_id

    read, _ = load_reader(str(tmp_path / "saved"), "field", "remedy", CPU)
    torch.testing.assert_close(read.eval()(**inputs).logits, logits, rtol=1e-4, atol=1e-5)
    alone = tokenizer(TEXTS[1], return_tensors="pt")
    torch.testing.assert_close(read(**alone).logits, logits[1:], rtol=1e-4, atol=1e-5)


def test_a_causal_classifier_whose_config_names_no_padding_is_read(tmp_path: Path) -> None:
    folder = make_encoder("qwen2", tmp_path / "base")
    model, tokenizer = load_under_new_head(str(folder), "encoder", ("a", "b"), 3)
    model.config.pad_token_id = None
    save_classifier(model, tokenizer, tmp_path / "saved")
    read, _ = load_reader(str(tmp_path / "saved"), "field", "remedy", CPU)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    assert read(**inputs).logits.shape == (2, 2)
