"""Every supported architecture samples with the log-probs that it is trained on, and the others are refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from backbones import BACKBONES, REFUSED, save_backbone
from conftest import disturb, small_config
from detoxrl.commands import export
from detoxrl.commands.preflight import check_locally
from detoxrl.config.edit import with_settings
from detoxrl.config.schema import PolicyConfig
from detoxrl.errors import InputError
from detoxrl.models import loading, lora
from detoxrl.models.files import ARCHITECTURES, FURTHER_TARGETS, adapted_part, layers_in_files
from detoxrl.models.llama import LlamaNetwork
from detoxrl.models.loading import load_base, load_shapes
from detoxrl.models.lora import load_policy
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.policy import Network, Policy
from detoxrl.models.sampling import Draws, require_agreement
from detoxrl.models.t5 import T5Network
from detoxrl.rl.kl import k1
from detoxrl.training.finetune import examples
from learning import LENGTH, PROMPTS, TEXTS, loop_config, rollout_of, run_update
from small_runs import detoxrl, own

FAST: dict[str, type[Network]] = {
    **dict.fromkeys(("t5", "mt5"), T5Network),
    **dict.fromkeys(("llama", "qwen2", "qwen3"), LlamaNetwork),
}
FORCED = 7  # A token of the tiny tokenizer.
END = ("</s>", 1)
Folders = Callable[[str], Path]


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Return a function that gives the folder of a tiny model of a type; each is made once."""
    root = tmp_path_factory.mktemp("backbones")

    def folder(name: str) -> Path:
        if not (root / name).is_dir():
            save_backbone(BACKBONES[name], root / name)
        return root / name

    return folder


def policy_of(base: Path, full: bool = False, adapter: Path | None = None) -> Policy:
    """A policy on a tiny model, with the usual LoRA targets, some of whose responses end early."""
    config = PolicyConfig(base=str(base), lora_rank=4, lora_alpha=8, full_weights=full)
    policy = load_policy(str(base), adapter, config, seed=0)
    policy.eos_token_ids += range(40, 60)
    policy.add_value_head()
    return policy


kinds = pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
every_backbone = pytest.mark.parametrize("name", BACKBONES)


@every_backbone
@kinds
def test_kl_is_zero_and_ratios_are_one_at_first_and_only_then_the_policy_moves(
    folder_of: Folders, name: str, full: bool
) -> None:
    policy = policy_of(folder_of(name), full)
    assert policy._network_class is FAST.get(name, PlainNetwork)
    before = [weight.detach().clone() for weight in policy.parameters()]
    config = loop_config(lr=1e-2, update_kl_limit=None)

    distances = []
    for step in range(2):
        rollout = rollout_of(policy, step)
        distances.append(float(k1(rollout.responses.logprobs, rollout.ref_logprobs).abs().max()))
        assert run_update(policy, config, rollout)["ratio/first_error"] < 1e-5
    assert distances[0] < 1e-5 < 1e-3 < distances[1]

    assert not any(torch.equal(old, new) for old, new in zip(before, policy.parameters(), strict=True))


@every_backbone
@kinds
def test_sampling_agrees_with_scoring_in_a_padded_batch_and_alone(folder_of: Folders, name: str, full: bool) -> None:
    policy = policy_of(folder_of(name), full)
    disturb(policy)
    encoded = policy.with_shared_cross(policy.encode(TEXTS))
    uniforms = Draws(0, "test").uniforms(policy, PROMPTS, LENGTH)
    responses = policy.sample(encoded, uniforms, 1.0)
    mask = responses.response_mask
    assert encoded.mask.sum(1).unique().numel() > 1
    assert mask.sum(1).unique().numel() > 1 or name == "mt5"

    forced, _, _ = policy.logprobs(encoded, responses.ids, 1.0)
    tolerance = {"rtol": 1e-5, "atol": 1e-4 if name == "mt5" else 5e-6}  # The tiny mT5's logits are large.
    torch.testing.assert_close(responses.logprobs[mask], forced[mask], **tolerance)

    for row, text in enumerate(TEXTS):
        alone = policy.encode([text])
        scored, _, _ = policy.logprobs(alone, responses.ids[row : row + 1], 1.0)
        torch.testing.assert_close(scored[0][mask[row]], forced[row][mask[row]], **tolerance)
        sampled = policy.sample(alone, uniforms[row : row + 1], 1.0)
        assert torch.equal(sampled.ids[0][mask[row]], responses.ids[row][mask[row]])
    require_agreement(policy, "base")


