"""Does the written-out decoder of Llama's family give the numbers of transformers' own forward pass?"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from backbones import _LLAMA, save_backbone
from conftest import disturb
from detoxrl.config.schema import PolicyConfig
from detoxrl.errors import InputError
from detoxrl.models import llama, matrices
from detoxrl.models.kernels import PUBLIC, using_kernels
from detoxrl.models.llama import LlamaNetwork
from detoxrl.models.loading import load_base
from detoxrl.models.lora import load_policy
from detoxrl.models.plain import PlainNetwork
from detoxrl.models.policy import Network, Policy
from detoxrl.models.sampling import require_agreement
from detoxrl.models.types import Encoded
from detoxrl.models.weights import POLICY, LoraWeights
from learning import TEXTS

GROUP = 3
LENGTH = 7
ROWS = len(TEXTS) * GROUP
IDS = torch.randint(3, 250, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
LENGTHS = torch.randint(1, LENGTH + 1, (ROWS, 1), generator=torch.Generator().manual_seed(1))
MASK = torch.arange(LENGTH) < LENGTHS
HOLES = MASK & (torch.arange(LENGTH) != 1)
UNIFORMS = torch.rand(ROWS, LENGTH, generator=torch.Generator().manual_seed(2))
EVERY_MATRIX = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
WIDE = {"head_dim": 16}  # Heads that are wider than their share of the model's width.
YARN = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope", "factor": 2.0, "rope_theta": 10_000.0, "original_max_position_embeddings": 128,
    "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
}  # fmt: skip
Make = Callable[..., PreTrainedModel]


def _llama(**settings: Any) -> PreTrainedModel:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**_LLAMA, **settings))


def _mistral(**settings: Any) -> PreTrainedModel:
    return hf.MistralForCausalLM(hf.MistralConfig(**_LLAMA, **settings))


def _qwen2(**settings: Any) -> PreTrainedModel:
    return hf.Qwen2ForCausalLM(hf.Qwen2Config(**_LLAMA, **settings))


def _gemma(**settings: Any) -> PreTrainedModel:
    return hf.GemmaForCausalLM(hf.GemmaConfig(**_LLAMA, **WIDE, **settings))


def _qwen3(**settings: Any) -> PreTrainedModel:
    return hf.Qwen3ForCausalLM(hf.Qwen3Config(**_LLAMA, **WIDE, **settings))


FAMILY: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "llama, tied": lambda: _llama(tie_word_embeddings=True),
    "llama with biases": lambda: _llama(attention_bias=True, mlp_bias=True),
    "llama with yarn": lambda: _llama(rope_parameters=YARN),
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "mistral": lambda: _mistral(sliding_window=None),
}


def moved(make: Callable[[], PreTrainedModel]) -> Callable[[], PreTrainedModel]:
    """Return a maker of the model with norms and biases that differ from those at first, which hide mistakes."""

    def made() -> PreTrainedModel:
        model = make()
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() == 1:
                    weight.add_(torch.randn(weight.shape) * 0.2)
        return model

    return made


def policy_on(make: Callable[[], PreTrainedModel], folder: Path, **settings: Any) -> Policy:
    """Return a policy on a tiny model, moved away from its start, some of whose responses end early."""
    base = save_backbone(moved(make), folder)
    lora = {} if settings.get("full_weights") else {"lora_rank": 4, "lora_alpha": 1, "lora_targets": EVERY_MATRIX}
    policy = load_policy(str(base), None, PolicyConfig(base=str(base), **{**lora, **settings}), seed=0)
    disturb(policy)
    policy.eos_token_ids += range(40, 100)
    return policy


def passed(
    policy: Policy, network: type[Network], mask: torch.Tensor | None, adapter: str | None, checkpointing: bool = False
) -> dict[str, torch.Tensor]:
    """Return what a pass of groups computes, and the gradients of a loss of all of it under weights that train."""
    trains = adapter == POLICY
    with torch.set_grad_enabled(trains):
        encoded = policy.encode(TEXTS)
        scorer = network(policy.weights, adapter, checkpointing)
        found = scorer.logprobs(encoded, IDS, mask, 0.7, entropy_gradient=True)
        tensors = dict(zip(("logprobs", "entropies", "states"), found, strict=True))
        if trains:
            generator = torch.Generator().manual_seed(3)
            loss = sum((torch.randn(part.shape, generator=generator) * part).sum() for part in found)
            weights = policy.parameters()
            gradients = torch.autograd.grad(loss, weights, allow_unused=False)  # type: ignore[arg-type]
            tensors |= {str(number): gradient for number, gradient in enumerate(gradients)}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Demand that no number is off by more than `tolerance` of the largest number of its tensor."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        largest = float(tensor.abs().max())
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=tolerance * largest, msg=lambda m, n=name: f"{n} {m}"
        )


family = pytest.mark.parametrize("name", FAMILY)
kinds = pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])


@family
@kinds
def test_a_pass_agrees_with_transformers(name: str, full: bool, tmp_path: Path) -> None:
    policy = policy_on(FAMILY[name], tmp_path, full_weights=full)
    assert policy._network_class is LlamaNetwork
    assert not policy.encode(TEXTS).mask.all()
    for mask in (None, MASK, HOLES):
        for adapter in (POLICY, None):
            expected = passed(policy, PlainNetwork, mask, adapter)
            assert_close(passed(policy, LlamaNetwork, mask, adapter), expected)
    assert_close(passed(policy, LlamaNetwork, MASK, POLICY, True), passed(policy, LlamaNetwork, MASK, POLICY), 0)


@family
@kinds
def test_samples_agree_with_transformers(name: str, full: bool, tmp_path: Path) -> None:
    policy = policy_on(FAMILY[name], tmp_path, full_weights=full)
    encoded = policy.encode(TEXTS)
    for adapter in (POLICY, None):
        found = policy.sample(encoded, UNIFORMS, 0.7, adapter)
        policy._network_class = PlainNetwork
        expected = policy.sample(encoded, UNIFORMS, 0.7, adapter)
        policy._network_class = LlamaNetwork
        assert torch.equal(found.ids, expected.ids)
        assert_close({"logprobs": found.logprobs}, {"logprobs": expected.logprobs})
        lengths = found.response_mask.sum(1).view(-1, GROUP)
        assert lengths.unique().numel() > 2
        assert (lengths.amax(1) > lengths.amin(1)).any()  # Some rows leave a group before others.


def test_whole_groups_may_leave_before_others(tmp_path: Path) -> None:
    policy = policy_on(_llama, tmp_path)
    encoded = policy.encode(TEXTS)
    with torch.no_grad():
        steps = [
            network(policy.weights, POLICY).steps(encoded, LENGTH, GROUP) for network in (PlainNetwork, LlamaNetwork)
        ]
        tokens = None
        rows = torch.arange(ROWS)
        for t in range(LENGTH):
            (expected, expected_states), (found, states) = (one.next(tokens) for one in steps)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
            torch.testing.assert_close(states, expected_states, rtol=0, atol=1e-5 * float(expected_states.abs().max()))
            # First a part of each group, then the first two groups whole.
            kept = (rows % GROUP != t) if t < 2 else rows >= 2 * GROUP
            rows = rows[kept]
            tokens = IDS[rows, t]
            for one in steps:
                one.keep(kept)
    assert len(rows) == len(TEXTS) - 2


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_base_stored_in_bfloat16_is_computed_in_float32_where_that_is_faster(name: str, tmp_path: Path) -> None:
    base = str(save_backbone(moved(FAMILY[name]), tmp_path))
    configs = [PolicyConfig(base=base, lora_rank=4, bf16=bf16) for bf16 in (True, False)]
    policies = [load_policy(base, None, config, seed=0) for config in configs]
    disturb(policies[0])
    with torch.no_grad():
        for stored_weight, weight in zip(*(policy.model.parameters() for policy in policies), strict=True):
            weight.copy_(stored_weight)

    found = []
    for policy in policies:
        with using_kernels(PUBLIC):
            parts = passed(policy, LlamaNetwork, MASK, POLICY)
            parts["sampled"] = policy.sample(policy.encode(TEXTS), UNIFORMS, 0.7).logprobs
        found.append(parts)

    for part, exact in found[1].items():
        torch.testing.assert_close(found[0][part], exact, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("bf16_kernels")
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_base_in_bfloat16_is_as_close_to_float32_as_transformers_is(name: str, tmp_path: Path) -> None:
    base = save_backbone(moved(FAMILY[name]), tmp_path)
    rounded, _ = load_base(str(base), bf16=True)
    rounded.float().save_pretrained(base)  # The same weights, which bfloat16 holds exactly.

    found = {}
    for network, bf16 in ((LlamaNetwork, True), (PlainNetwork, True), (PlainNetwork, False)):
        policy = load_policy(str(base), None, PolicyConfig(base=str(base), lora_rank=4, bf16=bf16), seed=0)
        disturb(policy)
        found[network, bf16] = passed(policy, network, MASK, POLICY)
        with torch.no_grad():
            steps = network(policy.weights, POLICY).steps(policy.encode(TEXTS), LENGTH, GROUP)
            logits = [steps.next(None)[0], steps.next(IDS[:, 0])[0]]
        found[network, bf16]["logits"] = torch.stack(logits).float()

    exact = found[PlainNetwork, False]
    for part in ("logprobs", "entropies", "logits"):
        ours, theirs = (
            float((found[network, True][part].float() - exact[part]).pow(2).mean().sqrt())
            for network in (LlamaNetwork, PlainNetwork)
        )
        assert 0 < ours < 1.5 * theirs


def test_a_fast_network_that_is_wrong_in_sampling_and_scoring_alike_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_on(_llama, tmp_path)
    require_agreement(policy, "base")
    assert policy._network_class is LlamaNetwork
    monkeypatch.setattr(llama, "_rotated", lambda x, turns: x)
    with pytest.raises(InputError, match="nats off what it scores"):
        require_agreement(policy, "base")


def test_nothing_of_a_pass_stays_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_on(_llama, tmp_path)
    read: list[weakref.ref[torch.Tensor]] = []
    rotated = llama._rotated

    def spy(x: torch.Tensor, turns: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        result = rotated(x, turns)
        read.append(weakref.ref(result))
        return result

    monkeypatch.setattr(llama, "_rotated", spy)
    for checkpointing in (False, True):
        policy.checkpointing = checkpointing
        policy.logprobs(policy.encode(TEXTS), IDS, 1.0, mask=MASK)
        assert len(read) == 2 * 2  # Queries and keys in each of two layers.
        assert all(tensor() is None for tensor in read)
        read.clear()


def test_a_pad_token_inside_a_prompt_is_read_and_its_embedding_learns_nothing(tmp_path: Path) -> None:
    policy = policy_on(_llama, tmp_path, full_weights=True)
    pad = policy.pad_token_id
    assert policy.model.get_input_embeddings().padding_idx == pad
    encoded = policy.encode(TEXTS)
    encoded.states[:, -2] = pad
    gradients = []
    for network in (PlainNetwork, LlamaNetwork):
        found = network(policy.weights, POLICY).logprobs(encoded, IDS, MASK, 1.0)[0]
        (gradient,) = torch.autograd.grad(found.sum(), policy.model.get_input_embeddings().weight)
        gradients.append(gradient)
    assert not gradients[0][pad].any()
    assert_close({"embedding": gradients[1]}, {"embedding": gradients[0]})


def test_no_row_is_padding_and_no_prompt_is_read_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_on(_llama, tmp_path)
    encoded = policy.encode(TEXTS)
    sizes: list[int] = []
    normed = LlamaNetwork.normed

    def counting(network: LlamaNetwork, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        return normed(network, x, weight)

    monkeypatch.setattr(LlamaNetwork, "normed", counting)
    policy.logprobs(encoded, IDS, 1.0, mask=MASK)
    tokens = int(encoded.mask.sum()) + int((MASK.sum(1) - 1).sum())
    assert set(sizes) == {tokens}

    sizes.clear()
    policy.sample(encoded, UNIFORMS, 1.0)
    in_layers = 2 * 2
    assert sizes[:in_layers] == [int(encoded.mask.sum())] * in_layers
    assert all(size <= ROWS for size in sizes[in_layers:])


def test_a_frozen_base_is_packed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    pack = matrices.pack_weights

    def counting(weights: list[torch.Tensor]) -> Any:
        calls.append(len(weights))
        return pack(weights)

    for module in (llama, matrices):
        monkeypatch.setattr(module, "pack_weights", counting)
    policy = policy_on(_llama, tmp_path)
    for adapter in (POLICY, None, POLICY):
        policy.sample(policy.encode(TEXTS), UNIFORMS, 1.0, adapter)
        assert len(calls) == 1 + 4 * 2  # The head, and four products in each of two layers.
    assert isinstance(policy.weights, LoraWeights)
    policy.to(policy.device)  # What was packed is on the device of before.
    policy.sample(policy.encode(TEXTS), UNIFORMS, 1.0)
    assert len(calls) == 2 * (1 + 4 * 2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: _mistral(sliding_window=16),
        lambda: _qwen2(use_sliding_window=True, sliding_window=16, max_window_layers=1),
        lambda: _llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}),
        lambda: _llama(rope_parameters=LONGROPE),
    ],
    ids=["a window", "a window in some layers", "angles by length", "angles of two lengths"],
)
def test_what_it_does_not_know_goes_through_transformers(make: Make, tmp_path: Path) -> None:
    assert policy_on(make, tmp_path)._network_class is PlainNetwork


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")
@pytest.mark.parametrize(
    "settings",
    [{"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["norm"]}, {"modules_to_save": ["lm_head"]}],
    ids=str,
)
def test_more_than_loras_on_its_matrices_goes_through_transformers(settings: dict[str, Any], tmp_path: Path) -> None:
    base = save_backbone(_llama, tmp_path / "base")
    model, _ = load_base(str(base))
    settings = {"target_modules": ["q_proj"], "r": 4, "task_type": "CAUSAL_LM", **settings}
    get_peft_model(model, LoraConfig(**settings)).save_pretrained(tmp_path / "lora")
    policy = load_policy(str(base), tmp_path / "lora", PolicyConfig(base=str(base)), seed=0)
    assert policy._network_class is PlainNetwork


def test_a_prompt_without_padding_is_read_as_one_with_it(tmp_path: Path) -> None:
    policy = policy_on(_llama, tmp_path)
    together = policy.encode(TEXTS)
    whole = policy.logprobs(together, IDS, 1.0, mask=MASK).logprobs
    for number, text in enumerate(TEXTS):
        rows = slice(number * GROUP, (number + 1) * GROUP)
        alone: Encoded = policy.encode([text])
        found = policy.logprobs(alone, IDS[rows], 1.0, mask=MASK[rows]).logprobs
        torch.testing.assert_close(found, whole[rows], rtol=0, atol=1e-5)
