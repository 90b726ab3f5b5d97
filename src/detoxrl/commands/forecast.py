"""What will the stages of a run cost on this machine, told from shapes alone?

Every pass is made on torch's meta device, where tensors have a shape and no content: no weight is needed, and what
would be held in memory can be counted. Time follows from operations, bytes and calls, at rates measured here.
"""

import timeit
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import psutil
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import PreTrainedModel, PreTrainedTokenizerBase, T5Config, T5ForConditionalGeneration

from detoxrl.commands.prepare import Prepared
from detoxrl.config.schema import Config, GenerationConfig
from detoxrl.models.loading import load_shapes, scratch_base
from detoxrl.models.lora import make_policy
from detoxrl.models.policy import Policy
from detoxrl.rewards.classifier import TOKENS
from detoxrl.training.sft import bf16_capable

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


class Cost(NamedTuple):
    """Seconds, and the most bytes held at once."""

    seconds: float = 0.0
    peak: float = 0.0


class Meter(TorchDispatchMode):
    """Counts the cost of what torch does inside the block; a number asked of a meta tensor is 1."""

    def __init__(self, speed: Speed) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.speed, self.seconds, self.calls, self.held, self.peak = speed, 0.0, 0, 0, 0
        self._live: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1
        out = func(*args, **(kwargs or {}))
        read, made = ([t for t in tree_leaves(some) if isinstance(t, torch.Tensor)] for some in ((args, kwargs), out))
        fresh = {tensor.untyped_storage() for tensor in made} - {tensor.untyped_storage() for tensor in read}
        for storage in fresh:
            self._live.add(storage)
            self.held += storage.nbytes()
            weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.held)
        moving = 0.0
        for tensor in (*read, *made) if fresh else ():  # else it is a view
            here = tensor.untyped_storage() in self._live
            moving += tensor.nbytes / (self.speed.moved if here else self.speed.weights)
        count = flop_registry.get(func._overloadpacket)
        flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
        rate = self.speed.bf16 if made and made[0].dtype == torch.bfloat16 else self.speed.fp32
        self.seconds += max(flops / rate, moving) + 1 / self.speed.calls
        self.calls += 1
        return out

    def _free(self, size: int) -> None:
        self.held -= size


def measured_speed(device: torch.device) -> Speed:
    """Return what the device does in a second, by short trials."""

    def lasting(work: Callable[[], torch.Tensor]) -> float:
        taken = timeit.repeat(lambda: work().view(-1)[0].item(), number=1, repeat=4)  # a number waits for the device
        return 1.4 * sorted(taken)[2]  # whole runs came 1.2 to 1.8 times as slow as short trials

    a, b = torch.ones(1024, 768, device=device), torch.ones(768, 2048, device=device)
    products = 2 * 1024 * 768 * 2048
    states, copy = torch.ones(2, 2**21, device=device)  # the size of a batch's hidden states
    weights = torch.ones(2**26, device=device)  # of a model's weights, which no cache holds
    shape = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    tiny = T5ForConditionalGeneration(shape).to(device)  # type: ignore[arg-type]
    ids = torch.ones(2, 8, dtype=torch.long, device=device)

    def learn() -> torch.Tensor:
        loss: torch.Tensor = tiny(input_ids=ids, decoder_input_ids=ids).logits.sum()
        loss.backward()
        return loss

    with Meter(Speed(1, 1, 1, 1, 1)) as meter:
        learn()
    return Speed(
        fp32=products / lasting(partial(torch.mm, a, b)),
        bf16=products / lasting(partial(torch.mm, a.bfloat16(), b.bfloat16())),
        weights=weights.nbytes / lasting(weights.sum),
        moved=2 * states.nbytes / lasting(partial(copy.copy_, states)),
        calls=meter.calls / lasting(learn),  # so small that calls are all it costs
    )


