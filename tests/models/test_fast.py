"""Do the fast paths (T5 written out, oneDNN, shared keys and values) give the same numbers as the plain ones?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MT5Config, MT5ForConditionalGeneration, T5Config, T5ForConditionalGeneration

from conftest import KINDS, Make, disturb, policy_config, small_config
from detoxrl.models import linear, matrices, t5, token_logprobs
from detoxrl.models import policy as policy_module
from detoxrl.models.kernels import PUBLIC, Kernels, using_kernels
from detoxrl.models.llama import LlamaNetwork
from detoxrl.models.loading import load_base, save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.plain import PlainNetwork, PlainSteps
from detoxrl.models.policy import Network, Policy
from detoxrl.models.sampling import Draws, require_agreement
from detoxrl.models.t5 import T5Network, T5Steps
from detoxrl.models.types import Encoded, Rollout
from detoxrl.models.weights import POLICY, LoraWeights
from detoxrl.rl.kl import k1
from detoxrl.training.rollout import collect_rollout
from learning import PROMPTS, TEXTS

LENGTH = 12
LENGTHS = torch.tensor([LENGTH, 1, 5, 9])
IDS = torch.randint(3, 250, (4, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(LENGTH) < LENGTHS[:, None]
UNIFORMS = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(1))
ALL_MATRICES = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
# Kinds of T5, and whether the encoder trains.
T5_KINDS = [
    *((kind, False) for name, kind in KINDS if name == "t5"),
    ("loaded with encoder", True), ("full", True), ("all matrices", False), ("relu", False), ("relu full", False),
    ("untied", False), ("untied full", False), ("mt5", False), ("mt5 full", False),
]  # fmt: skip
Tensors = dict[str, torch.Tensor]


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Demand that each number is off by at most `tolerance` times the sum of itself and the tensor's largest number."""
    absolute = tolerance * float(expected.detach().abs().max()) if expected.is_floating_point() else 0.0
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=absolute)


def assert_all_close(actual: Tensors, expected: Tensors, tolerance: float = 1e-5) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_close(actual[name], expected[name], tolerance)


