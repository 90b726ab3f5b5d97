"""The invariants of policy, reference, sampling and update on tiny T5 and BART."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from conftest import disturb, policy_config, small_config
from detoxrl import train as train_module
from detoxrl.config import Config
from detoxrl.errors import InputError
from detoxrl.policy.adapters import REFERENCE, load_policy
from detoxrl.policy.backbone import load_base
from detoxrl.policy.encoder_decoder import EncoderDecoderPolicy, draw
from detoxrl.records import Encoded, Prompt, Rollout
from detoxrl.rl.kl import k1
from detoxrl.rollout import collect, draws
from detoxrl.train import Targets, update

PROMPTS = [
    Prompt(id="a", text="#Person1#: You lost my novel on the train. You clown!"),
    Prompt(id="b", text="#Person1#: Yes? #Person2#: the soup was ice cold. #Person1#: Sorry."),
    Prompt(id="c", text="Short."),
    Prompt(id="d", text="#Person1#: I waited two weeks too long for the lamp. #Person2#: The van broke down. " * 2),
]
LENGTH = 16


def rollout_of(policy: EncoderDecoderPolicy, step: int = 0, temperature: float = 1.0) -> Rollout:
    config = replace(small_config().generation, max_new_tokens=LENGTH, temperature=temperature)
    return collect(policy, PROMPTS, config, seed=0, step=step)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_zero_at_the_first_step_and_grows_once_the_adapter_moves(
    policy: EncoderDecoderPolicy, temperature: float
) -> None:
    rollout = rollout_of(policy, temperature=temperature)
    assert k1(rollout.responses.logprobs, rollout.ref_logprobs).abs().max().item() < 1e-5
    disturb(policy)
    moved = rollout_of(policy)
    assert k1(moved.responses.logprobs, moved.ref_logprobs).abs().max().item() > 1e-3


def test_the_reference_of_a_loaded_adapter_is_that_adapter_and_not_the_bare_base(
    loaded: EncoderDecoderPolicy,
) -> None:
    rollout = rollout_of(loaded)
    assert loaded.reference == REFERENCE
    bare = loaded.encode([prompt.text for prompt in rollout.prompts], adapter=None)
    base, _, _ = loaded.logprobs(bare, rollout.responses.ids, 1.0, adapter=None)
    difference = (base - rollout.ref_logprobs)[rollout.responses.response_mask]
    assert difference.abs().max().item() > 1e-2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_values_while_sampling_are_the_teacher_forced_ones(
    policy: EncoderDecoderPolicy, temperature: float
) -> None:
    disturb(policy)
    encoded = policy.encode([prompt.text for prompt in PROMPTS])
    responses = policy.sample(encoded, draws(policy, 0, "test", 0, PROMPTS, 0, LENGTH), temperature)
    forced, entropy, values = policy.logprobs(encoded, responses.ids, temperature)
    mask = responses.response_mask
    torch.testing.assert_close(responses.logprobs[mask], forced[mask], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(responses.values[mask], values[mask], rtol=1e-4, atol=2e-6)
    assert (entropy[mask] > 0).all()


def test_every_sampled_token_counts_the_first_and_eos_too_and_nothing_after(fresh: EncoderDecoderPolicy) -> None:
    encoded = fresh.encode([prompt.text for prompt in PROMPTS])
    # Draws far above EOS (token 1 of hundreds) never bring it; a draw just inside its share does.
    chances = torch.full((4, LENGTH), 0.9)
    first, _, _ = fresh.logprobs(encoded, torch.full((4, 1), fresh.eos), 1.0)
    never = fresh.sample(encoded, chances, 1.0)
    assert never.response_mask.all()
    assert not never.ended.any()
    start = torch.full((1, 1), fresh.start)
    logits, _ = fresh._decode(encoded.select(torch.tensor([2])), start, None)
    share = logits[0, -1].softmax(-1)
    chances[2, 0] = share[: fresh.eos].sum() + share[fresh.eos] / 2
    responses = fresh.sample(encoded, chances, 1.0)
    assert responses.ids[2].tolist() == [fresh.eos] + [fresh.pad] * (LENGTH - 1)
    assert responses.response_mask[2].tolist() == [True] + [False] * (LENGTH - 1)
    assert responses.logprobs[2, 0].item() == pytest.approx(first[2, 0].item(), abs=1e-5)
    assert responses.logprobs[2, 1:].abs().sum() == 0
    assert responses.ended.tolist() == [False, False, True, False]
    # The rows that stay are not disturbed by the one that left.
    others = torch.tensor([0, 1, 3])
    assert responses.ids[others].tolist() == never.ids[others].tolist()


def test_a_response_depends_neither_on_its_batch_nor_on_padding(fresh: EncoderDecoderPolicy) -> None:
    together = rollout_of(fresh)
    for row, prompt in enumerate(together.prompts):
        alone = collect(fresh, [prompt], replace(small_config().generation, max_new_tokens=LENGTH), seed=0, step=0)
        mask = together.responses.response_mask[row]
        assert (
            alone.responses.ids[0][alone.responses.response_mask[0]].tolist()
            == together.responses.ids[row][mask].tolist()
        )
        torch.testing.assert_close(
            alone.responses.logprobs[0][alone.responses.response_mask[0]],
            together.responses.logprobs[row][mask],
            rtol=1e-4,
            atol=1e-5,
        )


def test_rollout_batch_size_changes_nothing(fresh: EncoderDecoderPolicy) -> None:
    whole = rollout_of(fresh)
    config = replace(small_config().generation, max_new_tokens=LENGTH, batch_size=2)
    split = collect(fresh, PROMPTS, config, seed=0, step=0)
    assert split.texts == whole.texts
    torch.testing.assert_close(split.responses.logprobs, whole.responses.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.ref_logprobs, whole.ref_logprobs, rtol=1e-4, atol=1e-5)


def test_steps_and_samples_draw_differently(fresh: EncoderDecoderPolicy) -> None:
    assert rollout_of(fresh, step=0).texts != rollout_of(fresh, step=1).texts


def run_update(policy: EncoderDecoderPolicy, config: Config, rollout: Rollout) -> dict[str, float]:
    mask = rollout.responses.response_mask
    generator = torch.Generator().manual_seed(5)
    targets = Targets(
        advantages=torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0),
        returns=torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0),
    )
    weights = [*policy.adapter_parameters(), *policy.value_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=config.rl.lr, eps=1e-5)
    return update(policy, Accelerator(), optimizer, rollout, targets, config, step=0)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_in_the_first_minibatch_and_moves_after_it(
    policy: EncoderDecoderPolicy, temperature: float
) -> None:
    small = small_config()
    generation = replace(small.generation, temperature=temperature)
    config = replace(small, rl=replace(small.rl, update_kl_limit=None), generation=generation)
    statistics = run_update(policy, config, rollout_of(policy, temperature=temperature))
    assert statistics["ratio/first_error"] < 1e-5
    assert statistics["ratio/max"] > 1.001


def test_training_changes_adapter_and_value_head_and_nothing_else(policy: EncoderDecoderPolicy) -> None:
    before = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    trainable = {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert trainable
    assert all(".decoder." in name and "lora_" in name and ".default." in name for name in trainable)
    run_update(policy, small_config(), rollout_of(policy))
    changed = {name for name, weight in policy.model.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == trainable
    assert policy.value_head.weight.abs().sum() > 0


def test_microbatch_size_does_not_change_the_update(bases: dict[str, Path], architecture: str) -> None:
    after = []
    for microbatch in (1, 4):
        policy = load_policy(str(bases[architecture]), None, policy_config(architecture), seed=0)
        config = replace(small_config(), rl=replace(small_config().rl, microbatch_size=microbatch, lr=1e-3))
        run_update(policy, config, rollout_of(policy))
        after.append(torch.cat([weight.detach().flatten() for weight in policy.adapter_parameters()]))
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-6)


def test_dropout_is_off(fresh: EncoderDecoderPolicy) -> None:
    assert not any(module.training for module in fresh.model.modules())
    assert rollout_of(fresh).texts == rollout_of(fresh).texts


def test_with_lora_everywhere_the_encoder_learns_too(bases: dict[str, Path], architecture: str) -> None:
    policy = load_policy(str(bases[architecture]), None, policy_config(architecture, encoder=True), seed=0)
    names = {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert any(".encoder." in name for name in names)
    before = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    assert run_update(policy, small_config(), rollout_of(policy))["ratio/first_error"] < 1e-5
    changed = {name for name, weight in policy.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any(".encoder." in name for name in changed)


def test_with_lora_everywhere_the_reference_reads_its_own_encoder(bases: dict[str, Path], architecture: str) -> None:
    policy = load_policy(str(bases[architecture]), None, policy_config(architecture, encoder=True), seed=0)
    disturb(policy)
    rollout = rollout_of(policy)
    bare = policy.encode([prompt.text for prompt in rollout.prompts], adapter=None)
    expected, _, _ = policy.logprobs(bare, rollout.responses.ids, 1.0, adapter=None)
    mask = rollout.responses.response_mask
    torch.testing.assert_close(rollout.ref_logprobs[mask], expected[mask].detach(), rtol=1e-4, atol=1e-5)


def test_a_step_that_moved_too_far_skips_its_other_epochs_and_a_gradient_is_scaled_down(
    bases: dict[str, Path],
) -> None:
    small = small_config()
    moved = {}
    for name, changes in {"free": {}, "held": {"max_grad_norm": 1e-9}, "short": {"update_kl_limit": 1e-12}}.items():
        policy = load_policy(str(bases["t5"]), None, policy_config("t5"), seed=0)
        before = [weight.detach().clone() for weight in policy.adapter_parameters()]
        config = replace(small, rl=replace(small.rl, **{"minibatch_size": 2, "update_kl_limit": None, **changes}))
        epochs = run_update(policy, config, rollout_of(policy))["epochs"]
        pairs = zip(before, policy.adapter_parameters(), strict=True)
        moved[name] = (epochs, sum(float((new.detach() - old).abs().sum()) for old, new in pairs))
    assert moved["free"][0] == moved["held"][0] == 2
    assert moved["short"][0] == 1
    assert moved["held"][1] < 0.05 * moved["free"][1]


def test_minibatches_are_shuffled_anew_in_every_epoch(
    fresh: EncoderDecoderPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    losses = train_module._losses

    def record(*given: object) -> object:
        seen.extend(given[3].tolist())  # type: ignore[attr-defined]
        return losses(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(train_module, "_losses", record)
    config = replace(small_config(), rl=replace(small_config().rl, update_kl_limit=None, epochs=4, minibatch_size=2))
    run_update(fresh, config, rollout_of(fresh))
    passes = [seen[i : i + 4] for i in range(0, 16, 4)]
    assert all(sorted(one) == [0, 1, 2, 3] for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_the_saved_adapter_loads_with_peft_alone_and_generates_the_same(
    loaded: EncoderDecoderPolicy, bases: dict[str, Path], architecture: str, tmp_path: Path
) -> None:
    disturb(loaded)
    loaded.save(tmp_path / "adapter")
    model = AutoModelForSeq2SeqLM.from_pretrained(bases[architecture])
    peft_model = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    tokenizer = AutoTokenizer.from_pretrained(bases[architecture])
    batch = tokenizer(PROMPTS[0].text, return_tensors="pt")
    start = torch.tensor([[loaded.start, 40, 50]])
    with torch.no_grad():
        logits = peft_model(**batch, decoder_input_ids=start).logits
        ours, _ = loaded._decode(loaded.encode([PROMPTS[0].text]), start, None)
        assert peft_model.generate(**batch, max_new_tokens=5).shape[0] == 1
    torch.testing.assert_close(ours, logits, rtol=1e-4, atol=1e-5)


def test_a_saved_policy_comes_back_with_its_value_head(fresh: EncoderDecoderPolicy, tmp_path: Path) -> None:
    disturb(fresh)
    fresh.save(tmp_path)
    weights = [*fresh.adapter_parameters(), *fresh.value_head.parameters()]
    kept = [weight.detach().clone() for weight in weights]
    for weight in weights:
        torch.nn.init.zeros_(weight)
    fresh.load(tmp_path)
    assert all(torch.equal(weight, before) for weight, before in zip(weights, kept, strict=True))


def test_inverse_cdf_draws_each_token_with_its_probability_and_never_one_without() -> None:
    logprobs = torch.tensor([[0.0, 0.25, 0.5, 0.25, 0.0]]).log().expand(4, -1)
    tokens = draw(logprobs, torch.tensor([[0.0], [0.249], [0.25], [1.0]]))
    assert tokens.squeeze(1).tolist() == [1, 1, 2, 3]


def test_selecting_rows_cuts_the_padding_none_of_them_needs() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    encoded = Encoded(states=torch.arange(9.0).view(3, 3, 1), mask=mask).select(torch.tensor([2, 1]))
    assert encoded.states.squeeze(-1).tolist() == [[6.0, 7.0], [3.0, 4.0]]
    assert encoded.mask.tolist() == [[1, 0], [1, 1]]


@pytest.mark.parametrize("base", ["/nowhere", "classifier"])
def test_a_base_that_is_no_encoder_decoder_is_bad_input(base: str, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    if base == "classifier":
        tiny = BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, vocab_size=9)
        BertForSequenceClassification(tiny).save_pretrained(tmp_path)
        base = str(tmp_path)
    with pytest.raises(InputError, match=r"policy\.base"):
        load_base(base)


def test_a_target_that_is_no_layer_is_named_with_those_there_are(bases: dict[str, Path]) -> None:
    config = replace(policy_config("t5"), lora_targets=("query",))
    with pytest.raises(InputError, match=r"lora_targets = 'query'.*choose from .*\bq\b"):
        load_policy(str(bases["t5"]), None, config, seed=0)


def test_an_adapter_of_another_base_is_bad_input(bases: dict[str, Path], tmp_path: Path) -> None:
    load_policy(str(bases["bart"]), None, policy_config("bart"), seed=0).save(tmp_path)
    with pytest.raises(InputError, match=r"policy\.adapter = .*; give an adapter of this base"):
        load_policy(str(bases["t5"]), tmp_path, policy_config("t5"), seed=0)


def test_a_layer_no_adapter_may_reach_is_no_target(bases: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="lora_targets = 'lm_head'"):
        load_policy(str(bases["t5"]), None, replace(policy_config("t5"), lora_targets=("lm_head",)), seed=0)


def test_a_pickled_adapter_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="safetensors"):
        load_policy(str(bases["t5"]), tmp_path, policy_config("t5"), seed=0)
