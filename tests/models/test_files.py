"""What the files of a model say before its weights are read."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import pytest
import transformers as hf

from conftest import TARGETS
from detoxrl.config.recipes import recipe
from detoxrl.errors import InputError, StorageError
from detoxrl.models import lora
from detoxrl.models.files import (
    ARCHITECTURES,
    SCRATCH_LAYERS,
    adapted_part,
    layers_in_files,
    read_settings,
    require_model_files,
)
from detoxrl.models.loading import (
    load_base,
    load_shapes,
    load_tokenizer,
    positions_for,
    require_positions,
    scratch_base,
)


@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_layers_in_the_files_are_those_of_the_model(
    bases: dict[str, Path], architecture: str, train_encoder: bool
) -> None:
    folder = bases[architecture]
    known = ARCHITECTURES[architecture]
    model = load_shapes(str(folder), bf16=False)
    assert known.has_encoder == model.config.is_encoder_decoder
    part = adapted_part(known.has_encoder, train_encoder)
    assert layers_in_files(folder, str(folder), part) == set(lora._linear_layers(model, part))
    assert set(known.lora_targets) == set(TARGETS[architecture])


def test_the_layers_of_a_scratch_base_are_known_by_name(bases: dict[str, Path]) -> None:
    model = scratch_base(load_tokenizer(str(bases["t5"])), seed=0)
    assert set(lora._linear_layers(model, adapted_part(has_encoder=True, train_encoder=False))) == set(SCRATCH_LAYERS)


def test_the_layers_of_shards_are_those_of_one_file(bases: dict[str, Path], tmp_path: Path) -> None:
    model, tokenizer = load_base(str(bases["t5"]))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    assert layers_in_files(tmp_path, "shards", ".*") == layers_in_files(bases["t5"], "t5", ".*")
    with pytest.raises(InputError, match="holds no tokenizer"):
        require_model_files(tmp_path, "policy.base", "shards")
    tokenizer.save_pretrained(tmp_path)
    require_model_files(tmp_path, "policy.base", "shards")

    shard = min(tmp_path.glob("model-*.safetensors"))
    shard.unlink()
    with pytest.raises(InputError, match=rf"policy\.base = 'shards': holds no {shard.name}; .*detoxrl convert shards"):
        require_model_files(tmp_path, "policy.base", "shards")
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match=r"policy\.base = '.*': has a malformed model\.safetensors\.index\.json; rest"):
        require_model_files(tmp_path, "policy.base", str(tmp_path))


def test_weights_that_are_torn_are_corrupted(bases: dict[str, Path], tmp_path: Path) -> None:
    copytree(bases["t5"], tmp_path / "torn")
    weights = tmp_path / "torn/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(StorageError, match="the weights of torn are corrupted"):
        layers_in_files(tmp_path / "torn", "torn", ".*")


@pytest.mark.parametrize("content", [None, "{", "[]", "\udcff"])
def test_settings_that_are_missing_or_malformed_are_one_line(tmp_path: Path, content: str | None) -> None:
    (tmp_path / "good.json").write_text(json.dumps({"model_type": "t5"}))
    assert read_settings(tmp_path, "good.json", "policy.base", "x") == {"model_type": "t5"}
    if content is not None:
        (tmp_path / "config.json").write_text(content, errors="surrogateescape")
    rule = r"holds no config\.json" if content is None else r"has a malformed config\.json"
    with pytest.raises(InputError, match=rf"policy\.base = 'x': {rule}") as raised:
        read_settings(tmp_path, "config.json", "policy.base", "x")
    assert "\n" not in str(raised.value)


# Positions


@pytest.mark.parametrize(
    ("settings", "encoder", "decoder"),
    [
        (hf.BartConfig(max_position_embeddings=64), 64, 64),
        (hf.LEDConfig(max_encoder_position_embeddings=512, max_decoder_position_embeddings=16), 512, 16),
        (hf.T5Config(), None, None),
        (hf.GPT2Config(n_positions=48), None, 48),
        (hf.MptConfig(max_seq_len=32), None, 32),
        (hf.LlamaConfig(max_position_embeddings=128), None, 128),
    ],
    ids=lambda value: getattr(value, "model_type", str(value)),
)
def test_positions_are_known_by_any_of_their_names(
    settings: hf.PreTrainedConfig, encoder: int | None, decoder: int | None
) -> None:
    assert positions_for(settings, "decoder") == decoder
    if settings.is_encoder_decoder:
        assert positions_for(settings, "encoder") == encoder

    changes = {"data.max_prompt_tokens": 24, "generation.max_new_tokens": 8}
    require_positions(settings, recipe("own", changes), longest_target=8)
    for name, value, limit in (("data.max_prompt_tokens", 600, encoder), ("generation.max_new_tokens", 600, decoder)):
        config = recipe("own", {**changes, name: value})
        if limit is None and (settings.is_encoder_decoder or decoder is None):
            require_positions(settings, config, longest_target=8)
            continue
        with pytest.raises(InputError, match=f"{name}.*exceeds the {limit or decoder} positions"):
            require_positions(settings, config, longest_target=8)