def save_t5_variant(base: Path, folder: Path, activation: str, tied: bool, multilingual: bool = False) -> str:
    """Save a T5 with another feed-forward or an untied head, or an mT5, and the tokenizer of `base`."""
    _, tokenizer = load_base(str(base))
    torch.manual_seed(5)
    config = (MT5Config if multilingual else T5Config)(
        vocab_size=len(tokenizer) + 3, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=2,
        feed_forward_proj=activation, tie_word_embeddings=tied, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model = (MT5ForConditionalGeneration if multilingual else T5ForConditionalGeneration)(config)
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape) * 0.3)
    save_base(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def make(make_policy: Make, bases: dict[str, Path], tmp_path: Path) -> Make:
    """Return a function that makes a T5 of any kind in T5_KINDS, with its weights moved away from the start."""

    def make_t5(kind: str, encoder: bool = False, **changes: object) -> Policy:
        config = dataclasses.replace(policy_config("t5", encoder, "full" in kind), **changes)  # type: ignore[arg-type]
        if "relu" in kind:
            base = save_t5_variant(bases["t5"], tmp_path / kind, "relu", tied=True)
            policy = load_policy(base, None, config, seed=0)
        elif "untied" in kind or "mt5" in kind:
            base = save_t5_variant(bases["t5"], tmp_path / kind, "gated-gelu", False, "mt5" in kind)
            policy = load_policy(base, None, config, seed=0)
        elif kind == "all matrices":
            config = dataclasses.replace(config, lora_targets=ALL_MATRICES)
            policy = load_policy(str(bases["t5"]), None, config, seed=0)
        elif changes:
            policy = load_policy(str(bases["t5"]), None, config, seed=0)
        else:
            policy = make_policy("t5", kind, encoder)
        policy.eos_token_ids = [1, *range(40, 100)]
        disturb(policy)
        return policy

    return make_t5


@contextmanager
def plain_network(policy: Policy) -> Iterator[None]:
    """Make a policy with the fast T5 use transformers' forward pass inside the block."""
    assert policy._network_class is T5Network
    policy._network_class = PlainNetwork
    try:
        yield
    finally:
        policy._network_class = T5Network


def scored(policy: Policy, encoded: Encoded, temperature: float, adapter: str | None = POLICY) -> Tensors:
    """Return everything a pass over IDS computes, and the gradients of the weights that train."""
    trains = adapter == POLICY
    policy.add_value_head()
    with torch.set_grad_enabled(trains):
        chosen, entropy, states = policy._network(adapter).logprobs(encoded, IDS, MASK, temperature)
        logprobs, entropies, values = policy.logprobs(encoded, IDS, temperature, adapter, MASK)
        assert not entropies.requires_grad
        tensors = {
            "chosen": chosen.detach(),
            "entropy": entropy.detach(),
            "states": states.detach(),
            "logprobs": logprobs.detach(),
            "entropies": entropies,
            "values": values.detach(),
        }
        if trains:
            weights = {name: weight for name, weight in policy.model.named_parameters() if weight.requires_grad}
            output_gradient = torch.randn(IDS.shape, generator=torch.Generator().manual_seed(2))
            gradients = torch.autograd.grad((logprobs * output_gradient).sum(), list(weights.values()))
            assert all(gradient.any() for gradient in gradients)
            tensors.update(zip(weights, gradients, strict=True))
    return tensors


def sampled(policy: Policy, encoded: Encoded, temperature: float, adapter: str | None = POLICY) -> Tensors:
    return dataclasses.asdict(policy.sample(encoded, UNIFORMS, temperature, adapter))


# T5 written out against transformers' forward pass


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "encoder"), T5_KINDS, ids=str)
def test_the_t5_decoder_agrees_with_transformers(kind: str, encoder: bool, temperature: float, make: Make) -> None:
    policy = make(kind, encoder)
    if "mt5" not in kind:
        assert policy.model.config.scale_decoder_outputs == ("untied" not in kind)
    # The gradients of this encoder's LoRA are ill-conditioned: ours are off float64's by 1.2e-4, transformers' by
    # 1.6e-4.
    tolerance = 1e-4 if encoder and "loaded" in kind else 1e-5

    logprobs = {}
    for adapter in (POLICY, policy.reference, None):
        encoded = policy.encode(TEXTS, adapter)
        shared = policy.with_shared_cross(encoded)
        assert (shared.cross is None) == (encoder or "full" in kind)
        fast_scores = scored(policy, shared, temperature, adapter)
        fast_samples = sampled(policy, shared, temperature, adapter)

        with plain_network(policy):
            # If the encoder trains, its graph is gone after the backward pass; if not, both read the same states.
            plain_encoded = policy.encode(TEXTS, adapter) if encoder else encoded
            assert_all_close(fast_scores, scored(policy, plain_encoded, temperature, adapter), tolerance)
            plain_samples = sampled(policy, plain_encoded, temperature, adapter)

        assert all(torch.equal(fast_samples[name], plain_samples[name]) for name in ("ids", "response_mask", "ended"))
        assert fast_samples["response_mask"].sum(1).unique().numel() > 1
        assert_all_close(fast_samples, plain_samples, 2 * tolerance)  # Each token adds the rounding of those before.
        logprobs[adapter] = fast_scores["logprobs"]

    others = [tensor for name, tensor in logprobs.items() if name != POLICY]
    assert not any(torch.allclose(logprobs[POLICY], tensor, atol=1e-3) for tensor in others)
    if policy.reference:
        assert not torch.allclose(logprobs[policy.reference], logprobs[None], atol=1e-3)


