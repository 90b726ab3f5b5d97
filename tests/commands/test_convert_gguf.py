"""A GGUF file becomes a folder that a run starts from, with the same weights, tokens and template. Or it is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from shutil import copy
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from conftest import HELPERS
from detoxrl.commands import convert_gguf as converting
from detoxrl.commands import preflight
from detoxrl.models.loading import load_base, save_base
from small_runs import contents, detoxrl, own
from test_data import dialogue

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
)
TEXTS = [
    "Thank you, it's 2024!", "1. one\n\n2. two  34", "a\n\n\nb\tc   d", "café 😀 你好",
    "<|im_start|>user\nhi<|im_end|>\n",
]  # fmt: skip
F32 = gguf.GGMLQuantizationType.F32
F16 = gguf.GGMLQuantizationType.F16
Q8_0 = gguf.GGMLQuantizationType.Q8_0
Change = Callable[["GgufParts"], None]


class GgufParts:
    """A tiny Llama in the parts of a GGUF file, as llama.cpp writes them."""

    def __init__(self, tied: bool = True) -> None:
        self.tokenizer = _tokenizer()
        self.model = _model(self.tokenizer.get_vocab_size(), tied)
        self.architecture = "llama"
        self.kinds = dict.fromkeys(_names(self.model), F32)
        self.more_weights: dict[str, np.ndarray] = {}
        vocabulary = self.tokenizer.get_vocab()
        merges = json.loads(self.tokenizer.to_str())["model"]["merges"]
        self.settings: dict[str, Any] = {
            "llama.block_count": 2, "llama.context_length": 2048, "llama.embedding_length": 32,
            "llama.feed_forward_length": 64, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
            "llama.rope.freq_base": 1e4, "llama.attention.layer_norm_rms_epsilon": 1e-6,
            "llama.rope.dimension_count": 8, "llama.vocab_size": len(vocabulary),
            "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm",
            "tokenizer.ggml.tokens": sorted(vocabulary, key=lambda token: vocabulary[token]),
            "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(vocabulary) - len(SPECIAL)),
            "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
            "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.unknown_token_id": 0,
            "tokenizer.ggml.padding_token_id": 2, "tokenizer.ggml.add_bos_token": False,
            "tokenizer.chat_template": TEMPLATE,
        }  # fmt: skip

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the weights by their names in GGUF."""
        state = self.model.state_dict()
        arrays = {}
        for theirs, ours in _names(self.model).items():
            array = state[ours].numpy()
            if ours.endswith(("q_proj.weight", "k_proj.weight")):
                array = _permuted(array, heads=4 if "q_proj" in ours else 2)
            arrays[theirs] = array
        return arrays

    def write(self, path: Path) -> None:
        writer = gguf.GGUFWriter(path, self.architecture)
        for key, value in self.settings.items():
            _add(writer, key, value)
        for name, array in self.arrays().items():
            if name in self.kinds:
                kind = self.kinds[name]
                writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        for name, array in self.more_weights.items():
            writer.add_tensor(name, array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def _tokenizer() -> Tokenizer:
    """A byte-level BPE that reads digits one by one, as that of SmolLM2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([dialogue(i) + "\n\n\n3  4" for i in range(40)], trainer)
    return tokenizer


def _model(vocabulary: int, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2, tie_word_embeddings=tied,
        initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def _names(model: LlamaForCausalLM) -> dict[str, str]:
    """Return the names of the weights in transformers by those in GGUF."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    parts = {
        "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    }  # fmt: skip
    for layer in range(2):
        names |= {f"blk.{layer}.{a}.weight": f"model.layers.{layer}.{b}.weight" for a, b in parts.items()}
    return names if model.config.tie_word_embeddings else names | {"output.weight": "lm_head.weight"}


def _permuted(array: np.ndarray, heads: int) -> np.ndarray:
    """Return the rows in the order of ggml's rotary positions: pairs beside each other, not half a head apart."""
    return array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def converted(parts: GgufParts) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return what a run loads from the converted file."""
    parts.write(Path("tiny.gguf"))
    assert detoxrl(["convert", "tiny.gguf", "out"]) == 0
    return load_base("out")


# What is converted


def test_the_copy_has_the_weights_that_were_written_in_full_precision_and_still_tied(here: Path) -> None:
    parts = GgufParts()
    model, _ = converted(parts)
    expected = parts.model.state_dict()
    actual = model.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    assert "lm_head.weight" not in load_file("out/model.safetensors")
    config = json.loads(Path("out/config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "float32"
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in config


@pytest.mark.parametrize("kind", [F16, Q8_0])
def test_fewer_bits_become_what_they_stand_for(here: Path, kind: gguf.GGMLQuantizationType) -> None:
    parts = GgufParts(tied=False)
    parts.kinds = {name: F32 if "norm" in name else kind for name in parts.kinds}
    model, _ = converted(parts)
    for name, array in parts.arrays().items():
        ours = _names(parts.model)[name]
        expected = gguf.quants.dequantize(gguf.quants.quantize(array, parts.kinds[name]), parts.kinds[name])
        if ours.endswith(("q_proj.weight", "k_proj.weight")):
            heads = 4 if "q_proj" in ours else 2
            expected = expected.reshape(heads, -1, 2, 32).swapaxes(1, 2).reshape(expected.shape)
        weight = model.state_dict()[ours]
        assert weight.dtype == torch.float32
        assert np.array_equal(weight.numpy(), expected), name
    assert json.loads(Path("out/config.json").read_text())["tie_word_embeddings"] is False


def test_the_tokenizer_reads_and_writes_as_the_one_it_was_made_from(here: Path) -> None:
    parts = GgufParts()
    _, tokenizer = converted(parts)
    for text in TEXTS:
        ids = parts.tokenizer.encode(text).ids
        assert tokenizer(text).input_ids == ids, text
        assert tokenizer.decode(ids) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat == "<|im_start|>user\nHi<|im_end|>\n"


def test_a_bos_token_is_added_where_the_file_asks_for_it(here: Path) -> None:
    parts = GgufParts()
    parts.settings["tokenizer.ggml.add_bos_token"] = True
    _, tokenizer = converted(parts)
    assert tokenizer("Hi").input_ids == [1, *parts.tokenizer.encode("Hi").ids]


def test_every_token_that_ends_a_response_is_named(here: Path) -> None:
    parts = GgufParts()
    parts.settings["tokenizer.ggml.eom_token_id"] = 17
    model, _ = converted(parts)
    assert model.config.eos_token_id == [2, 17, 0]
    settings = json.loads(Path("out/generation_config.json").read_text())
    assert (settings["eos_token_id"], settings["pad_token_id"], settings["bos_token_id"]) == ([2, 17, 0], 2, 1)


def test_files_beside_the_gguf_are_not_read(here: Path) -> None:
    copy(HELPERS / "tokenizer.json", "tokenizer.json")
    Path("adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "other"}')
    parts = GgufParts()
    _, tokenizer = converted(parts)
    assert tokenizer(TEXTS[0]).input_ids == parts.tokenizer.encode(TEXTS[0]).ids
    assert tokenizer.chat_template == TEMPLATE


def test_the_console_says_what_is_done_what_was_made_and_what_comes_next(
    here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    parts = GgufParts()
    del parts.settings["tokenizer.chat_template"]
    converted(parts)
    shown = capfd.readouterr()
    assert shown.out == (
        "out: LlamaForCausalLM in float32, tokenizer, no chat template (0 MiB)\n"
        "next: detoxrl run own --policy.base out --data.source my.jsonl\n"
    )
    steps = [line for line in shown.err.splitlines() if not line.startswith("weights: ")]
    assert steps == [
        "reading tiny.gguf: 20 weights to float32",
        "writing safetensors of 0 MiB",
        "reading them again to compare weights, token ids and a greedy response",
    ]
    assert "weights: 100 % (20 of 20)" in shown.err


def test_a_run_starts_from_the_converted_model(place: Path) -> None:
    GgufParts().write(place / "tiny.gguf")
    assert detoxrl(["convert", "tiny.gguf", "out"]) == 0
    assert detoxrl(own("--policy.base", "out", "--rl.steps", "2")) == 0
    assert len(Path("runs/own/metrics.jsonl").read_text().splitlines()) == 2
    assert Path("runs/own/report.html").is_file()


# What is not


def without(key: str) -> Change:
    return lambda parts: parts.settings.pop(key)


def with_setting(key: str, value: Any) -> Change:
    return lambda parts: parts.settings.update({key: value})


def another_architecture(parts: GgufParts) -> None:
    parts.architecture = "clip"


def a_weight_is_missing(parts: GgufParts) -> None:
    del parts.kinds["blk.1.ffn_up.weight"]


def scaled_positions(parts: GgufParts) -> None:
    parts.settings["llama.rope.scaling.type"] = "yarn"


def scaled_frequencies(parts: GgufParts) -> None:
    parts.more_weights["rope_freqs.weight"] = np.ones(4, dtype=np.float32)


def eos_after_a_prompt(parts: GgufParts) -> None:
    parts.settings["tokenizer.ggml.add_eos_token"] = True


BAD_MODELS: list[tuple[Change, str]] = [
    (another_architecture, "cannot be loaded: GGUF model with architecture clip is not supported"),
    (without("tokenizer.ggml.tokens"), "holds no tokenizer with an end token; give the GGUF of a language model"),
    (without("tokenizer.ggml.eos_token_id"), "holds no tokenizer with an end token"),
    (with_setting("tokenizer.ggml.model", "rwkv"), "cannot be loaded: Cannot build a tokenizer from a GGUF"),
    (
        with_setting("tokenizer.ggml.pre", "deepseek-llm"),
        "has a tokenizer that splits texts as 'deepseek-llm', which transformers does",
    ),
    (with_setting("split.count", 3), "is one of 3 parts; merge its parts with llama-gguf-split"),
    (
        scaled_positions,
        "scales its rotary positions, which transformers does not read from a GGUF; use the safetensors",
    ),
    (scaled_frequencies, "scales its rotary positions"),
    (a_weight_is_missing, "lacks weights, for example model.layers.1.mlp.up_proj.weight"),
    (eos_after_a_prompt, "gives a model that no run can use (TO = "),
]


@pytest.mark.parametrize(("change", "message"), BAD_MODELS)
def test_a_model_that_cannot_be_converted_is_one_line(
    here: Path, capfd: pytest.CaptureFixture[str], change: Change, message: str
) -> None:
    parts = GgufParts()
    change(parts)
    parts.write(Path("tiny.gguf"))
    refused(["convert", "tiny.gguf", "out"], f"FROM = 'tiny.gguf': {message}", capfd)


def refused(words: list[str], message: str, capfd: pytest.CaptureFixture[str], code: int = 2) -> None:
    """Fail unless the command ends with one line of error, behind lines of progress, and writes nothing."""
    before = contents(Path())
    assert detoxrl(words) == code
    error = capfd.readouterr().err.splitlines()
    assert message in error[-1]
    assert [line for line in error if line.startswith(("detoxrl:", "Traceback"))] == error[-1:]
    assert contents(Path()) == before
    assert not list(Path().glob(".out*"))


def cut(content: bytes, share: float) -> bytes:
    return content[: int(len(content) * share)]


def unknown_weight_type(content: bytes) -> bytes:
    name = b"output_norm.weight"
    start = content.index(name) + len(name) + 4 + 8  # number of dimensions, the one dimension
    return content[:start] + struct.pack("<I", 99) + content[start + 4 :]


BLOCK_COUNT = b"llama.block_count"
BAD_FILES: list[tuple[Callable[[bytes], bytes], str]] = [
    (lambda content: b"", "is not a GGUF file; give a .gguf, or a folder with .bin weights"),
    (lambda content: b"PK\x03\x04" + content[4:], "is not a GGUF file"),
    (lambda content: content[:4] + struct.pack("<I", 1) + content[8:], "has version 1 of GGUF, but only 2 or 3 can be"),
    (lambda content: content[:20], "is truncated: it ends within its header; download it again"),
    (lambda content: cut(content, 0.02), "is truncated: it ends within its header"),
    (lambda content: cut(content, 0.5), "bytes, but its header describes "),
    (lambda content: content.replace(b"general.architecture", b"general.architectur_"), "names no architecture; give"),
    (unknown_weight_type, "holds output_norm.weight in a type (99) that the package gguf does not know"),
    (lambda content: content[:-33], "bytes, but its header describes "),
    (lambda content: content.replace(BLOCK_COUNT + struct.pack("<I", 4), BLOCK_COUNT + struct.pack("<I", 99)),
     "has a malformed header: a setting of the unknown type 99"),
]  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BAD_FILES)
def test_a_damaged_file_is_one_line(
    here: Path, capfd: pytest.CaptureFixture[str], damage: Callable[[bytes], bytes], message: str
) -> None:
    GgufParts().write(Path("tiny.gguf"))
    content = Path("tiny.gguf").read_bytes()
    Path("tiny.gguf").write_bytes(damage(content))
    refused(["convert", "tiny.gguf", "out"], message, capfd)


def test_a_path_that_does_not_fit_is_one_line(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    GgufParts().write(Path("tiny.gguf"))
    Path("there").mkdir()
    Path("folder.gguf").mkdir()
    refused(["convert", "folder.gguf", "out"], "FROM = 'folder.gguf': has no weights in ", capfd)
    refused(["convert", "tinny.gguf", "out"], "FROM = 'tinny.gguf': is not a file; did you mean tiny.gguf?", capfd)
    refused(["convert", "tiny.gguf", "there"], "TO = 'there': already exists; name a new folder", capfd)


def test_the_extra_that_is_missing_is_named(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    GgufParts().write(Path("tiny.gguf"))
    monkeypatch.setattr(preflight, "is_installed", lambda package: package != "gguf")
    message = "FROM = 'tiny.gguf': needs the package gguf; pip install 'detoxrl[gguf]'"
    refused(["convert", "tiny.gguf", "out"], message, capfd)


def other_weights(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    save_base(model, tokenizer, folder)
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1e-3
    LlamaForCausalLM.from_pretrained(folder, state_dict=None).save_pretrained(folder, state_dict=weights)


def another_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    save_base(model, tokenizer, folder)
    (folder / "chat_template.jinja").write_text("other")


def another_split(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    save_base(model, tokenizer, folder)
    changed = AutoTokenizer.from_pretrained(folder)
    changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    changed.save_pretrained(folder)


def no_rotation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    save_base(model, tokenizer, folder)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1.0
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("save", "different"),
    [(other_weights, "weights"), (another_template, "chat template"), (another_split, "token ids"),
     (no_rotation, "greedy response")],
)  # fmt: skip
def test_a_copy_that_differs_is_not_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], save: Any, different: str
) -> None:
    GgufParts().write(Path("tiny.gguf"))
    monkeypatch.setattr(converting, "save_base", save)
    message = f"safetensors of tiny.gguf differ from it in {different}; nothing was written"
    refused(["convert", "tiny.gguf", "out"], message, capfd, code=1)
