"""Do the fast ways to compute (a T5 decoder written out, oneDNN's products, shared keys) change any number?"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import T5Config, T5ForConditionalGeneration

from conftest import KINDS, Make, disturb, policy_config, small_config
from detoxrl.models import linear, t5
from detoxrl.models import policy as policy_module
from detoxrl.models import token_logprobs as head
from detoxrl.models.loading import load_base, save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.plain import PlainNetwork, PlainSteps
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import require_agreement
from detoxrl.models.t5 import T5Network, T5Steps
from detoxrl.models.types import Encoded, Rollout
from detoxrl.models.weights import POLICY, LoraWeights
from detoxrl.rl.kl import k1
from detoxrl.training.rollout import collect_rollout
from test_invariants import PROMPTS, TEXTS

LENGTH = 12
LENGTHS = torch.tensor([LENGTH, 1, 5, 9])
IDS = torch.randint(3, 250, (4, LENGTH), generator=torch.Generator().manual_seed(0))
MASK = torch.arange(LENGTH) < LENGTHS[:, None]
CHANCES = torch.rand(4, LENGTH, generator=torch.Generator().manual_seed(1))
EVERY_MATRIX = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
# T5s by what is unlike the others: how they begin, and whether the encoder trains.
FAST = [
    *((kind, False) for name, kind in KINDS if name == "t5"),
    ("loaded with encoder", True), ("full", True), ("every matrix", False), ("relu", False), ("relu full", False),
    ("untied", False), ("untied full", False),
]  # fmt: skip
Numbers = dict[str, torch.Tensor]


def close(ours: torch.Tensor, theirs: torch.Tensor, share: float = 1e-5) -> None:
    """Demand that each number is off by no more than a share of itself plus as much of the tensor's largest."""
    floor = share * float(theirs.detach().abs().max()) if theirs.is_floating_point() else 0.0
    torch.testing.assert_close(ours, theirs, rtol=share, atol=floor)


def all_close(ours: Numbers, theirs: Numbers, share: float = 1e-5) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        close(ours[name], theirs[name], share)