@pytest.mark.parametrize(("kind", "encoder"), T5_KINDS, ids=str)
def test_the_t5_encoder_agrees_with_transformers(kind: str, encoder: bool, make: Make) -> None:
    policy = make(kind, encoder)
    for adapter in (POLICY, policy.reference, None):
        fast = policy.encode(TEXTS, adapter)
        with plain_network(policy):
            plain = policy.encode(TEXTS, adapter)
        is_token = plain.mask.bool()
        assert not is_token.all()
        assert_close(fast.states[is_token], plain.states[is_token])
        assert not fast.states[~is_token].any()
        assert fast.states.requires_grad == (encoder and adapter == POLICY)

        unpadded = policy.encode(TEXTS[:1], adapter)
        assert_close(unpadded.states[0], fast.states[0, : unpadded.states.shape[1]])


def test_numbers_outside_the_mask_are_zero_and_a_mask_of_ones_equals_no_mask(make: Make) -> None:
    policy = make("fresh")
    encoded = policy.encode(TEXTS)
    with_mask = policy.logprobs(encoded, IDS, 1.0, mask=MASK)
    without_mask = policy.logprobs(encoded, IDS, 1.0)
    for masked, whole in zip(with_mask, without_mask, strict=True):
        assert not masked[~MASK].any()
        assert whole[~MASK].all()
        assert_close(masked[MASK], whole[MASK])


def test_a_row_alone_and_unpadded_is_read_as_in_a_batch(make: Make) -> None:
    policy = make("loaded")
    batch = sampled(policy, policy.with_shared_cross(policy.encode(TEXTS)), 1.0)
    for row, text in enumerate(TEXTS):
        alone = policy.sample(policy.with_shared_cross(policy.encode([text])), UNIFORMS[row : row + 1], 1.0)
        assert torch.equal(alone.ids[0], batch["ids"][row])
        assert_close(alone.logprobs[0], batch["logprobs"][row])


def save_unusual_lora(base: Path, folder: Path, **settings: object) -> Path:
    """Save a LoRA that is more than two factors, moved away from its start."""
    model, _ = load_base(str(base))
    torch.manual_seed(3)
    layers = r".*decoder\..*\b(q|v)"
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=layers, task_type="SEQ_2_SEQ_LM", **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in lora.parameters():
            weight.add_(weight.requires_grad * 0.1 * torch.randn(weight.shape))
    lora.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # peft warns about a bias next to a LoRA
@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"modules_to_save": ["layer_norm"]},
        {"modules_to_save": ["relative_attention_bias"]},
    ],
    ids=str,
)
def test_a_t5_under_more_than_plain_loras_uses_the_plain_network(
    settings: dict[str, object], bases: dict[str, Path], tmp_path: Path
) -> None:
    folder = save_unusual_lora(bases["t5"], tmp_path / "lora", **settings)
    policy = load_policy(str(bases["t5"]), folder, policy_config("t5"), seed=0)
    assert policy._network_class is PlainNetwork
    policy.eos_token_ids += range(40, 80)
    generation = dataclasses.replace(small_config().generation, max_new_tokens=LENGTH)
    rollout = collect_rollout(policy, PROMPTS, generation, Draws(0, "rollout"))
    assert k1(rollout.responses.logprobs, rollout.ref_logprobs).abs().max() < 1e-5
    disturb(policy)
    require_agreement(policy, "base")

    # An adapter that is added to a policy under a plain LoRA counts as well.
    policy = load_policy(str(bases["t5"]), None, policy_config("t5"), seed=0)
    policy.add("other", folder)
    actual = scored(policy, policy.encode(TEXTS, "other"), 1.0, "other")
    policy._network_class = PlainNetwork
    assert_all_close(actual, scored(policy, policy.encode(TEXTS, "other"), 1.0, "other"))


def test_a_plain_t5_and_a_plain_llama_use_a_fast_network(policy: Policy, request: pytest.FixtureRequest) -> None:
    name, _ = request.node.callspec.params["policy"]
    fast: dict[str, type[Network]] = {"t5": T5Network, "llama": LlamaNetwork}
    assert policy._network_class is fast.get(name, PlainNetwork)


