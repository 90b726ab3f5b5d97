"""What will the stages of a run cost on this machine, told from shapes alone?

Every pass is made on torch's meta device, where tensors have a shape and no content: no weight is needed, and what
would be held in memory can be counted. Time follows from operations, bytes and calls, at rates measured here.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from detoxrl.config import Config, GenerationConfig
from detoxrl.policy.adapters import make_policy
from detoxrl.policy.backbone import bare_base, scratch_base
from detoxrl.policy.policy import Policy
from detoxrl.prepare import Prepared
from detoxrl.records import Encoded
from detoxrl.rewards.classifier import BATCH
from detoxrl.rollout import rows_at_once
from detoxrl.sft import bf16_capable

_META = torch.device("meta")
# What comes into memory later: libraries of judges and reports, and what the allocator keeps. It came to 0.35 to 0.67.
_LATER = 0.45 * 2**30


class Speed(NamedTuple):
    """What this machine does in a second: operations of a product, bytes of weights and of states, calls of torch."""

    fp32: float
    bf16: float
    weights: float
    moved: float
    calls: float


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Seconds, and the most bytes held at once."""

    seconds: float = 0.0
    peak: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(seconds=self.seconds + other.seconds, peak=max(self.peak, other.peak))

    def times(self, count: float) -> Cost:
        """Return the cost of doing it so often, one after the other."""
        return Cost(seconds=self.seconds * count, peak=self.peak)

    def beside(self, held: float) -> Cost:
        """Return the cost while so many other bytes are held."""
        return replace(self, peak=self.peak + held)


