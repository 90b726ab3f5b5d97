"""What must hold of every policy: four architectures under fresh LoRA, loaded LoRA and full weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForSeq2SeqLM

from conftest import ENCODER_DECODERS, KINDS, Make, disturb, prompted_rows, small_config
from detoxrl.config.schema import Config
from detoxrl.evaluation.judges import Judge
from detoxrl.models import policy as policy_module
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import draw_uniforms, in_row_order, sample_batches
from detoxrl.models.types import Encoded, Prompt, Rollout
from detoxrl.models.weights import POLICY, LoraWeights
from detoxrl.rl.kl import k1
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training import train as train_module
from detoxrl.training.rollout import collect_rollout
from detoxrl.training.train import Targets, train, update

PROMPTS = [
    Prompt(id="a", text="#Person1#: You lost my novel on the train. You clown!"),
    Prompt(id="b", text="#Person1#: Yes? #Person2#: the soup was ice cold. #Person1#: Sorry."),
    Prompt(id="c", text="Short."),
    Prompt(id="d", text="#Person1#: I waited two weeks too long for the lamp. #Person2#: The van broke down. " * 2),
]
TEXTS = [prompt.text for prompt in PROMPTS]
LENGTH, EOS = 16, 1
ROWS = prompted_rows(0, {"train": 32, "validation": 4})


def rollout_of(policy: Policy, step: int = 0, temperature: float = 1.0, batch_size: int = 8) -> Rollout:
    config = replace(small_config().generation, max_new_tokens=LENGTH, temperature=temperature, batch_size=batch_size)
    return collect_rollout(policy, PROMPTS, config, seed=0, step=step)


def targets_of(rollout: Rollout) -> Targets:
    mask = rollout.responses.response_mask
    generator = torch.Generator().manual_seed(5)
    return Targets(
        advantages=torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0),
        returns=torch.where(mask, torch.randn(mask.shape, generator=generator), 0.0),
    )


def run_update(policy: Policy, config: Config, rollout: Rollout) -> dict[str, float]:
    weights = [*policy.parameters(), *policy.value_head.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=config.rl.lr, eps=1e-5)
    return update(policy, Accelerator(), optimizer, rollout, targets_of(rollout), config, step=0)


def share_of_e(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    return torch.tensor([response.count("e") / max(len(response), 1) for response in responses])


def share_of_a(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """A judge that has no part in the reward: how much of the response is the letter a."""
    return np.array([text.count("a") / max(len(text), 1) for text in texts])


def learn(
    policy: Policy, folder: Path, config: Config, reward: object = share_of_e, judge: Judge = share_of_a
) -> list[dict[str, float]]:
    train(RunFolder(folder), config, policy, reward, judge, ROWS["train"], ROWS["validation"])  # type: ignore[arg-type]
    with (folder / "metrics.jsonl").open() as lines:
        return [json.loads(line) for line in lines]


def loop_config(**rl: object) -> Config:
    small = small_config()
    return replace(small, rl=replace(small.rl, **{"steps": 3, "validate_every": 9, "lr": 1e-3, **rl}))


def every_weight(policy: Policy) -> dict[str, torch.Tensor]:
    """All weights there are, by name: trained, frozen, and those of the reference."""
    found = {name: weight.detach().clone() for name, weight in policy.model.named_parameters()}
    if not isinstance(policy.weights, LoraWeights):
        with policy.weights.using(None):
            start = dict(policy.weights.active.named_parameters())
        found |= {f"start {name}": weight.detach().clone() for name, weight in start.items()}
    return found


# KL = 0 at the first step; ratio = 1 in the first minibatch of every step


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_kl_is_zero_at_the_first_step_and_grows_once_the_policy_moves(policy: Policy, temperature: float) -> None:
    rollout = rollout_of(policy, temperature=temperature)
    tensors = (rollout.encoded.states, rollout.responses.logprobs, rollout.responses.values, rollout.ref_logprobs)
    assert not any(tensor.requires_grad for tensor in tensors)
    assert k1(rollout.responses.logprobs, rollout.ref_logprobs).abs().max().item() < 1e-5
    disturb(policy)
    moved = rollout_of(policy)
    assert k1(moved.responses.logprobs, moved.ref_logprobs).abs().max().item() > 1e-3


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ratio_is_one_in_the_first_minibatch_and_moves_after_it(policy: Policy, temperature: float) -> None:
    generation = replace(small_config().generation, temperature=temperature)
    config = replace(loop_config(update_kl_limit=None, lr=1e-2), generation=generation)
    statistics = run_update(policy, config, rollout_of(policy, temperature=temperature))
    assert statistics["ratio/first_error"] < 1e-5
    assert statistics["ratio/max"] > 1.001


def test_one_ratio_below_one_in_the_first_minibatch_is_seen(fresh: Policy) -> None:
    rollout = rollout_of(fresh)
    higher = rollout.responses.logprobs.clone()
    higher[1, 0] += 0.5
    off = replace(rollout, responses=replace(rollout.responses, logprobs=higher))
    found = run_update(fresh, loop_config(epochs=1, microbatch_size=2, minibatch_size=4, lr=1e-9), off)
    assert found["ratio/first_error"] == pytest.approx(1 - np.exp(-0.5), rel=1e-4)
    assert found["ratio/max"] == pytest.approx(1.0, rel=1e-4)


def test_in_the_loop_ratios_start_at_one_at_every_step_and_only_the_policy_moves(
    policy: Policy, tmp_path: Path
) -> None:
    before, trained = every_weight(policy), {id(weight) for weight in policy.parameters()}
    names = {name for name, weight in policy.model.named_parameters() if id(weight) in trained}
    records = learn(policy, tmp_path, loop_config())
    assert [record["ratio/first_error"] < 1e-5 for record in records] == [True] * 3
    assert abs(records[0]["kl/reference"]) < 1e-5 < abs(records[-1]["kl/reference"])
    after = every_weight(policy)
    assert {name for name in before if not torch.equal(before[name], after[name])} == names
    assert policy.value_head.weight.abs().sum() > 0


# Sampling and scoring agree, token by token


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_and_values_while_sampling_are_the_teacher_forced_ones(policy: Policy, temperature: float) -> None:
    disturb(policy)
    encoded = policy.encode(TEXTS)
    responses = policy.sample(encoded, draw_uniforms(policy, 0, "test", 0, PROMPTS, 0, LENGTH), temperature)
    assert responses.response_mask.sum(1).unique().numel() > 1  # some end, some do not
    forced, entropy, values = policy.logprobs(encoded, responses.ids, temperature)
    mask = responses.response_mask
    torch.testing.assert_close(responses.logprobs[mask], forced[mask], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(responses.values[mask], values[mask], rtol=1e-4, atol=1e-4)  # sums that cancel
    assert (entropy[mask] > 0).all()


def test_logprobs_are_those_of_the_model_called_by_hand(policy: Policy) -> None:
    ids = torch.tensor([[40, 50, 7]])
    disturb(policy)
    ours, entropy, values = policy.logprobs(policy.encode([TEXTS[1]]), ids, 0.7)
    assert ours.requires_grad
    assert not entropy.requires_grad
    prompt = policy.tokenizer(TEXTS[1], return_tensors="pt").input_ids
    if policy.model.config.is_encoder_decoder:
        start = torch.tensor([[policy.model.config.decoder_start_token_id]])
        out = policy.model(prompt, decoder_input_ids=torch.cat([start, ids], 1), output_hidden_states=True)
        logits, states = out.logits[:, :3], out.decoder_hidden_states[-1][:, :3]
    else:
        out = policy.model(torch.cat([prompt, ids], 1), output_hidden_states=True)
        logits, states = out.logits[:, -4:-1], out.hidden_states[-1][:, -4:-1]
    expected = (logits.double() / 0.7).log_softmax(-1)
    scaled = states / states.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(values, policy.value_head(scaled)[..., 0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.double(), expected.gather(-1, ids[..., None])[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(entropy.double(), -(expected.exp() * expected).sum(-1), rtol=1e-5, atol=1e-6)


def test_every_sampled_token_counts_the_first_and_eos_too_and_nothing_after(fresh: Policy) -> None:
    encoded = fresh.encode(TEXTS)
    # Draws far above EOS (token 1 of hundreds) never bring it; a draw just inside its share does.
    chances = torch.full((4, LENGTH), 0.9)
    never = fresh.sample(encoded, chances, 1.0)
    assert never.response_mask.all()
    assert not never.ended.any()
    shares = torch.stack([fresh.logprobs(encoded, torch.full((4, 1), token), 1.0)[0] for token in (0, EOS)])
    below, own = shares[:, 2, 0].exp()
    chances[2, 0] = below + own / 2
    responses = fresh.sample(encoded, chances, 1.0)
    assert responses.ids[2].tolist() == [EOS] + [fresh.pad] * (LENGTH - 1)
    assert responses.response_mask[2].tolist() == [True] + [False] * (LENGTH - 1)
    assert responses.logprobs[2, 0].item() == pytest.approx(own.log().item(), abs=1e-5)
    assert responses.logprobs[2, 1:].abs().sum() == 0
    assert responses.ended.tolist() == [False, False, True, False]
    # The rows that stay are not disturbed by the one that left.
    others = torch.tensor([0, 1, 3])
    assert responses.ids[others].tolist() == never.ids[others].tolist()


def test_the_last_row_goes_on_when_all_others_have_ended(fresh: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, chances = fresh.encode(TEXTS), torch.full((4, LENGTH), 0.9)
    alone = fresh.sample(encoded, chances, 1.0).ids[1].tolist()
    draw = policy_module.draw_tokens

    def end_others_at_once(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        tokens = draw(logprobs, uniforms)
        return torch.where(uniforms == 0.5, EOS, tokens)

    monkeypatch.setattr(policy_module, "draw_tokens", end_others_at_once)
    chances[[0, 2, 3], 2] = 0.5
    responses = fresh.sample(encoded, chances, 1.0)
    assert responses.ids[1].tolist() == alone
    assert responses.response_mask.sum(1).tolist() == [3, LENGTH, 3, 3]
    assert responses.ended.tolist() == [True, False, True, True]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("t5", "loaded with encoder"), ("bart", "loaded with encoder"), ("gpt2", "loaded"), ("llama", "loaded")],
)
def test_the_reference_can_be_sampled_too(name: str, kind: str, make_policy: Make) -> None:
    loaded = make_policy(name, kind, encoder=name in ENCODER_DECODERS)
    config = replace(small_config().generation, max_new_tokens=LENGTH)
    before = in_row_order(sample_batches(loaded, PROMPTS, config, seed=0, stream="x"))
    disturb(loaded)
    assert in_row_order(sample_batches(loaded, PROMPTS, config, seed=0, stream="x")) != before
    assert in_row_order(sample_batches(loaded, PROMPTS, config, seed=0, stream="x", adapter=loaded.reference)) == before
    assert not any("</s>" in text or "<pad>" in text for (text,) in before)
    two = in_row_order(sample_batches(loaded, PROMPTS, config, seed=0, stream="x", adapter=loaded.reference, samples=2))
    assert [texts[:1] for texts in two] == before
    asked, sample = [], loaded.sample

    def note(*given: object) -> object:
        asked.append(torch.is_grad_enabled())
        return sample(*given)  # type: ignore[arg-type]

    loaded.sample = note  # type: ignore[method-assign, assignment]
    batches = list(sample_batches(loaded, PROMPTS, replace(config, batch_size=3), seed=0, stream="x"))
    assert ([list(batch) for batch in batches], asked) == ([[2, 0, 1], [3]], [False, False])  # of like length
    rest = sample_batches(loaded, PROMPTS, replace(config, batch_size=3), seed=0, stream="x", skip=3)
    assert list(rest) == batches[1:]
    assert all(first != second for first, second in two)


# Padding never changes a result


def test_a_response_depends_neither_on_its_batch_nor_on_padding(policy: Policy) -> None:
    disturb(policy)
    together = rollout_of(policy)
    for mask in (together.encoded.mask, together.responses.response_mask):
        assert mask.sum(1).unique().numel() > 1  # so there is padding to go wrong, on both sides
    for row, prompt in enumerate(together.prompts):
        alone = collect_rollout(
            policy, [prompt], replace(small_config().generation, max_new_tokens=LENGTH), seed=0, step=0
        )
        mask, ours = together.responses.response_mask[row], alone.responses.response_mask[0]
        assert alone.responses.ids[0][ours].tolist() == together.responses.ids[row][mask].tolist()
        pairs = (
            (alone.responses.logprobs[0], together.responses.logprobs[row]),
            (alone.ref_logprobs[0], together.ref_logprobs[row]),
            (alone.responses.values[0], together.responses.values[row]),
        )
        for one, other in pairs:
            torch.testing.assert_close(one[ours], other[mask], rtol=1e-4, atol=1e-4)


def test_what_stands_in_the_padding_of_prompts_and_behind_responses_never_matters(policy: Policy) -> None:
    encoded = policy.encode(TEXTS)
    ids = torch.randint(3, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    hidden = ~encoded.mask.bool()
    junk = torch.where(hidden if encoded.states.ndim == 2 else hidden[..., None], 17, encoded.states)
    dirty = torch.cat([ids[:, :4], ids[:, 4:] + 9], 1)
    clean, _, _ = policy.logprobs(encoded, ids, 1.0)
    soiled, _, _ = policy.logprobs(replace(encoded, states=junk), dirty, 1.0)
    torch.testing.assert_close(clean[:, :4], soiled[:, :4], rtol=1e-5, atol=1e-6)
    assert not torch.isclose(clean[:, 4:], soiled[:, 4:]).any()


def test_a_causal_model_without_position_ids_would_be_wrong(make_policy: Make) -> None:
    policy = make_policy("gpt2", "fresh")
    encoded, ids = policy.encode(TEXTS), torch.full((4, 6), 40)
    mask = torch.cat([encoded.mask, torch.ones(4, 5, dtype=torch.long)], 1)
    logits = policy.model(torch.cat([encoded.states, ids[:, :5]], 1), attention_mask=mask).logits[:, -6:]
    naive = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    ours, _, _ = policy.logprobs(encoded, ids, 1.0)
    wrong = (naive - ours).abs().amax(1)
    assert wrong[3] < 1e-5  # the longest prompt has no padding
    assert (wrong[:3] > 0.5).all()


def test_rollout_batch_size_changes_nothing(policy: Policy) -> None:
    whole, split = rollout_of(policy), rollout_of(policy, batch_size=2)
    assert split.texts == whole.texts
    torch.testing.assert_close(split.responses.logprobs, whole.responses.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(split.ref_logprobs, whole.ref_logprobs, rtol=1e-4, atol=1e-5)


def test_a_rollout_is_as_long_as_its_longest_response(fresh: Policy) -> None:
    fresh.ends = list(range(300))
    assert rollout_of(fresh).responses.ids.shape == rollout_of(fresh).ref_logprobs.shape == (4, 1)


def test_selecting_rows_cuts_the_padding_none_of_them_needs_on_either_side() -> None:
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    encoded = Encoded(states=torch.arange(9.0).view(3, 3, 1), mask=mask).select(torch.tensor([2, 1]))
    assert encoded.states.squeeze(-1).tolist() == [[6.0, 7.0], [3.0, 4.0]]
    assert encoded.mask.tolist() == [[1, 0], [1, 1]]
    left = Encoded(states=torch.arange(9).view(3, 3), mask=mask.flip(1)).select(torch.tensor([2, 1]))
    assert left.states.tolist() == [[7, 8], [4, 5]]
    assert left.mask.tolist() == [[0, 1], [1, 1]]


# Dropout is off


def test_dropout_is_off_in_rollout_reference_and_update(policy: Policy) -> None:
    encoded, ids = policy.encode(TEXTS), torch.full((4, 6), 40)
    for adapter in (POLICY, policy.reference, None):
        once, again = (policy.logprobs(encoded, ids, 1.0, adapter)[0] for _ in range(2))
        assert torch.equal(once, again)
        assert not any(module.training for module in policy.weights.active.modules())
    assert torch.equal(encoded.states, policy.encode(TEXTS).states)
    seen = policy.logprobs(policy.encode(TEXTS), ids, 1.0)[0]
    policy._network = PlainNetwork  # type: ignore[assignment]  # T5's own here has no dropout to forget
    policy.model.train()  # there is dropout, and it would matter
    assert (policy.logprobs(policy.encode(TEXTS), ids, 1.0)[0] - seen).abs().max() > 1e-3


def test_a_lora_that_joins_later_brings_no_dropout(
    loaded: Policy, starts: dict[object, Path], architecture: str
) -> None:
    loaded.weights.add("other", starts[architecture, "loaded"])
    assert not any(module.training for module in loaded.model.modules())


# Reference and base


def test_the_reference_of_a_loaded_lora_is_that_lora_and_not_the_bare_base(loaded: Policy) -> None:
    rollout = rollout_of(loaded)
    bare = loaded.encode([prompt.text for prompt in rollout.prompts], adapter=None)
    base, _, _ = loaded.logprobs(bare, rollout.responses.ids, 1.0, adapter=None)
    difference = (base - rollout.ref_logprobs)[rollout.responses.response_mask]
    assert difference.abs().max().item() > 1e-2


def test_one_base_is_in_memory_and_a_full_copy_holds_only_what_trains(
    make_policy: Make, bases: dict[str, Path]
) -> None:
    for name in ENCODER_DECODERS:
        full = make_policy(name, "full")
        own = {weight.data_ptr() for weight in full.model.parameters()}
        trained = {weight.data_ptr() for weight in full.parameters()}
        with full.weights.using(None):
            start = {weight.data_ptr() for weight in full.weights.active.parameters()}
        assert own & start == own - trained
        bare, lora = AutoModelForSeq2SeqLM.from_pretrained(bases[name]), make_policy(name, "loaded")
        adapters = [weight for path, weight in lora.model.named_parameters() if "lora_" in path]
        expected = sum(weight.numel() for weight in [*bare.parameters(), *adapters])
        assert sum(weight.numel() for weight in lora.model.parameters()) == expected
        with lora.weights.using(lora.reference):
            assert {weight.data_ptr() for weight in lora.weights.active.parameters()} <= {
                weight.data_ptr() for weight in lora.model.parameters()
            }


# Gradients


def test_only_what_trains_has_gradients_and_they_are_not_all_zero(policy: Policy) -> None:
    config, rollout = loop_config(), rollout_of(policy)
    part = train_module._losses(policy, rollout, targets_of(rollout), torch.arange(4), config)
    part["policy"].backward(retain_graph=True)  # type: ignore[no-untyped-call]
    with_gradient = {name for name, weight in policy.model.named_parameters() if weight.grad is not None}
    assert with_gradient == {name for name, weight in policy.model.named_parameters() if weight.requires_grad}
    assert not any(".encoder." in name for name in with_gradient)
    if isinstance(policy.weights, LoraWeights):
        assert all("lora_" in name and ".default." in name for name in with_gradient)
    kept = {name: weight.grad.clone() for name, weight in policy.model.named_parameters() if weight.grad is not None}
    assert sum(bool(gradient.any()) for gradient in kept.values()) >= len(kept) // 2
    assert policy.value_head.weight.grad is None
    part["value"].backward()  # type: ignore[no-untyped-call]
    assert policy.value_head.weight.grad.abs().sum() > 0
    assert all(torch.equal(kept[name], dict(policy.model.named_parameters())[name].grad) for name in kept)


def test_microbatch_size_does_not_change_the_update(make_policy: Make) -> None:
    for name, kind in KINDS:
        after = []
        for microbatch in (1, 3, 4):
            policy = make_policy(name, kind)
            # Adam and clipping do not see a gradient's scale, so a wrong divisor shows in the norm before clipping.
            config = loop_config(microbatch_size=microbatch, max_grad_norm=1e-3, epochs=1)
            weights = [*policy.parameters(), *policy.value_head.parameters()]
            rollout = rollout_of(policy)
            norm = update(
                policy, Accelerator(), torch.optim.SGD(weights, lr=0.1), rollout, targets_of(rollout), config, 0
            )["grad_norm"]
            after.append((norm, torch.cat([weight.detach().flatten() for weight in weights])))
        for norm, moved in after[1:]:
            assert norm == pytest.approx(after[0][0], rel=1e-4)
            torch.testing.assert_close(moved, after[0][1], rtol=1e-4, atol=1e-6)


def test_a_trained_encoder_learns_and_the_reference_reads_its_own(make_policy: Make) -> None:
    for name in ENCODER_DECODERS:
        for kind in ("fresh", "loaded with encoder", "full"):
            policy = make_policy(name, kind, encoder=True)
            before, states = every_weight(policy), policy.encode(TEXTS).states.detach()
            assert run_update(policy, loop_config(lr=1e-2), rollout_of(policy))["ratio/first_error"] < 1e-5
            after = every_weight(policy)
            changed = {name for name in before if not torch.equal(before[name], after[name])}
            assert any("encoder." in name for name in changed)
            assert not any(name.startswith("start ") or ".reference." in name for name in changed)
            torch.testing.assert_close(policy.encode(TEXTS, policy.reference).states, states, rtol=1e-4, atol=1e-5)
            assert (policy.encode(TEXTS).states - states).abs().max() > 1e-2
            rollout = rollout_of(policy)
            start = policy.encode([prompt.text for prompt in rollout.prompts], policy.reference)
            expected, _, _ = policy.logprobs(start, rollout.responses.ids, 1.0, policy.reference)
            mask = rollout.responses.response_mask
            torch.testing.assert_close(rollout.ref_logprobs[mask], expected[mask].detach(), rtol=1e-4, atol=1e-5)


# Save at k, go on to n


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_a_run_that_stopped_goes_on_as_if_it_never_had(name: str, kind: str, make_policy: Make, tmp_path: Path) -> None:
    calls = 0

    def failing(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:  # one call fits the normaliser, one belongs to each step
            raise ConnectionError
        return share_of_e(prompts, responses)

    whole, broken, rest = (make_policy(name, kind) for _ in range(3))
    config = loop_config(steps=4, kl_target=1.0)
    records = learn(whole, tmp_path / "whole", config)
    with pytest.raises(ConnectionError):
        learn(broken, tmp_path / "parts", config, failing)
    again = learn(rest, tmp_path / "parts", config)
    assert [record["step"] for record in again] == [0, 1, 2, 3]
    for one, other in zip(records, again, strict=True):
        assert {k: v for k, v in one.items() if "second" not in k} == {
            k: v for k, v in other.items() if "second" not in k
        }
    expected, found = every_weight(whole), every_weight(rest)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(whole.value_head.weight, rest.value_head.weight)