# Shared keys and values of cross-attention


@pytest.mark.parametrize("kind", ["fresh", "loaded with encoder", "all matrices"])
def test_shared_keys_and_values_change_no_number_for_any_selection_of_rows(kind: str, make: Make) -> None:
    policy = make(kind)
    bare = policy.encode(TEXTS)
    shared = policy.with_shared_cross(bare)
    assert shared.cross is not None
    assert bare.cross is None
    assert shared.cross.shape == (2, 2, 4, 4, bare.mask.shape[1], 8)
    assert_all_close(scored(policy, shared, 1.0), scored(policy, bare, 1.0))

    rows = torch.tensor([2, 0, 2])
    selected = shared.select(rows)
    assert selected.cross is shared.cross
    assert selected.states.shape[1] < bare.states.shape[1]

    for with_cross, without_cross, size in (
        (selected, bare.select(rows), 3),
        (selected.select(torch.tensor([False, True, True])), bare.select(rows[1:]), 2),
        (shared.row_slice(slice(1, 3)), bare.row_slice(slice(1, 3)), 2),
        (shared.row_slice(slice(1, 4)).select(torch.tensor([1, 2])), bare.select(torch.tensor([2, 3])), 2),
    ):
        for adapter in (POLICY, policy.reference):
            actual, _, _ = policy.logprobs(with_cross, IDS[:size], 1.0, adapter)
            expected, _, _ = policy.logprobs(without_cross, IDS[:size], 1.0, adapter)
            assert_close(actual, expected)
            actual = policy.sample(with_cross, UNIFORMS[:size], 1.0, adapter).logprobs
            expected = policy.sample(without_cross, UNIFORMS[:size], 1.0, adapter).logprobs
            assert_close(actual, expected)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_rollout_keeps_shared_keys_and_values_only_on_request(make: Make, encoder: bool) -> None:
    policy = make("loaded with encoder", encoder)
    generation = dataclasses.replace(small_config().generation, max_new_tokens=LENGTH, batch_size=2)
    keeping = collect_rollout(policy, PROMPTS, generation, Draws(0, "rollout"), keep_cross=True)
    dropping = collect_rollout(policy, PROMPTS, generation, Draws(0, "rollout"), keep_cross=False)
    assert (keeping.encoded.cross is None) == encoder
    assert dropping.encoded.cross is None
    assert torch.equal(keeping.responses.ids, dropping.responses.ids)
    assert_close(keeping.responses.logprobs, dropping.responses.logprobs)
    assert_close(keeping.responses.values, dropping.responses.values)
    assert_close(keeping.ref_logprobs, dropping.ref_logprobs)


def test_selected_rows_are_those_worked_out_by_hand() -> None:
    """Three prompts of 3, 2 and 1 tokens; one layer, one head of depth 1."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    cross = torch.arange(18.0).view(1, 2, 3, 1, 3, 1)
    encoded = Encoded(states=torch.arange(9).view(3, 3), mask=mask, cross=cross)
    last = encoded.row_slice(slice(1, 3))
    assert (last.states.tolist(), last.mask.tolist(), last.rows) == ([[3, 4], [6, 7]], [[1, 1], [1, 0]], None)
    assert last.cross is not None
    assert last.cross.flatten(2).tolist() == [[[3, 4, 5, 6, 7, 8], [12, 13, 14, 15, 16, 17]]]
    assert last.cross.data_ptr() == cross[:, :, 1:].data_ptr()  # a view, not a copy
    left = Encoded(states=encoded.states.flip(1), mask=mask.flip(1)).row_slice(slice(1, 3))
    assert (left.states.tolist(), left.mask.tolist(), left.cross) == ([[4, 3], [7, 6]], [[1, 1], [0, 1]], None)
    whole = encoded.row_slice(slice(0, 3))
    assert torch.equal(whole.states, encoded.states)
    selected = encoded.select(torch.tensor([2, 1]))
    assert selected.rows is not None
    assert (selected.states.tolist(), selected.rows.tolist()) == ([[6, 7], [3, 4]], [2, 1])
    twice = selected.select(torch.tensor([True, False]))
    assert twice.rows is not None
    assert (twice.states.tolist(), twice.mask.tolist(), twice.rows.tolist()) == ([[6]], [[1]], [2])


# oneDNN products


class PrivateCalls(TorchDispatchMode):
    """Records the names of torch's private operators that are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace != "aten":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