class Meter(TorchDispatchMode):
    """Counts the cost of what torch does inside the block; a number asked of a meta tensor is `answer`."""

    def __init__(self, speed: Speed, answer: int = 1) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.speed, self.answer = speed, answer
        self.seconds, self.calls, self.held, self.peak = 0.0, 0, 0, 0
        self._live: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.answer
        out = func(*args, **(kwargs or {}))
        read, made = _tensors((args, kwargs)), _tensors(out)
        known = {tensor.untyped_storage()._cdata for tensor in read}
        fresh = [tensor for tensor in made if tensor.untyped_storage()._cdata not in known]
        for tensor in fresh:
            self._hold(tensor.untyped_storage())
        sizes = [(t.untyped_storage()._cdata in self._live, t.nbytes) for t in (*read, *made) if fresh]  # else a view
        moving = sum(n / (self.speed.moved if here else self.speed.weights) for here, n in sizes)
        counted = flop_registry.get(func._overloadpacket)
        flops = counted(*args, **(kwargs or {}), out_val=out) if counted else 0
        rate = self.speed.bf16 if made and made[0].dtype == torch.bfloat16 else self.speed.fp32
        self.seconds += max(flops / rate, moving) + 1 / self.speed.calls
        self.calls += 1
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._live:
            self.held += size
            self.peak = max(self.peak, self.held)
            self._live[key] = weakref.ref(storage, partial(self._free, key, size))

    def _free(self, key: int, size: int, _: Any) -> None:
        self.held -= size
        del self._live[key]


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def measured_speed(device: torch.device) -> Speed:
    """Return what the device does in a second, by short trials."""

    def lasting(work: Callable[[], Any]) -> float:
        taken = []
        for _ in range(4):
            started = time.perf_counter()
            float(work())  # waits for the device
            taken.append(time.perf_counter() - started)
        return 1.4 * sorted(taken)[2]  # whole runs came 1.2 to 1.8 times as slow as short trials

    def product(dtype: torch.dtype) -> float:
        a, b = torch.ones(1024, 768, dtype=dtype, device=device), torch.ones(768, 2048, dtype=dtype, device=device)
        return 2 * 1024 * 768 * 2048 / lasting(lambda: (a @ b)[0, 0])

    states, copy = torch.ones(2, 2**21, device=device)  # the size of a batch's hidden states
    weights = torch.ones(2**26, device=device)  # of a model's weights, which no cache holds
    tiny = T5ForConditionalGeneration(T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    tiny = tiny.to(device)  # type: ignore[arg-type]
    ids = torch.ones(2, 8, dtype=torch.long, device=device)

    def learn() -> torch.Tensor:
        loss: torch.Tensor = tiny(input_ids=ids, decoder_input_ids=ids).logits.sum()
        loss.backward()
        return loss.detach()

    with Meter(Speed(1, 1, 1, 1, 1)) as meter:
        learn()
    return Speed(
        fp32=product(torch.float32),
        bf16=product(torch.bfloat16),
        weights=weights.nbytes / lasting(weights.sum),
        moved=2 * states.nbytes / lasting(lambda: copy.copy_(states)[0]),
        calls=meter.calls / lasting(learn),  # so small that calls are all it costs
    )


def stage_costs(
    config: Config, prepared: Prepared, classifiers: list[PreTrainedModel], speed: Speed
) -> dict[str, Cost]:
    """Return what sft, train and evaluate cost, with all that is held meanwhile beside this process as it is now.

    `classifiers` are on the meta device. Prompts are those of the 95th percentile of lengths; responses fill memory up
    to their limit, and take the time of the longest of their batch, which is as long as that of the references.
    """
    steps, batch = config.rl.steps, config.generation.batch_size
    policy, fp32 = bare_policy(config, prepared.tokenizer), replace(config, policy=replace(config.policy, bf16=False))
    tuner = bare_policy(fp32, prepared.tokenizer) if config.sft.full_weights else policy  # whole weights train in fp32
    ordered = sorted((row.prompt for row in prepared.rows["train"]), key=len)
    texts = ordered[: max(2, round(0.95 * len(ordered)))][-batch:]
    respond, score, update = _passes(policy, texts, config, prepared, speed)
    judge = _judging(classifiers, config.generation, len(texts), speed)
    made, validations = steps * config.rl.batch_size, -(-steps // config.rl.validate_every) + 1
    validated = validations * len(prepared.rows["validation"])
    baseline = config.sft.baseline_steps > 0 and any(row.civil_reference for row in prepared.rows["train"])
    measured = (2 + baseline) * len(prepared.rows["test"]) * config.evaluation.samples_per_prompt
    tuning = config.sft.steps + config.sft.baseline_steps * baseline
    whole, trained = weight_bytes(policy.model.parameters()), weight_bytes(policy.parameters())
    readers = sum(weight_bytes(classifier.parameters()) for classifier in classifiers)
    model = weight_bytes(tuner.model.parameters())
    tuned = model if config.sft.full_weights else trained
    here = (0 if PartialState().device.type == "cuda" else psutil.Process().memory_info().rss) + _LATER
    train = respond.times(made + validated + min(config.reward.normalise_on, len(ordered))) + score.times(made)
    train += update.times(made * config.rl.epochs) + judge.times(made + validated)
    tune = Cost()
    if tuning:  # beside the gradient and two moments
        tune = _tuning(tuner, config, prepared, speed).times(tuning).beside(here + model + 3 * tuned)
    return {
        "sft": tune,
        "train": train.beside(here + whole + readers + 4 * trained),  # and the reference
        "evaluate": (respond + judge).times(measured).beside(here + whole + readers + (1 + baseline) * trained),
    }


def bare_policy(config: Config, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Return the policy that a run begins with, under its adapter and without a weight."""
    if config.policy.base == "scratch":
        model = scratch_base(tokenizer, config.seed).to(_META)  # type: ignore[arg-type]
    else:
        model = bare_base(config.policy.base, config.policy.bf16)
    with _META:
        return make_policy(model, tokenizer, None, config.policy, config.seed)


def weight_bytes(weights: Iterable[torch.nn.Parameter]) -> int:
    """Return the bytes of some weights."""
    return sum(weight.nbytes for weight in weights)


def _passes(
    policy: Policy, texts: list[str], config: Config, prepared: Prepared, speed: Speed
) -> tuple[Cost, Cost, Cost]:
    """Return what a response costs: to sample it, to score it by the reference, to learn from it once."""
    length, temperature, count = config.generation.max_new_tokens, config.generation.temperature, len(texts)
    ids = torch.zeros(count, length, dtype=torch.long, device=_META)
    references = prepared.account["summary_tokens"] or {"p95": length}
    longest, some = min(length, references["p95"]), min(count, rows_at_once(policy, length))
    rows = min(config.rl.microbatch_size, count)

    def first(n: int) -> Encoded:
        return Encoded(states=encoded.states[:n], mask=encoded.mask[:n])  # on meta no mask says what is padding

    with torch.no_grad():
        with Meter(speed) as meter:
            encoded = policy.encode(texts)
        encode = Cost(seconds=meter.seconds, peak=meter.peak)

        def sampling(tokens: int) -> Cost:
            chances = torch.ones(count, tokens, device=_META)
            return _cost(speed, lambda: policy.sample(encoded, chances, temperature), tokens)

        few, more = sampling(2), sampling(6)  # from there on each token adds the same
        score = _cost(speed, lambda: policy.logprobs(first(some), ids[:some], temperature))
    sample = Cost(
        seconds=few.seconds + (more.seconds - few.seconds) / 4 * (longest - 2),
        peak=few.peak + (more.peak - few.peak) / 4 * (length - 2),
    )

    def learn() -> None:
        logprobs, _, values = policy.logprobs(first(rows), ids[:rows, :longest], temperature)
        (logprobs.sum() + values.sum()).backward()

    twice = 2 if config.policy.bf16 else 1  # log-probs of the rollout are computed again
    return (encode + sample).times(1 / count), score.times(twice / some), _cost(speed, learn).times(1 / rows)


def _judging(classifiers: list[PreTrainedModel], generation: GenerationConfig, count: int, speed: Speed) -> Cost:
    """Return what it costs that every classifier reads a response."""
    read = torch.zeros(min(BATCH, 2 * count), generation.max_new_tokens, dtype=torch.long, device=_META)
    found = Cost()
    with torch.no_grad():
        for classifier in classifiers:
            found += _cost(speed, partial(classifier, input_ids=read, attention_mask=torch.ones_like(read)))
    return found.times(1 / len(read))


def _tuning(policy: Policy, config: Config, prepared: Prepared, speed: Speed) -> Cost:
    """Return what a step of supervised fine-tuning costs, there and back."""
    prompt, summary = (prepared.account[f"{name}_tokens"]["p95"] for name in ("prompt", "summary"))
    apart = policy.model.config.is_encoder_decoder
    lengths = (prompt, summary) if apart else (prompt + summary,) * 2
    read, labels = (torch.ones(config.sft.batch_size, n, dtype=torch.long, device=_META) for n in lengths)
    if config.sft.full_weights:
        policy.model.requires_grad_(True)

    def step() -> None:
        policy.model(input_ids=read, attention_mask=torch.ones_like(read), labels=labels).loss.backward()

    if not (config.sft.bf16 and bf16_capable(PartialState().device)):
        return _cost(speed, step)
    copies = weight_bytes(policy.model.parameters()) / 2  # autocast keeps each weight in bf16 for the way back
    return _cost(speed._replace(fp32=speed.bf16), step).beside(copies)


def _cost(speed: Speed, work: Callable[[], Any], answer: int = 1) -> Cost:
    meter = Meter(speed, answer)
    with meter:
        work()
    return Cost(seconds=meter.seconds, peak=meter.peak)
