"""Policies are loaded, saved and updated; models, tokenizers and adapters that do not fit are rejected."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    BertLMHeadModel,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5ForConditionalGeneration,
    TopPLogitsWarper,
)

import trl_oracle
from conftest import ENCODER_DECODERS, Make, disturb, policy_config, small_config
from detoxrl.errors import InputError, StorageError
from detoxrl.models import policy as policy_module
from detoxrl.models.ends import end_token_ids
from detoxrl.models.loading import load_base
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy, Scored, draw_tokens, nucleus
from detoxrl.models.sampling import require_agreement
from detoxrl.models.weights import POLICY
from detoxrl.training.learner import Learner
from learning import TEXTS, rollout_of, run_update


def test_steps_draw_different_responses(fresh: Policy) -> None:
    assert rollout_of(fresh, step=0).texts != rollout_of(fresh, step=1).texts


def test_a_step_beyond_the_kl_limit_skips_its_other_epochs_and_gradients_are_clipped(
    bases: dict[str, Path],
) -> None:
    small = small_config()
    epochs, distances = {}, {}
    cases = {"default": {}, "clipped": {"max_grad_norm": 1e-9}, "kl limit": {"update_kl_limit": 1e-12}}
    for name, changes in cases.items():
        policy = load_policy(str(bases["t5"]), None, policy_config("t5"), seed=0)
        before = [weight.detach().clone() for weight in policy.parameters()]
        config = replace(small, rl=replace(small.rl, **{"minibatch_size": 2, "update_kl_limit": None, **changes}))
        epochs[name] = run_update(policy, config, rollout_of(policy))["epochs"]
        pairs = zip(before, policy.parameters(), strict=True)
        distances[name] = sum(float((new.detach() - old).abs().sum()) for old, new in pairs)
    assert epochs == {"default": 2, "clipped": 2, "kl limit": 1}
    assert distances["clipped"] < 0.05 * distances["default"]


def test_minibatches_are_shuffled_anew_in_every_epoch(fresh: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    losses = Learner._losses

    def recording(*args: object) -> object:
        rows.extend(args[1].tolist())  # type: ignore[attr-defined]
        return losses(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(Learner, "_losses", recording)
    config = replace(small_config(), rl=replace(small_config().rl, update_kl_limit=None, epochs=4, minibatch_size=2))
    run_update(fresh, config, rollout_of(fresh))
    epochs = [rows[i : i + 4] for i in range(0, 16, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_a_saved_policy_loads_without_detoxrl_and_generates_the_same(
    policy: Policy, request: pytest.FixtureRequest, bases: dict[str, Path], tmp_path: Path
) -> None:
    name, kind = request.node.callspec.params["policy"]
    policy.eos_token_ids = end_token_ids(policy.weights.active, policy.tokenizer)
    disturb(policy)
    policy.save(tmp_path / "adapter")
    assert not [path for path in (tmp_path / "adapter").iterdir() if path.is_dir()]  # no other adapter is saved
    auto = AutoModelForSeq2SeqLM if name in ENCODER_DECODERS else AutoModelForCausalLM
    if kind == "full":
        model = auto.from_pretrained(tmp_path / "adapter").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / "adapter")
    else:
        model = PeftModel.from_pretrained(auto.from_pretrained(bases[name]), str(tmp_path / "adapter")).eval()
        tokenizer = AutoTokenizer.from_pretrained(bases[name])
    batch = tokenizer(TEXTS[0], return_tensors="pt")
    expected = model.generate(**batch, max_new_tokens=6, do_sample=False)[0]
    greedy = policy.sample(policy.encode([TEXTS[0]]), torch.full((1, 6), 0.5), 1e-4).ids[0]
    skipped = 1 if name in ENCODER_DECODERS else batch.input_ids.shape[1]
    assert expected[skipped:].tolist() == greedy.tolist()[: len(expected) - skipped]


def test_an_untied_model_is_saved_as_untied(tmp_path: Path) -> None:
    base = trl_oracle.build("t5", tmp_path).base
    full = load_policy(str(base), None, policy_config("t5", full=True), seed=0)
    full.save(tmp_path / "saved")
    assert json.loads((tmp_path / "saved/config.json").read_text())["tie_word_embeddings"] is False
    again = load_policy(str(tmp_path / "saved"), None, policy_config("t5"), seed=0)
    ids = torch.full((1, 4), 7)
    saved, loaded = (policy.logprobs(policy.encode(["kind w5"]), ids, 1.0)[0] for policy in (full, again))
    torch.testing.assert_close(loaded, saved, rtol=1e-6, atol=1e-6)  # with a tied head it would be off by nats


def test_all_weights_of_a_policy_move_to_a_device(policy: Policy) -> None:
    meta = torch.device("meta")
    assert policy.to(meta).device == meta
    for adapter in (POLICY, policy.reference, None):
        with policy.weights.using(adapter):
            assert {weight.device for weight in policy.weights.active.parameters()} == {meta}


def test_a_saved_policy_can_be_added_to_another_under_a_name(
    policy: Policy, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    _, kind = request.node.callspec.params["policy"]
    disturb(policy)
    policy.save(tmp_path)
    ids = torch.full((4, 5), 40)
    expected = policy.logprobs(policy.encode(TEXTS), ids, 1.0)[0]
    for weight in policy.parameters():
        torch.nn.init.zeros_(weight)

    policy.weights.add("saved", tmp_path)
    actual = policy.logprobs(policy.encode(TEXTS, "saved"), ids, 1.0, "saved")[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    assert not torch.isclose(policy.logprobs(policy.encode(TEXTS), ids, 1.0)[0], expected).any()

    trained = policy.parameters()
    with policy.weights.using("saved"):
        parameters = policy.weights.active.named_parameters()
        added = [weight for name, weight in parameters if ".saved." in name or kind == "full"]
        assert added
        assert kind != "full" or not any(weight.requires_grad for weight in added)
    assert all(after is before for after, before in zip(policy.parameters(), trained, strict=True))
    assert not any(weight.requires_grad for weight in added)
    assert policy.weights.active is (policy.model if kind == "full" else policy.model.get_base_model())


def test_inverse_cdf_draws_each_token_with_its_probability_and_never_one_of_probability_zero() -> None:
    logprobs = torch.tensor([[0.0, 0.25, 0.5, 0.25, 0.0]]).log().expand(4, -1)
    tokens = draw_tokens(logprobs, torch.tensor([[0.0], [0.249], [0.25], [1.0]]))
    assert tokens.squeeze(1).tolist() == [1, 1, 2, 3]
    rounded_down = torch.tensor([[0.5, 0.4999]]).log()
    assert draw_tokens(rounded_down, torch.tensor([[1.0]])).item() == 1


def test_a_nucleus_has_the_fewest_likeliest_tokens_that_reach_the_share() -> None:
    logprobs = torch.tensor([[0.05, 0.5, 0.15, 0.3], [0.25, 0.25, 0.25, 0.25]]).log()
    assert nucleus(logprobs, 0.6).exp().tolist()[0] == pytest.approx([0, 0.5 / 0.8, 0, 0.3 / 0.8])
    assert nucleus(logprobs, 0.81).exp().tolist()[0] == pytest.approx([0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95])
    assert nucleus(logprobs, 0.001).exp().tolist()[0] == [0, 1, 0, 0]
    # Tokens that are equally likely belong together.
    assert nucleus(logprobs, 0.3).exp().tolist()[1] == pytest.approx([0.25] * 4)


# More tokens than are looked at first, fewer, and both in one batch.
@pytest.mark.parametrize("spreads", [[0.1] * 5, [4.0] * 5, [4.0, 0.1, 4.0, 4.0, 0.1]], ids=["large", "small", "both"])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_a_nucleus_is_that_of_transformers(spreads: list[float], top_p: float) -> None:
    generator = torch.Generator().manual_seed(3)
    spread = torch.tensor(spreads)[:, None]
    logprobs = (spread * torch.randn(5, 3000, generator=generator)).log_softmax(-1)
    expected = TopPLogitsWarper(top_p)(torch.zeros(5, 1, dtype=torch.long), logprobs).log_softmax(-1)
    torch.testing.assert_close(nucleus(logprobs, top_p), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_sampling_with_top_p_draws_from_the_nucleus(make_policy: Make, name: str) -> None:
    policy = make_policy(name, "loaded")
    encoded = policy.encode(TEXTS[:2])
    chances = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))
    sampled = policy.sample(encoded, chances, 1.0, top_p=0.3)
    for responses in (sampled, policy.sample(encoded, chances, 1.0)):
        whole = policy.logprobs(encoded, responses.ids, 1.0).logprobs[responses.response_mask]
        gained = responses.logprobs[responses.response_mask] - whole
        # In the nucleus a token is more likely, by up to a factor of 1 / 0.3.
        if responses is sampled:
            assert bool((gained > 0).all())
            assert float(gained.max()) < -math.log(0.3) + 1e-4
        else:
            assert float(gained.abs().max()) < 1e-4
    whole_vocabulary = policy.sample(encoded, chances, 1.0)
    assert len(sampled.ids.unique()) < len(whole_vocabulary.ids.unique())


@pytest.mark.parametrize("name", ["t5", "gpt2", "llama"])
def test_how_often_sampling_asks_who_has_ended_changes_no_response(
    make_policy: Make, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy(name, "fresh")
    policy.eos_token_ids += range(40, 70)
    uniforms = torch.rand(2 * len(TEXTS), 11, generator=torch.Generator().manual_seed(1))
    asked: list[int] = []
    isin = torch.isin

    def counting(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        asked.append(len(tokens))
        return isin(tokens, ids)

    sampled = []
    for every in (1, 4):
        monkeypatch.setitem(policy_module._ASK_EVERY, "cpu", every)
        sampled.append(policy.sample(policy.encode(TEXTS), uniforms, 1.0))
    monkeypatch.setattr(torch, "isin", counting)
    policy.sample(policy.encode(TEXTS), uniforms, 1.0)
    assert asked[:4] == [len(uniforms)] * 4
    assert asked[-1] < len(uniforms)

    for often, rarely in zip(*(asdict(responses).values() for responses in sampled), strict=True):
        if often is not None:
            torch.testing.assert_close(rarely, often)
    assert not bool(sampled[0].ended.all())
    assert bool(sampled[0].ended.any())


@pytest.mark.parametrize("base", ["/nowhere", "classifier"])
def test_a_base_that_generates_no_text_is_rejected(base: str, tmp_path: Path) -> None:
    if base == "classifier":
        tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        BertForSequenceClassification(tiny).save_pretrained(tmp_path)
        base = str(tmp_path)
    with pytest.raises(InputError, match=r"policy\.base"):
        load_base(base)


def test_the_error_for_an_unknown_lora_target_lists_the_layers(bases: dict[str, Path]) -> None:
    config = replace(policy_config("t5"), lora_targets=("query",))
    with pytest.raises(InputError, match=r"lora_targets = 'query'.*choose from .*\bq\b"):
        load_policy(str(bases["t5"]), None, config, seed=0)


def test_an_adapter_of_another_base_is_rejected(bases: dict[str, Path], tmp_path: Path) -> None:
    load_policy(str(bases["bart"]), None, policy_config("bart"), seed=0).save(tmp_path)
    with pytest.raises(InputError, match=r"policy\.adapter = .*; give an adapter of this base"):
        load_policy(str(bases["t5"]), tmp_path, policy_config("t5"), seed=0)


def test_the_language_model_head_is_no_lora_target(bases: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="lora_targets = 'lm_head'"):
        load_policy(str(bases["t5"]), None, replace(policy_config("t5"), lora_targets=("lm_head",)), seed=0)


def test_a_pickled_adapter_is_rejected(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="safetensors"):
        load_policy(str(bases["t5"]), tmp_path, policy_config("t5"), seed=0)


def saved(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_a_model_that_samples_and_scores_differently_is_rejected(bases: dict[str, Path], tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(bases["gpt2"])
    torch.manual_seed(0)
    # GPT-1 has no cache.
    gpt1 = OpenAIGPTConfig(vocab_size=300, n_embd=32, n_layer=2, n_head=4, eos_token_id=1, initializer_range=0.2)
    base = saved(OpenAIGPTLMHeadModel(gpt1), tokenizer, tmp_path / "gpt1")
    policy = load_policy(base, None, policy_config("gpt2", full=True), seed=0)
    with pytest.raises(InputError, match=r"policy\.base = '.*': samples with log-probs up to .* nats off"):
        require_agreement(policy, base)


@pytest.mark.parametrize("call", range(4), ids=["first alone", "second alone", "first in a group", "second in a group"])
def test_a_difference_in_either_text_and_direction_is_rejected(
    make_policy: Make, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("t5", "fresh")
    logprobs = policy.logprobs
    calls = 0

    def higher_for_one_text(*args: Any) -> Scored:
        nonlocal calls
        scored = logprobs(*args)
        shift = 0.002 if calls == call else 0.0
        calls += 1
        return scored._replace(logprobs=scored.logprobs + shift)

    def lower(*args: Any) -> Scored:
        scored = logprobs(*args)
        return scored._replace(logprobs=scored.logprobs - 0.002)

    for shifted in (higher_for_one_text, lower):
        monkeypatch.setattr(policy, "logprobs", shifted)
        with pytest.raises(InputError, match=r"up to 0\.002 nats off"):
            require_agreement(policy, "base")


def test_every_policy_samples_and_scores_alike(policy: Policy) -> None:
    disturb(policy)
    require_agreement(policy, "base")


def test_a_causal_model_whose_layers_are_named_encoder_trains_them(bases: dict[str, Path], tmp_path: Path) -> None:
    bert = BertConfig(
        vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
        eos_token_id=1, is_decoder=True,
    )  # fmt: skip
    base = saved(BertLMHeadModel(bert), AutoTokenizer.from_pretrained(bases["gpt2"]), tmp_path)
    config = replace(policy_config("gpt2"), lora_targets=("query",))
    assert load_policy(base, None, config, seed=0).parameters()


def test_a_model_with_inconsistent_sampling_settings_can_be_saved(bases: dict[str, Path], tmp_path: Path) -> None:
    copytree(bases["llama"], tmp_path / "base")
    (tmp_path / "base/generation_config.json").write_text('{"max_length": 4096, "temperature": 0.9, "top_p": 0.6}')
    load_policy(str(tmp_path / "base"), None, policy_config("llama", full=True), seed=0).save(tmp_path / "saved")
    assert (tmp_path / "saved/model.safetensors").is_file()


def test_any_of_several_end_tokens_ends_a_response(bases: dict[str, Path]) -> None:
    policy = load_policy(str(bases["llama"]), None, policy_config("llama"), seed=0)
    assert policy.eos_token_ids == [1, 2]
    encoded = policy.encode(TEXTS[:1])
    first_tokens = (torch.tensor([[token]]) for token in (0, 1, 2))
    probabilities = [policy.logprobs(encoded, ids, 1.0)[0].exp().item() for ids in first_tokens]
    for token in (1, 2):
        in_the_middle = sum(probabilities[:token]) + probabilities[token] / 2
        responses = policy.sample(encoded, torch.tensor([[in_the_middle, 0.9]]), 1.0)
        assert responses.ids[0].tolist() == [token, policy.pad_token_id]
        assert responses.ended.tolist() == [True]


def test_a_tokenizer_that_ends_prompts_is_rejected_for_a_causal_model(bases: dict[str, Path], tmp_path: Path) -> None:
    copytree(bases["gpt2"], tmp_path / "base")
    AutoTokenizer.from_pretrained(bases["t5"]).save_pretrained(tmp_path / "base")
    with pytest.raises(InputError, match=r"has a tokenizer that ends every prompt with EOS"):
        load_base(str(tmp_path / "base"))


def test_training_the_encoder_of_a_causal_model_is_rejected(bases: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"policy\.train_encoder = True: needs an encoder"):
        load_policy(str(bases["gpt2"]), None, policy_config("gpt2", encoder=True), seed=0)


def test_added_weights_must_come_from_the_same_base(make_policy: Make, bases: dict[str, Path], tmp_path: Path) -> None:
    for kind in ("fresh", "full"):
        make_policy("gpt2", kind).save(tmp_path / kind)
        with pytest.raises(InputError, match=r"adapter = '.*'"):
            make_policy("llama", kind).weights.add("other", tmp_path / kind)


def test_a_lora_of_another_depth_or_with_corrupted_weights_cannot_be_added(
    make_policy: Make, bases: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = load_base(str(bases["t5"]))
    model.config.num_decoder_layers = 3
    deeper = saved(T5ForConditionalGeneration(model.config), tokenizer, tmp_path / "deeper")
    load_policy(deeper, None, policy_config("t5"), seed=0).save(tmp_path / "lora")
    with pytest.raises(InputError, match=r"adapter = '.*': belongs to a base with other layers"):
        make_policy("t5", "fresh").weights.add("other", tmp_path / "lora")
    (tmp_path / "lora/adapter_model.safetensors").write_bytes(b"corrupted")
    with pytest.raises(StorageError, match="cannot be read"):
        make_policy("t5", "fresh").weights.add("other", tmp_path / "lora")
    with pytest.raises(InputError, match=r"adapter = '.*': is neither an existing path"):
        make_policy("t5", "full").weights.add("other", tmp_path / "nowhere")