ONEDNN = Kernels(onednn=True, packed=True, bf16=False)
"""Kernels that every CPU has, if not the fastest."""


@pytest.mark.parametrize(("kind", "encoder"), [("all matrices", False), ("full", True), ("relu", False)])
def test_public_operators_give_the_same_numbers(kind: str, encoder: bool, make: Make) -> None:
    scores, samples = [], []
    for chosen in (ONEDNN, PUBLIC):
        policy = make(kind, encoder)
        with using_kernels(chosen), PrivateCalls() as calls:
            encoded = policy.with_shared_cross(policy.encode(TEXTS))
            scores.append(scored(policy, encoded, 0.7))
            samples.append(sampled(policy, encoded, 0.7))
        assert bool(calls.names) == chosen.onednn
    assert torch.equal(samples[0]["ids"], samples[1]["ids"])
    assert_all_close(*scores)
    assert_all_close(*samples)


def test_encoders_and_plain_networks_use_the_fast_products(make_policy: Make) -> None:
    for name in ("t5", "llama"):
        policy = make_policy(name, "fresh")
        encoded = policy.encode(TEXTS)
        with using_kernels(ONEDNN), PrivateCalls() as calls, torch.no_grad():
            _ = policy.encode(TEXTS) if name == "t5" else policy.logprobs(encoded, IDS, 1.0)
        assert len(calls.names) >= 2 * 4  # at least 4 matrices in each of 2 layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_linear_agrees_with_torch(dtype: torch.dtype, bias: bool, trains: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 32), (48, 32), (48,))]
    output_gradient = torch.randn(3, 5, 48, generator=generator).to(dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2  # bfloat16 has 8 bits of precision

    results = []
    for function in (linear.linear, torch.nn.functional.linear):
        x, weight, offset = (tensor.clone() for tensor in inputs)
        differentiated = [x.requires_grad_()]
        if trains:
            differentiated.append(weight.requires_grad_())
        if trains and bias:
            differentiated.append(offset.requires_grad_())
        product = function(x, weight, offset if bias else None)
        results.append([product, *torch.autograd.grad(product, differentiated, output_gradient)])
        with torch.no_grad():
            assert_close(function(x[:, 0], weight), torch.nn.functional.linear(x[:, 0], weight), tolerance)

    for actual, expected in zip(*results, strict=True):
        assert actual.dtype == expected.dtype == dtype
        assert_close(actual, expected, tolerance)


def test_fast_linear_reaches_the_layers_of_any_model_and_respects_autocast() -> None:
    layer, x = torch.nn.Linear(16, 8), torch.randn(3, 16)
    with using_kernels(ONEDNN), linear.FastLinear(), PrivateCalls() as calls:
        fast = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert len(calls.names) == 1
    assert_close(fast, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_products_accept_any_number_of_rows(dtype: torch.dtype) -> None:
    weights = [torch.randn(rows, 32).to(dtype).requires_grad_() for rows in (16, 24)]
    for chosen in (ONEDNN, PUBLIC):
        with using_kernels(chosen), torch.no_grad():
            packed = linear.pack_weights(weights)
            for rows in (7, 1, 3, 64):
                x = torch.randn(rows, 32)
                with PrivateCalls() as calls:
                    product = packed(x)
                assert bool(calls.names) == chosen.packed
                assert product.dtype == torch.float32
                assert_close(product, torch.nn.functional.linear(x, torch.cat(weights).float()))


def test_weights_are_packed_for_as_many_rows_as_it_makes_faster() -> None:
    weight = torch.randn(16, 32)
    for chosen, packed in ((PUBLIC, []), (Kernels(False, True, False), [1, 64]), (ONEDNN, [1, 64, 65, 1000])):
        used = []
        with using_kernels(chosen), torch.no_grad():
            product = linear.pack_weights([weight])
            for rows in (1, 64, 65, 1000):
                with PrivateCalls() as calls:
                    product(torch.randn(rows, 32))
                if calls.names:
                    used.append(rows)
        assert used == packed


def test_a_packed_product_depends_on_no_earlier_batch(make: Make) -> None:
    packs_few = Kernels(onednn=False, packed=True, bf16=False)
    results = []
    for first in (4, 1):
        with using_kernels(packs_few):
            policy = make("loaded")
            encoded = policy.with_shared_cross(policy.encode(TEXTS))
            policy.sample(encoded.row_slice(slice(0, first)), UNIFORMS[:first], 1.0)  # A resumed process begins here.
            results.append(sampled(policy, encoded, 1.0))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_on_the_meta_device_no_private_operator_is_called() -> None:
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(4, 8, device="meta", requires_grad=True)
    with PrivateCalls() as calls:
        linear.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
        assert linear.pack_weights([weight, weight])(x).shape == (3, 8)
    assert calls.names == []


def test_a_frozen_base_is_packed_once_and_again_after_it_moves(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, pack_weights = [], t5.pack_weights

    def counting(weights: Sequence[torch.Tensor]) -> object:
        calls.append(len(weights))
        return pack_weights(weights)

    for module in (t5, matrices):
        monkeypatch.setattr(module, "pack_weights", counting)
    policy = make("loaded")
    assert isinstance(policy.weights, LoraWeights)
    before = {name: weight.clone() for name, weight in policy.model.named_parameters() if not weight.requires_grad}
    encoded = policy.with_shared_cross(policy.encode(TEXTS))
    for adapter in (POLICY, policy.reference, None, POLICY):
        sampled(policy, encoded, 1.0, adapter)
        assert len(calls) == 1 + 2 * 6  # the head, and six products in each of two layers

    at_start = sampled(policy, encoded, 1.0)
    disturb(policy)  # the weights that train are not packed
    assert not torch.equal(sampled(policy, encoded, 1.0)["logprobs"], at_start["logprobs"])
    scored(policy, encoded, 1.0)
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    policy.to(policy.device)  # What was packed is on the device of before.
    sampled(policy, encoded, 1.0)
    assert len(calls) == 2 * (1 + 2 * 6)


def test_full_weights_are_packed_anew_for_every_batch(make: Make) -> None:
    policy = make("full")
    encoded = policy.encode(TEXTS)
    sampled(policy, encoded, 1.0)
    disturb(policy)
    fast = sampled(policy, policy.encode(TEXTS), 1.0)
    with plain_network(policy):
        assert_all_close(fast, sampled(policy, policy.encode(TEXTS), 1.0))


# The language-model head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trains", [False, True])
def test_token_logprobs_and_their_gradients_are_those_of_log_softmax(
    temperature: float, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    exact_states, exact_head = (
        torch.randn(size, 16, generator=generator, dtype=torch.float64, requires_grad=True) for size in (11, 50)
    )
    ids = torch.randint(0, 50, (11,), generator=generator)
    output_gradient = torch.randn(11, generator=generator)

    logprobs = (exact_states @ exact_head.t() / temperature).log_softmax(-1)
    expected = logprobs.gather(1, ids[:, None])[:, 0]
    expected_entropy = -(logprobs.exp() * logprobs).sum(1)
    differentiated = [exact_states, exact_head][: 1 + trains]
    expected_gradients = torch.autograd.grad((expected * output_gradient).sum(), differentiated)

    for limit in (1, 150, 4_000_000):  # chunks of one row, of three rows, of all rows
        monkeypatch.setattr(token_logprobs, "MAX_LOGITS", limit)
        states, head = (tensor.detach().float() for tensor in (exact_states, exact_head))
        states.requires_grad_()
        head.requires_grad_(trains)
        actual, entropies = token_logprobs.token_logprobs(states, head, ids, temperature)
        assert not entropies.requires_grad
        assert_close(actual.double(), expected, 1e-6)
        assert_close(entropies.double(), expected_entropy.detach(), 1e-6)

        gradients = torch.autograd.grad((actual * output_gradient).sum(), [states, head][: 1 + trains])
        for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
            assert_close(gradient.double(), expected_gradient, 1e-6)
        with torch.no_grad():
            without_gradient, _ = token_logprobs.token_logprobs(states, head, ids, temperature)
            assert torch.equal(without_gradient, actual) or trains

    empty, _ = token_logprobs.token_logprobs(states[:0], head, ids[:0], temperature)
    assert empty.shape == (0,)


def test_a_chunk_has_no_more_logits_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_sizes, multiply = [], token_logprobs.linear

    def recording(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        chunk_sizes.append(len(x))
        return multiply(x, weight)

    monkeypatch.setattr(token_logprobs, "linear", recording)
    monkeypatch.setattr(token_logprobs, "MAX_LOGITS", 150)
    token_logprobs.token_logprobs(torch.randn(7, 4), torch.randn(50, 4), torch.zeros(7, dtype=torch.long), 1.0)
    assert chunk_sizes == [3, 3, 1]


# Batches: which rows leave, which are read together


def rollout_of(policy: Policy) -> Rollout:
    generation = dataclasses.replace(small_config().generation, max_new_tokens=LENGTH, batch_size=8)
    prompts = [dataclasses.replace(prompt, id=f"{prompt.id}{i}") for i in range(2) for prompt in PROMPTS]
    return collect_rollout(policy, prompts, generation, Draws(0, "rollout"))


@pytest.mark.parametrize("fast", [True, False])
def test_finished_rows_leave_several_at_once_and_no_number_depends_on_when(
    fast: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, calls = make("loaded"), []
    monkeypatch.setattr(policy, "_network_class", T5Network if fast else PlainNetwork)
    steps_class = T5Steps if fast else PlainSteps
    keep = steps_class.keep

    def recording(steps: object, rows: torch.Tensor) -> None:
        calls.append(rows.tolist())
        keep(steps, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(steps_class, "keep", recording)
    responses, kept_rows, default = {}, {}, policy_module._SHRINK_AT
    for threshold in (default, 1.0, 0.0):
        monkeypatch.setattr(policy_module, "_SHRINK_AT", threshold)
        calls.clear()
        responses[threshold] = rollout_of(policy).responses
        kept_rows[threshold] = calls.copy()

    assert all(sum(rows) <= default * len(rows) for rows in kept_rows[default])
    lengths = responses[1.0].response_mask.sum(1).unique()
    assert 0 == len(kept_rows[0.0]) < len(kept_rows[default]) < len(lengths)
    for other in responses.values():
        assert torch.equal(other.ids, responses[1.0].ids)
        assert torch.equal(other.ended, responses[1.0].ended)
        assert_close(other.logprobs, responses[1.0].logprobs)
        assert_close(other.values, responses[1.0].values)


def test_length_batches_are_those_worked_out_by_hand() -> None:
    assert list(policy_module.length_batches([3, 3, 5, 2], 10)) == [slice(0, 2), slice(2, 4)]
    assert list(policy_module.length_batches([30, 1, 1], 10)) == [slice(0, 1), slice(1, 3)]
    assert list(policy_module.length_batches([4, 4], 8)) == [slice(0, 2)]


def test_prompts_are_read_in_batches_and_no_number_depends_on_their_size(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make("loaded with encoder")
    whole = rollout_of(policy)
    for tokens in (1, 100):
        monkeypatch.setattr(policy_module, "_ENCODER_TOKENS", tokens)
        split = rollout_of(policy)
        mask = whole.encoded.mask.bool()
        assert torch.equal(split.encoded.mask, whole.encoded.mask)
        assert_close(split.encoded.states[mask], whole.encoded.states[mask])
        assert torch.equal(split.responses.ids, whole.responses.ids)
        assert_close(split.responses.logprobs, whole.responses.logprobs)
        assert_close(split.ref_logprobs, whole.ref_logprobs)


# bfloat16


@pytest.mark.parametrize("chosen", [PUBLIC, ONEDNN], ids=["public", "oneDNN"])
@pytest.mark.parametrize("kind", ["fresh", "all matrices"])
def test_a_t5_stored_in_bfloat16_is_computed_in_float32_where_that_is_faster(
    kind: str, chosen: Kernels, make: Make
) -> None:
    policies = [make(kind, bf16=True), make(kind, bf16=False)]
    with torch.no_grad():
        for stored_weight, weight in zip(*(policy.model.parameters() for policy in policies), strict=True):
            weight.copy_(stored_weight)

    results = []
    for policy in policies:
        with using_kernels(chosen):
            encoded = policy.with_shared_cross(policy.encode(TEXTS))
            assert encoded.states.dtype == torch.float32
            results.append((scored(policy, encoded, 0.7), sampled(policy, encoded, 0.7)))

    for stored, exact in zip(*results, strict=True):
        assert_all_close(stored, exact)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_plain_networks_in_bfloat16_multiply_in_float32_where_that_is_faster(
    name: str, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[torch.dtype] = []
    in_float32 = linear._in_float32

    def counting(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        product = in_float32(x, weight, bias)
        used.append(product.dtype)
        return product

    monkeypatch.setattr(linear, "_in_float32", counting)
    policy = load_policy(str(bases[name]), None, dataclasses.replace(policy_config(name), bf16=True), seed=0)
    with using_kernels(PUBLIC), torch.no_grad(), policy.through_plain_network():
        policy.logprobs(policy.encode(TEXTS), IDS, 1.0)
    assert set(used) == {torch.bfloat16}


@pytest.mark.usefixtures("bf16_kernels")
def test_a_t5_in_bfloat16_agrees_within_its_rounding(make: Make) -> None:
    policy, exact_policy = make("fresh", bf16=True), make("fresh")
    assert policy._network_class is T5Network
    encoded = policy.with_shared_cross(policy.encode(TEXTS))
    assert encoded.cross is not None
    assert encoded.cross.dtype == torch.bfloat16

    fast = scored(policy, encoded, 1.0)
    with plain_network(policy):
        plain = scored(policy, policy.encode(TEXTS), 1.0)
    exact = scored(exact_policy, exact_policy.with_shared_cross(exact_policy.encode(TEXTS)), 1.0)
    assert fast["logprobs"].dtype == torch.float32
    for name in ("logprobs", "entropies", "values"):
        assert (fast[name] - plain[name]).abs().max() < 0.15
        assert (fast[name] - exact[name]).abs().max() < 0.15

    gradients = [name for name in fast if "lora_" in name]
    assert {fast[name].dtype for name in gradients} == {torch.float32}
    fast_gradient, exact_gradient = (
        torch.cat([tensors[name].float().flatten() for name in gradients]) for tensors in (fast, exact)
    )
    # The products have 8 bits of precision.
    assert (fast_gradient - exact_gradient).norm() < 0.08 * exact_gradient.norm()

    with torch.no_grad():
        responses = policy.sample(encoded, UNIFORMS, 1.0)
        logprobs, _, values = policy.logprobs(encoded, responses.ids, 1.0, mask=responses.response_mask)
    assert 0 < float((logprobs - responses.logprobs).abs().max()) < 0.1
    assert float((values - responses.values).abs().max()) < 0.15
    require_agreement(policy, "base")