def stage_costs(
    config: Config, prepared: Prepared, classifiers: list[PreTrainedModel], speed: Speed
) -> dict[str, Cost]:
    """Return what sft, train and evaluate cost, with all that is held meanwhile beside this process as it is now.

    `classifiers` are on the meta device. Prompts are those of the 95th percentile of lengths; responses fill memory up
    to their limit, and take the time of the longest of their batch, which is as long as that of the references.
    """
    rl, rows, policy = config.rl, prepared.rows, bare_policy(config, prepared.tokenizer)
    respond, score, update = _passes(policy, config, prepared, speed)
    judge = _judging(classifiers, config.generation, speed)
    made = rl.steps * rl.batch_size
    judged = made + (-(-rl.steps // rl.validate_every) + 1) * len(rows["validation"])
    # Tuned on civil references where there are some, and on the best of the start's own responses.
    baselines = (1 + any(row.civil_reference for row in rows["train"])) * (config.sft.baseline_steps > 0)
    samples = (2 + baselines) * config.evaluation.samples_per_prompt + max(config.evaluation.best_of, default=0)
    measured, tuning = samples * len(rows["test"]), config.sft.steps + config.sft.baseline_steps * baselines
    here = _LATER + (0 if PartialState().device.type == "cuda" else psutil.Process().memory_info().rss)
    trained, read = weight_bytes(policy), sum(weight_bytes(model) for model in (policy.model, *classifiers))

    def stage(held: float, *parts: tuple[int, Cost]) -> Cost:
        return Cost(sum(count * cost.seconds for count, cost in parts), held + max(cost.peak for _, cost in parts))

    responded = judged + min(config.reward.normalise_on, len(rows["train"]))
    learning = (judged, score), (made * rl.epochs, update)
    return {
        "sft": stage(here, (tuning, _tuning(policy, config, prepared, speed))) if tuning else Cost(),
        # What trains has a gradient, two moments, and the reference.
        "train": stage(here + read + 4 * trained, (responded, respond), *learning, (judged, judge)),
        "evaluate": stage(here + read + (1 + baselines) * trained, (measured, respond), (measured, judge)),
    }


def bare_policy(config: Config, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Return the policy that a run begins with, under its adapter and without a weight."""
    scratch = config.policy.base == "scratch"
    with _META:
        model = scratch_base(tokenizer, config.seed) if scratch else load_shapes(config.policy.base, config.policy.bf16)
        return make_policy(model, tokenizer, None, config.policy, config.seed)


def weight_bytes(model: Policy | torch.nn.Module) -> int:
    """Return the bytes of a model's weights, or of those that a policy trains."""
    return sum(weight.nbytes for weight in model.parameters())


def _passes(policy: Policy, config: Config, prepared: Prepared, speed: Speed) -> tuple[Cost, Cost, Cost]:
    """Return what a response costs: to sample it, to score it by the reference, to learn from it once."""
    length, temperature = config.generation.max_new_tokens, config.generation.temperature
    ordered = sorted((row.prompt for row in prepared.rows["train"]), key=len)
    texts = ordered[: max(2, round(0.95 * len(ordered)))][-config.generation.batch_size :]
    longest = min(length, (prepared.account["summary_tokens"] or {"p95": length})["p95"])
    most = config.rl.microbatch_size or config.rl.minibatch_size, policy.rows_at_once(length)
    rows, some = (min(len(texts), n) for n in most)

    def scored(n: int, tokens: int) -> tuple[torch.Tensor, ...]:
        cross = None if encoded.cross is None else encoded.cross[:, :, :n]
        few = replace(encoded, states=encoded.states[:n], mask=encoded.mask[:n], cross=cross)
        return policy.logprobs(few, torch.zeros(n, tokens, dtype=torch.long, device=_META), temperature)

    def sampling(tokens: int) -> Cost:
        chances = torch.ones(len(texts), tokens, device=_META)
        return _cost(
            speed, lambda: policy.sample(policy.shared(policy.encode(texts)), chances, temperature), len(texts)
        )

    with torch.no_grad():
        with Meter(speed):
            encoded = policy.shared(policy.encode(texts))
        few, more = sampling(2), sampling(6)  # from there on each token adds the same
        score = _cost(speed, lambda: scored(some, length), some)
    seconds, peak = ((after - before) / 4 for before, after in zip(few, more, strict=True))
    respond = Cost(few.seconds + seconds * (longest - 2), few.peak + peak * (length - 2))
    learn = _cost(speed, lambda: torch.stack([part.sum() for part in scored(rows, longest)]).sum().backward(), rows)
    return respond, score, learn


def _judging(classifiers: list[PreTrainedModel], config: GenerationConfig, speed: Speed) -> Cost:
    """Return what it costs that every classifier reads a response."""
    rows = min(max(1, TOKENS // config.max_new_tokens), 2 * config.batch_size)
    read = torch.zeros(rows, config.max_new_tokens, dtype=torch.long, device=_META)
    mask = torch.ones_like(read)
    with torch.no_grad():
        return _cost(speed, lambda: [reader(read, attention_mask=mask).logits for reader in classifiers], len(read))


def _tuning(policy: Policy, config: Config, prepared: Prepared, speed: Speed) -> Cost:
    """Return what a step of supervised fine-tuning costs, there and back, beside the weights and what trains them."""
    if config.sft.full_weights:  # they train in fp32
        policy = bare_policy(replace(config, policy=replace(config.policy, bf16=False)), prepared.tokenizer)
        policy.model.requires_grad_(True)
    prompt = prepared.account["prompt_tokens"]["p95"]
    summary = (prepared.account["summary_tokens"] or {"p95": config.generation.max_new_tokens})["p95"]
    lengths = (prompt, summary) if policy.model.config.is_encoder_decoder else (prompt + summary,) * 2
    read, labels = (torch.ones(config.sft.batch_size, n, dtype=torch.long, device=_META) for n in lengths)
    whole = weight_bytes(policy.model)
    held = whole + 3 * weight_bytes(policy)  # a gradient and two moments
    if config.sft.bf16 and bf16_capable(PartialState().device):
        speed = speed._replace(fp32=speed.bf16)
        held += whole // 2  # autocast keeps each weight in bf16 for the way back
    batch = {"input_ids": read, "attention_mask": torch.ones_like(read), "labels": labels}
    step = _cost(speed, lambda: policy.model(**batch).loss.backward())
    return step._replace(peak=step.peak + held)


def _cost(speed: Speed, work: Callable[[], Any], rows: float = 1) -> Cost:
    """Return what some work costs, its seconds for each of its rows."""
    with Meter(speed) as meter:
        work()
    return Cost(meter.seconds / rows, meter.peak)