@every_backbone
@kinds
def test_a_saved_policy_loads_with_the_same_logprobs(folder_of: Folders, name: str, full: bool, tmp_path: Path) -> None:
    policy = policy_of(folder_of(name), full)
    disturb(policy)
    policy.save(tmp_path / "saved")
    again = policy_of(tmp_path / "saved", full) if full else policy_of(folder_of(name), adapter=tmp_path / "saved")
    ids = torch.full((4, 5), 40)
    expected, _, _ = policy.logprobs(policy.encode(TEXTS), ids, 1.0)
    actual, _, _ = again.logprobs(again.encode(TEXTS), ids, 1.0)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert again.eos_token_ids == policy.eos_token_ids


@every_backbone
@kinds
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_a_group_is_sampled_and_learnt_from_as_its_responses_one_by_one(
    folder_of: Folders, name: str, full: bool, checkpointing: bool
) -> None:
    policy = policy_of(folder_of(name), full)
    disturb(policy)
    repeated = [text for text in TEXTS for _ in range(2)]
    uniforms = Draws(0, "groups", samples=range(2)).uniforms(policy, PROMPTS, LENGTH)
    responses = policy.sample(policy.with_shared_cross(policy.encode(TEXTS)), uniforms, 1.0)
    one_by_one = policy.sample(policy.with_shared_cross(policy.encode(repeated)), uniforms, 1.0)
    assert torch.equal(responses.ids, one_by_one.ids)

    weights = policy.parameters()
    by_token = torch.randn(responses.ids.shape, generator=torch.Generator().manual_seed(2))
    found = []
    for texts in (TEXTS, repeated):
        policy.checkpointing = checkpointing and texts is TEXTS
        encoded = policy.with_shared_cross(policy.encode(texts))
        logprobs = policy.logprobs(encoded, responses.ids, 1.0, mask=responses.response_mask).logprobs
        gradients = torch.autograd.grad((by_token * logprobs).sum(), weights, allow_unused=True)
        found.append([logprobs.detach(), *(torch.zeros(1) if each is None else each for each in gradients)])
    for together, apart in zip(*found, strict=True):
        torch.testing.assert_close(together, apart, rtol=0, atol=1e-5 * max(1.0, float(apart.abs().max())))


# The layers that an adapter changes


@pytest.mark.parametrize("name", [name for name in BACKBONES if name in ARCHITECTURES])
@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_layers_in_the_files_are_those_of_the_model(folder_of: Folders, name: str, train_encoder: bool) -> None:
    folder = folder_of(name)
    known = ARCHITECTURES[name]
    model = load_shapes(str(folder), bf16=False)
    assert known.has_encoder == model.config.is_encoder_decoder
    part = adapted_part(known.has_encoder, train_encoder)
    assert layers_in_files(folder, str(folder), part) == set(lora._linear_layers(model, part))


@every_backbone
def test_the_usual_targets_are_layers_other_than_the_head(folder_of: Folders, name: str) -> None:
    targets = lora.usual_targets(name)
    assert targets is not None
    policy = policy_of(folder_of(name))
    adapted = {path.split(".")[-2] for path, _ in policy.model.named_modules() if path.endswith("lora_A")}
    assert adapted == set(targets)


def test_further_targets_repeat_no_architecture() -> None:
    assert not set(FURTHER_TARGETS) & set(ARCHITECTURES)