def other_t5(base: Path, folder: Path, activation: str, tied: bool) -> str:
    _, tokenizer = load_base(str(base))
    torch.manual_seed(5)
    config = T5Config(
        vocab_size=len(tokenizer) + 3, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_decoder_layers=2, num_heads=2,
        feed_forward_proj=activation, tie_word_embeddings=tied, decoder_start_token_id=0, pad_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    if not tied:
        torch.nn.init.normal_(model.lm_head.weight, std=0.3)
    save_base(model, tokenizer, folder)
    return str(folder)


@pytest.fixture
def make(make_policy: Make, bases: dict[str, Path], tmp_path: Path) -> Make:
    """Return a function that makes a T5 of any kind in FAST, far from its start."""

    def made(kind: str, encoder: bool = False, **changes: object) -> Policy:
        config = dataclasses.replace(policy_config("t5", encoder, "full" in kind), **changes)  # type: ignore[arg-type]
        if "relu" in kind:
            base = other_t5(bases["t5"], tmp_path / kind, "relu", tied=True)
            policy = load_policy(base, None, config, seed=0)
        elif "untied" in kind:
            base = other_t5(bases["t5"], tmp_path / kind, "gated-gelu", tied=False)
            policy = load_policy(base, None, config, seed=0)
        elif kind == "every matrix" or changes:
            targets = EVERY_MATRIX if kind == "every matrix" else config.lora_targets
            policy = load_policy(str(bases["t5"]), None, dataclasses.replace(config, lora_targets=targets), seed=0)
        else:
            policy = make_policy("t5", kind, encoder)
        policy.ends = [1, *range(40, 100)]
        disturb(policy)
        return policy

    return made


@contextmanager
def plainly(policy: Policy) -> Iterator[None]:
    """Let the model's own forward decode inside the block."""
    assert policy._network is T5Network
    policy._network = PlainNetwork  # type: ignore[assignment]
    try:
        yield
    finally:
        policy._network = T5Network


def scored(policy: Policy, encoded: Encoded, temperature: float, adapter: str | None = POLICY) -> Numbers:
    """All that a pass over given tokens finds, and the gradients of whatever trains."""
    trains = adapter == POLICY
    with torch.set_grad_enabled(trains):
        found = policy._network(policy.weights, adapter).logprobs(encoded, IDS, MASK, temperature)
        logprobs, entropies, values = policy.logprobs(encoded, IDS, temperature, adapter, MASK)
        seen = dict(zip(("chosen", "entropy", "states"), (x.detach() for x in found), strict=True))
        seen |= {"logprobs": logprobs.detach(), "entropies": entropies, "values": values.detach()}
        assert not entropies.requires_grad
        if trains:
            names, weights = zip(*((n, w) for n, w in policy.model.named_parameters() if w.requires_grad), strict=True)
            slopes = torch.randn(IDS.shape, generator=torch.Generator().manual_seed(2))
            gradients = torch.autograd.grad((logprobs * slopes).sum(), weights)
            assert all(gradient.any() for gradient in gradients)
            seen |= dict(zip(names, gradients, strict=True))
    return seen


def sampled(policy: Policy, encoded: Encoded, temperature: float, adapter: str | None = POLICY) -> Numbers:
    return dataclasses.asdict(policy.sample(encoded, CHANCES, temperature, adapter))


# The T5 decoder and the model's own forward


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize(("kind", "encoder"), FAST, ids=str)
def test_the_t5_decoder_is_the_models_own(kind: str, encoder: bool, temperature: float, make: Make) -> None:
    policy = make(kind, encoder)
    assert policy.model.config.scale_decoder_outputs == ("untied" not in kind)
    found = {}
    for adapter in (POLICY, policy.reference, None):
        encoded = policy.encode(TEXTS, adapter)
        alike = policy.shared(encoded)
        assert (alike.cross is None) == (encoder or "full" in kind)
        ours, drawn = scored(policy, alike, temperature, adapter), sampled(policy, alike, temperature, adapter)
        with plainly(policy):
            # A graph that was walked back through is gone; without one both decoders read the same states.
            again = policy.encode(TEXTS, adapter) if encoder else encoded
            # This encoder's LoRA has ill-conditioned gradients: off float64's by 1.2e-4, the model's own by 1.6e-4.
            all_close(ours, scored(policy, again, temperature, adapter), 1e-4 if encoder and "loaded" in kind else 1e-5)
            theirs = sampled(policy, again, temperature, adapter)
        assert all(torch.equal(drawn[name], theirs[name]) for name in ("ids", "response_mask", "ended"))
        assert drawn["response_mask"].sum(1).unique().numel() > 1
        all_close(drawn, theirs)
        found[adapter] = ours["logprobs"]
    assert not any(torch.allclose(found[POLICY], other, atol=1e-3) for name, other in found.items() if name != POLICY)
    if policy.reference:
        assert not torch.allclose(found[policy.reference], found[None], atol=1e-3)


@pytest.mark.parametrize(("kind", "encoder"), FAST, ids=str)
def test_the_t5_encoder_is_the_models_own(kind: str, encoder: bool, make: Make) -> None:
    policy = make(kind, encoder)
    for adapter in (POLICY, policy.reference, None):
        ours = policy.encode(TEXTS, adapter)
        with plainly(policy):
            theirs = policy.encode(TEXTS, adapter)
        assert not theirs.mask.all()
        close(ours.states, theirs.states)
        assert ours.states.requires_grad == (encoder and adapter == POLICY)
        alone = policy.encode(TEXTS[:1], adapter)  # nothing is padded here
        close(alone.states[0], ours.states[0, : alone.states.shape[1]])


def test_what_is_outside_the_mask_is_zero_and_a_mask_of_ones_is_no_mask(make: Make) -> None:
    policy = make("fresh")
    encoded = policy.encode(TEXTS)
    masked, whole = policy.logprobs(encoded, IDS, 1.0, mask=MASK), policy.logprobs(encoded, IDS, 1.0)
    for one, other in zip(masked, whole, strict=True):
        assert not one[~MASK].any()
        assert other[~MASK].all()
        close(one[MASK], other[MASK])


def test_an_only_row_without_padding_is_read_as_among_others(make: Make) -> None:
    policy = make("loaded")
    whole = sampled(policy, policy.shared(policy.encode(TEXTS)), 1.0)
    for row, text in enumerate(TEXTS):
        alone = policy.sample(policy.shared(policy.encode([text])), CHANCES[row : row + 1], 1.0)
        assert torch.equal(alone.ids[0], whole["ids"][row])
        close(alone.logprobs[0], whole["logprobs"][row])


def lora_folder(base: Path, folder: Path, **settings: object) -> Path:
    """A LoRA of a kind that is more than two factors, moved away from its start."""
    model, _ = load_base(str(base))
    torch.manual_seed(3)
    layers = r".*decoder\..*\b(q|v)"
    lora = get_peft_model(model, LoraConfig(r=4, target_modules=layers, task_type="SEQ_2_SEQ_LM", **settings))  # type: ignore[arg-type]
    with torch.no_grad():
        for weight in lora.parameters():
            weight.add_(weight.requires_grad * 0.1 * torch.randn(weight.shape))
    lora.save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore::peft.utils.warning.PeftWarning")  # of a bias beside a LoRA it makes much ado
@pytest.mark.parametrize("setting", ["use_dora", "lora_bias", "layer_norm", "relative_attention_bias"])
def test_a_t5_under_more_than_plain_loras_decodes_as_its_own_code_does(
    setting: str, bases: dict[str, Path], tmp_path: Path
) -> None:
    more = {"modules_to_save": [setting]} if "_a" in setting or "_n" in setting else {setting: True}
    folder = lora_folder(bases["t5"], tmp_path / "lora", **more)
    policy = load_policy(str(bases["t5"]), folder, policy_config("t5"), seed=0)
    assert policy._network is PlainNetwork
    policy.ends += range(40, 80)
    generation = dataclasses.replace(small_config().generation, max_new_tokens=LENGTH)
    rollout = collect_rollout(policy, PROMPTS, generation, seed=0, step=0)
    assert k1(rollout.responses.logprobs, rollout.ref_logprobs).abs().max() < 1e-5
    disturb(policy)
    require_agreement(policy, "base")
    # One that joins a policy whose own is plain.
    policy = load_policy(str(bases["t5"]), None, policy_config("t5"), seed=0)
    policy.add("other", folder)
    found = scored(policy, policy.encode(TEXTS, "other"), 1.0, "other")
    policy._network = PlainNetwork  # type: ignore[assignment]
    all_close(found, scored(policy, policy.encode(TEXTS, "other"), 1.0, "other"))


def test_a_plain_t5_has_its_own_decoder_and_no_other_model_has(policy: Policy, request: pytest.FixtureRequest) -> None:
    name, _ = request.node.callspec.params["policy"]
    assert policy._network is (T5Network if name == "t5" else PlainNetwork)


# Shared keys and values of cross-attention


@pytest.mark.parametrize("kind", ["fresh", "loaded with encoder", "every matrix"])
def test_shared_keys_and_values_change_nothing_whichever_rows_are_taken(kind: str, make: Make) -> None:
    policy = make(kind)
    bare = policy.encode(TEXTS)
    alike = policy.shared(bare)
    assert alike.cross is not None
    assert bare.cross is None
    assert alike.cross.shape == (2, 2, 4, 4, bare.mask.shape[1], 8)
    all_close(scored(policy, alike, 1.0), scored(policy, bare, 1.0))
    rows = torch.tensor([2, 0, 2])
    picked = alike.select(rows)
    assert picked.cross is alike.cross
    assert picked.states.shape[1] < bare.states.shape[1]
    for ours, theirs, size in (
        (picked, bare.select(rows), 3),
        (picked.select(torch.tensor([False, True, True])), bare.select(rows[1:]), 2),
        (alike.row_slice(slice(1, 3)), bare.row_slice(slice(1, 3)), 2),
        (alike.row_slice(slice(1, 4)).select(torch.tensor([1, 2])), bare.select(torch.tensor([2, 3])), 2),
    ):
        for adapter in (POLICY, policy.reference):
            one, other = (policy.logprobs(x, IDS[:size], 1.0, adapter)[0] for x in (ours, theirs))
            close(one, other)
            one, other = (policy.sample(x, CHANCES[:size], 1.0, adapter).logprobs for x in (ours, theirs))
            close(one, other)


@pytest.mark.parametrize("encoder", [False, True])
def test_a_rollout_keeps_what_is_shared_only_if_asked(make: Make, encoder: bool) -> None:
    policy = make("loaded with encoder", encoder)
    generation = dataclasses.replace(small_config().generation, max_new_tokens=LENGTH, batch_size=2)
    kept, dropped = (
        collect_rollout(policy, PROMPTS, generation, seed=0, step=0, keep_cross=keep_cross)
        for keep_cross in (True, False)
    )
    assert (kept.encoded.cross is None, dropped.encoded.cross) == (encoder, None)
    assert torch.equal(kept.responses.ids, dropped.responses.ids)
    for name in ("logprobs", "values"):
        close(getattr(kept.responses, name), getattr(dropped.responses, name))
    close(kept.ref_logprobs, dropped.ref_logprobs)


def test_rows_are_taken_by_hand() -> None:
    """Three prompts of 3, 2 and 1 tokens; one layer, one head of depth 1."""
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
    cross = torch.arange(18.0).view(1, 2, 3, 1, 3, 1)
    encoded = Encoded(states=torch.arange(9).view(3, 3), mask=mask, cross=cross)
    last = encoded.row_slice(slice(1, 3))
    assert (last.states.tolist(), last.mask.tolist(), last.rows) == ([[3, 4], [6, 7]], [[1, 1], [1, 0]], None)
    assert last.cross is not None
    assert last.cross.flatten(2).tolist() == [[[3, 4, 5, 6, 7, 8], [12, 13, 14, 15, 16, 17]]]
    assert {part.data_ptr() for part in (last.cross, cross[:, :, 1:])} == {cross[:, :, 1:].data_ptr()}  # no copy
    left = Encoded(states=encoded.states.flip(1), mask=mask.flip(1)).row_slice(slice(1, 3))
    assert (left.states.tolist(), left.mask.tolist(), left.cross) == ([[4, 3], [7, 6]], [[1, 1], [0, 1]], None)
    whole = encoded.row_slice(slice(0, 3))
    assert torch.equal(whole.states, encoded.states)
    picked = encoded.select(torch.tensor([2, 1]))
    assert picked.rows is not None
    assert (picked.states.tolist(), picked.rows.tolist()) == ([[6, 7], [3, 4]], [2, 1])
    again = picked.select(torch.tensor([True, False]))
    assert again.rows is not None
    assert (again.states.tolist(), again.mask.tolist(), again.rows.tolist()) == ([[6]], [[1]], [2])


# Products by oneDNN


class Private(TorchDispatchMode):
    """Notes the calls of torch's private operators."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.namespace != "aten":
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


needs_private = pytest.mark.skipif(not linear._WIDE, reason="this processor has no AVX-512")


@pytest.mark.parametrize(("kind", "encoder"), [("every matrix", False), ("full", True), ("relu", False)])
def test_public_operators_find_the_same(kind: str, encoder: bool, make: Make) -> None:
    found = []
    for context in (Private(), linear.without_onednn()):
        policy = make(kind, encoder)
        with context, Private() as seen:
            encoded = policy.shared(policy.encode(TEXTS))
            found.append((scored(policy, encoded, 0.7), sampled(policy, encoded, 0.7)))
        assert bool(seen.names) == (linear._WIDE and isinstance(context, Private))
    assert torch.equal(found[0][1]["ids"], found[1][1]["ids"])
    for ours, theirs in zip(*found, strict=True):
        all_close(ours, theirs)


@needs_private
def test_encoders_and_models_of_others_have_the_fast_products(make_policy: Make) -> None:
    for name in ("t5", "llama"):
        policy = make_policy(name, "fresh")
        encoded = policy.encode(TEXTS)
        with Private() as seen, torch.no_grad():
            _ = policy.encode(TEXTS) if name == "t5" else policy.logprobs(encoded, IDS, 1.0)
        assert len(seen.names) >= 2 * 4  # of two layers each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("trains", [False, True])
def test_linear_is_torchs(dtype: torch.dtype, bias: bool, trains: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    numbers = [torch.randn(shape, generator=generator).to(dtype) for shape in ((3, 5, 32), (48, 32), (48,))]
    slopes = torch.randn(3, 5, 48, generator=generator).to(dtype)
    share = 1e-5 if dtype == torch.float32 else 1e-2  # bfloat16 has 8 bits
    found = []
    for function in (linear.linear, torch.nn.functional.linear):
        x, weight, added = (number.clone() for number in numbers)
        wanted = [x.requires_grad_(), *((weight.requires_grad_(),) if trains else ())]
        wanted += [added.requires_grad_()] if bias and trains else []
        product = function(x, weight, added if bias else None)
        found.append([product, *torch.autograd.grad(product, wanted, slopes)])
        with torch.no_grad():
            close(function(x[:, 0], weight), torch.nn.functional.linear(x[:, 0], weight), share)
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        close(ours, theirs, share)


def test_other_layers_of_a_model_go_through_linear_and_autocast_is_heeded() -> None:
    layer, x = torch.nn.Linear(16, 8), torch.randn(3, 16)
    with linear.FastLinear(), Private() as seen:
        fast = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
    assert len(seen.names) == int(linear._WIDE)
    close(fast, layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packed_products_serve_any_number_of_rows(dtype: torch.dtype) -> None:
    weights = [torch.randn(rows, 32).to(dtype).requires_grad_() for rows in (16, 24)]
    product = linear.pack_weights(weights, 7)
    with linear.without_onednn():
        public = linear.pack_weights(weights, 7)
    with torch.no_grad():
        for rows in (7, 1, 3, 64):
            x = torch.randn(rows, 32).to(dtype)
            expected = torch.nn.functional.linear(x, torch.cat(weights))
            for found in (product(x), public(x)):
                assert found.dtype == dtype
                close(found, expected, 1e-5 if dtype == torch.float32 else 1e-2)


def test_on_the_meta_device_nothing_private_is_called() -> None:
    x, weight = torch.empty(3, 8, device="meta"), torch.empty(4, 8, device="meta", requires_grad=True)
    with Private() as seen:
        linear.linear(x, weight).sum().backward()  # type: ignore[no-untyped-call]
        assert linear.pack_weights([weight, weight], 3)(x).shape == (3, 8)
    assert seen.names == []


@needs_private
def test_packs_are_made_once_per_base_and_forgotten_when_it_moves(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    made, packed = [], t5.packed
    monkeypatch.setattr(t5, "packed", lambda *given: made.append(given) or packed(*given))  # type: ignore[func-returns-value]
    policy = make("loaded")
    assert isinstance(policy.weights, LoraWeights)
    before = {name: weight.clone() for name, weight in policy.model.named_parameters() if not weight.requires_grad}
    encoded = policy.shared(policy.encode(TEXTS))
    for adapter in (POLICY, policy.reference, None, POLICY):
        sampled(policy, encoded, 1.0, adapter)
        assert len(made) == 1 + 2 * 6  # the head, and six products of each of two blocks
    seen = sampled(policy, encoded, 1.0)
    disturb(policy)  # what trains is not in the packs
    assert not torch.equal(sampled(policy, encoded, 1.0)["logprobs"], seen["logprobs"])
    scored(policy, encoded, 1.0)
    after = dict(policy.model.named_parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    policy.to(policy.device)
    assert policy.weights.packs == []
    full = make("full")  # its weights move, so each time anew
    seen = sampled(full, full.encode(TEXTS), 1.0)
    disturb(full)
    ours = sampled(full, full.encode(TEXTS), 1.0)
    with plainly(full):
        all_close(ours, sampled(full, full.encode(TEXTS), 1.0))


# The head


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("trains", [False, True])
def test_token_logprobs_are_log_softmax_and_their_slope_autograds(
    temperature: float, trains: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    exact_states, exact_head = (
        torch.randn(size, 16, generator=generator, dtype=torch.float64, requires_grad=True) for size in (11, 50)
    )
    ids, slopes = torch.randint(0, 50, (11,), generator=generator), torch.randn(11, generator=generator)
    every = (exact_states @ exact_head.t() / temperature).log_softmax(-1)
    expected = every.gather(1, ids[:, None])[:, 0]
    entropy = -(every.exp() * every).sum(1)
    by = torch.autograd.grad((expected * slopes).sum(), [exact_states, exact_head][: 1 + trains])
    for logits in (1, 150, 4_000_000):  # one row at a time, three, all
        monkeypatch.setattr(head, "LOGITS", logits)
        states, words = (x.detach().float() for x in (exact_states, exact_head))
        states.requires_grad_()
        words.requires_grad_(trains)
        found, entropies = head.token_logprobs(states, words, ids, temperature)
        assert not entropies.requires_grad
        close(found.double(), expected, 1e-6)
        close(entropies.double(), entropy.detach(), 1e-6)
        ours = torch.autograd.grad((found * slopes).sum(), [states, words][: 1 + trains])
        for one, other in zip(ours, by, strict=True):
            close(one.double(), other, 1e-6)
        with torch.no_grad():
            assert torch.equal(head.token_logprobs(states, words, ids, temperature)[0], found) or trains
    none, _ = head.token_logprobs(states[:0], words, ids[:0], temperature)
    assert none.shape == (0,)


def test_no_more_logits_are_made_at_once_than_said(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, product = [], head.linear
    monkeypatch.setattr(head, "linear", lambda x, w: sizes.append(len(x)) or product(x, w))  # type: ignore[func-returns-value]
    monkeypatch.setattr(head, "LOGITS", 150)
    head.token_logprobs(torch.randn(7, 4), torch.randn(50, 4), torch.zeros(7, dtype=torch.long), 1.0)
    assert sizes == [3, 3, 1]


# Batches: who leaves, who is read together


def rollout_of(policy: Policy) -> Rollout:
    generation = dataclasses.replace(small_config().generation, max_new_tokens=LENGTH, batch_size=8)
    prompts = [dataclasses.replace(p, id=f"{p.id}{i}") for i in range(2) for p in PROMPTS]
    return collect_rollout(policy, prompts, generation, seed=0, step=0)


@pytest.mark.parametrize("own", [True, False])
def test_rows_that_ended_leave_in_lots_and_nothing_depends_on_when(
    own: bool, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, sizes = make("loaded"), []
    monkeypatch.setattr(policy, "_network", T5Network if own else PlainNetwork)
    kind = T5Steps if own else PlainSteps
    keep = kind.keep
    monkeypatch.setattr(kind, "keep", lambda steps, rows: sizes.append(rows.tolist()) or keep(steps, rows))
    found, leaves, usual = {}, {}, policy_module._LEAVE
    for share in (usual, 1.0, 0.0):
        monkeypatch.setattr(policy_module, "_LEAVE", share)
        sizes.clear()
        found[share], leaves[share] = rollout_of(policy).responses, sizes.copy()
    assert all(sum(rows) <= usual * len(rows) for rows in leaves[usual])
    assert 0 == len(leaves[0.0]) < len(leaves[usual]) < len(found[1.0].response_mask.sum(1).unique())
    for one in found.values():
        assert torch.equal(one.ids, found[1.0].ids)
        assert torch.equal(one.ended, found[1.0].ended)
        close(one.logprobs, found[1.0].logprobs)
        close(one.values, found[1.0].values)


def test_prompts_are_read_in_blocks_and_nothing_depends_on_which(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(policy_module.length_batches([3, 3, 5, 2], 10)) == [slice(0, 2), slice(2, 4)]
    assert list(policy_module.length_batches([30, 1, 1], 10)) == [slice(0, 1), slice(1, 3)]
    assert list(policy_module.length_batches([4, 4], 8)) == [slice(0, 2)]
    policy = make("loaded with encoder")
    whole = rollout_of(policy)
    for tokens in (1, 100):
        monkeypatch.setattr(policy_module, "_READ", tokens)
        found = rollout_of(policy)
        mask = whole.encoded.mask.bool()
        assert torch.equal(found.encoded.mask, whole.encoded.mask)
        close(found.encoded.states[mask], whole.encoded.states[mask])
        assert torch.equal(found.responses.ids, whole.responses.ids)
        close(found.responses.logprobs, whole.responses.logprobs)
        close(found.ref_logprobs, whole.ref_logprobs)


# bfloat16


def test_a_t5_in_bfloat16_agrees_within_its_rounding(make: Make) -> None:
    policy, exact = make("fresh", bf16=True), make("fresh")
    assert policy._network is T5Network
    encoded = policy.shared(policy.encode(TEXTS))
    assert encoded.cross is not None
    assert encoded.cross.dtype == torch.bfloat16
    ours = scored(policy, encoded, 1.0)
    with plainly(policy):
        theirs = scored(policy, policy.encode(TEXTS), 1.0)
    fp32 = scored(exact, exact.shared(exact.encode(TEXTS)), 1.0)
    assert ours["logprobs"].dtype == torch.float32
    for name in ("logprobs", "entropies", "values"):
        assert (ours[name] - theirs[name]).abs().max() < 0.15
        assert (ours[name] - fp32[name]).abs().max() < 0.15
    names = [name for name in ours if "lora_" in name]
    flat = {i: torch.cat([x[name].float().flatten() for name in names]) for i, x in enumerate((ours, theirs, fp32))}
    assert (flat[0] - flat[2]).norm() < 0.08 * flat[2].norm()  # of products in 8 bits
    assert {ours[name].dtype for name in names} == {torch.float32}
    with torch.no_grad():
        drawn = policy.sample(encoded, CHANCES, 1.0)
        again, _, values = policy.logprobs(encoded, drawn.ids, 1.0, mask=drawn.response_mask)
    assert 0 < float((again - drawn.logprobs).abs().max()) < 0.1
    assert float((values - drawn.values).abs().max()) < 0.15
    require_agreement(policy, "base")