@pytest.mark.parametrize("train_encoder", [False, True])
def test_an_adapter_of_an_encoder_decoder_trains_the_part_that_is_asked_for(
    folder_of: Folders, train_encoder: bool
) -> None:
    # The layers of its decoder are named decoder.bert.encoder.layer, so the names do not tell the parts apart.
    folder = folder_of("encoder-decoder")
    config = PolicyConfig(base=str(folder), lora_rank=4, train_encoder=train_encoder)
    policy = load_policy(str(folder), None, config, seed=0)
    trained = {name.split(".")[2] for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert trained == ({"encoder", "decoder"} if train_encoder else {"decoder"})
    with pytest.raises(InputError, match="lora_targets = 'decoder': names no linear layer"):  # It is the head.
        load_policy(str(folder), None, replace(config, lora_targets=("decoder",)), seed=0)


# What is refused


@pytest.mark.parametrize("name", REFUSED)
def test_a_model_that_is_not_supported_is_refused_by_name_before_its_weights_are_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, reason = REFUSED[name]
    make().save_pretrained(tmp_path)

    def no_weights(*_: object, **__: object) -> None:
        raise AssertionError("the weights are read")

    monkeypatch.setattr(loading, "load_tokenizer", no_weights)
    for load in (load_base, lambda base: load_shapes(base, bf16=False)):
        with pytest.raises(InputError, match=rf"policy\.base = '.*': is a {name}\b.*{reason}") as raised:
            load(str(tmp_path))
        assert "\n" not in str(raised.value)


def test_the_text_model_of_a_model_that_reads_images_can_be_saved_alone(tmp_path: Path) -> None:
    make, _ = REFUSED["gemma3"]
    save_backbone(make, tmp_path / "whole")

    whole = Gemma3ForConditionalGeneration.from_pretrained(tmp_path / "whole")
    text = Gemma3ForCausalLM(whole.config.text_config)
    text.model.load_state_dict(whole.model.language_model.state_dict())
    text.save_pretrained(tmp_path / "text")
    AutoTokenizer.from_pretrained(tmp_path / "whole").save_pretrained(tmp_path / "text")

    policy = policy_of(tmp_path / "text", full=True)
    ids = policy.tokenizer(TEXTS[0], return_tensors="pt").input_ids
    torch.testing.assert_close(policy.model(ids).logits, whole.eval()(ids).logits)


def test_a_decoder_without_a_start_token_is_refused(folder_of: Folders, tmp_path: Path) -> None:
    copytree(folder_of("encoder-decoder"), tmp_path, dirs_exist_ok=True)
    change_json(tmp_path / "config.json", decoder_start_token_id=None)
    (tmp_path / "generation_config.json").unlink()
    for load in (load_base, lambda base: load_shapes(base, bf16=False)):
        with pytest.raises(InputError, match=r"names no decoder_start_token_id, .*; name it in its config\.json"):
            load(str(tmp_path))

    (tmp_path / "generation_config.json").write_text('{"decoder_start_token_id": 2}')
    model, _ = load_base(str(tmp_path))
    assert model.config.decoder_start_token_id == 2  # Fine-tuning reads it there.


def test_a_tokenizer_that_needs_a_missing_package_is_one_line(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError("\nMarianTokenizer requires the SentencePiece library but it was not found. Check\nthis.")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", missing)
    with pytest.raises(InputError, match=r"requires the SentencePiece library but it was not found; install it with"):
        load_base(str(bases["t5"]))


# A first token that is always the same


def change_json(path: Path, **settings: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def forcing(folder: Path, target: Path, where: str = "generation_config.json") -> Path:
    """Copy a model, and name the first token of its responses in one of its files."""
    copytree(folder, target)
    if where == "config.json":
        (target / "generation_config.json").unlink()
    change_json(target / where, forced_bos_token_id=FORCED, forced_eos_token_id=1, num_beams=4, bad_words_ids=[[40]])
    return target


@pytest.mark.parametrize("name", ["bart", "mbart", "marian", "t5"])
@pytest.mark.parametrize("where", ["config.json", "generation_config.json"])
def test_a_forced_first_token_is_given_to_the_decoder_and_has_no_logprob(
    folder_of: Folders, tmp_path: Path, name: str, where: str
) -> None:
    policy = policy_of(forcing(folder_of(name), tmp_path / "forced", where), full=True)
    assert policy._network_class is PlainNetwork
    disturb(policy)
    require_agreement(policy, "base")

    encoded = policy.encode(TEXTS)
    responses = policy.sample(encoded, Draws(0, "test").uniforms(policy, PROMPTS, LENGTH), 1.0)
    prompts = policy.tokenizer(TEXTS, return_tensors="pt", padding=True)
    start = torch.tensor([[policy.model.config.decoder_start_token_id, FORCED]]).expand(4, 2)
    decoder_ids = torch.cat([start, responses.ids[:, :-1]], 1)
    logits = policy.model(**prompts, decoder_input_ids=decoder_ids).logits[:, 1:]
    expected = logits.log_softmax(-1).gather(-1, responses.ids[..., None])[..., 0]
    mask = responses.response_mask
    torch.testing.assert_close(responses.logprobs[mask], expected[mask], rtol=1e-5, atol=5e-6)
    assert rollout_of(policy).responses.ids.shape[1] <= LENGTH


@pytest.mark.parametrize("name", ["mbart", "marian", "bart"])
def test_an_export_says_how_to_sample_a_policy_with_a_forced_first_token(
    folder_of: Folders, tmp_path: Path, name: str
) -> None:
    base = forcing(folder_of(name), tmp_path / "forced")
    policy = load_policy(str(base), None, PolicyConfig(base=str(base), full_weights=True), seed=0)
    disturb(policy)
    config = small_config()
    settings = replace(config.generation, max_new_tokens=6)
    policy.save(tmp_path / "export")
    model, tokenizer = load_base(str(tmp_path / "export"))
    generation = export._generation_config(model, tokenizer, replace(config, generation=settings))
    generation.save_pretrained(tmp_path / "export")

    stored = GenerationConfig.from_pretrained(tmp_path / "export")
    assert (stored.forced_bos_token_id, stored.max_new_tokens) == (FORCED, 7)
    assert (stored.forced_eos_token_id, stored.bad_words_ids, stored.num_beams) == (None, None, None)

    loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export").eval()
    batch = policy.tokenizer(TEXTS[0], return_tensors="pt")
    written = loaded.generate(**batch, do_sample=False, top_p=None, top_k=None, temperature=None)[0].tolist()
    greedy = policy.sample(policy.encode([TEXTS[0]]), torch.full((1, 6), 0.5), 1e-4).ids[0].tolist()
    assert written == [policy.model.config.decoder_start_token_id, FORCED, *greedy[: len(written) - 2]]
    assert len(written) == 8


def test_a_forced_token_that_is_no_id_is_one_line(folder_of: Folders, tmp_path: Path) -> None:
    base = forcing(folder_of("mbart"), tmp_path / "forced")
    change_json(base / "generation_config.json", forced_bos_token_id="en_XX")
    config = with_settings(small_config(), {"policy.base": str(base)})
    for check in (lambda: load_base(str(base)), lambda: check_locally(config)):
        with pytest.raises(InputError, match=r"has forced_bos_token_id = 'en_XX' in generation_config\.json, which is"):
            check()


class TwoLanguages(PreTrainedTokenizerFast):
    """A tokenizer that puts another token in front of what is written than of what is read, as an mBART's does."""

    def _switch_to_input_mode(self) -> None:
        self._begin_with(5)

    def _switch_to_target_mode(self) -> None:
        self._begin_with(6)

    def _begin_with(self, id: int) -> None:
        token = self.convert_ids_to_tokens(id)
        post_processor = processors.TemplateProcessing(single=f"{token} $A </s>", special_tokens=[(token, id), END])
        self.backend_tokenizer.post_processor = post_processor


def test_targets_are_written_in_the_language_of_targets(folder_of: Folders) -> None:
    tokenizer = TwoLanguages.from_pretrained(folder_of("mbart"))
    (prompt,), (target,) = examples(tokenizer, [("Read.", "Write.")], encoder_decoder=True)
    assert (prompt[0], prompt[-1]) == (5, 1)
    assert (target[0], target[-1]) == (6, 1)


# Whole runs


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("encoder-decoder", ["--sft.steps", "2", "--sft.batch-size", "4", "--sft.no-full-weights"]),
        ("mbart", ["--policy.full-weights", "--sft.steps", "2", "--sft.batch-size", "4"]),
        ("gemma3_text", []),
    ],
)
def test_a_whole_run(place: Path, folder_of: Folders, name: str, words: list[str]) -> None:
    base = forcing(folder_of(name), place / "base") if name == "mbart" else folder_of(name)
    limits = ["--rl.steps", "2", "--data.max-prompt-tokens", "64", "--sft.baseline-steps", "0"]
    assert detoxrl(own("--policy.base", str(base), *limits, *words, "--run-dir", "run")) == 0
    first, *_ = [json.loads(line) for line in (place / "run/metrics.jsonl").read_text().splitlines()]
    assert abs(first["kl/reference"]) < 1e-5
    assert first["ratio/first_error"] < 1e-5
    assert (place / "run/report.html").is_file()
