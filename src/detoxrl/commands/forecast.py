"""What memory will the stages of a run take, estimated from shapes alone?

Every pass runs on torch's meta device, where tensors have a shape and no content. No weights are read, and the bytes
that a pass would hold can still be counted.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import psutil
import torch
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from detoxrl.commands.prepare import Prepared
from detoxrl.commands.workload import baseline_names
from detoxrl.config.schema import Config, GenerationConfig
from detoxrl.models.linear import packed_dtype_on_cpu
from detoxrl.models.loading import load_shapes, scratch_base
from detoxrl.models.lora import make_policy
from detoxrl.models.policy import Policy, Scored
from detoxrl.models.reader import TOKENS
from detoxrl.models.recompute import recomputing_layers
from detoxrl.models.types import Encoded
from detoxrl.training.finetune import bf16_capable

_META = torch.device("meta")
# Bytes of libraries that are imported later (judges, reports) and of the allocator's reserve: 0.35 to 0.67 GiB in runs.
_LOADED_LATER = 0.45 * 2**30


class Meter(TorchDispatchMode):
    """Counts the bytes of the tensors that torch makes inside the block.

    `held` is what is alive now, `peak` the most that was alive at once. A number read from a meta tensor is 1.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.held = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1

        out = func(*args, **(kwargs or {}))
        for storage in _storages(out) - _storages((args, kwargs)):  # a view shares the storage of an argument
            self.held += storage.nbytes()
            weakref.finalize(storage, self._release, storage.nbytes())

        self.peak = max(self.peak, self.held)
        return out

    def _release(self, size: int) -> None:
        self.held -= size


def stage_memory(config: Config, prepared: Prepared, classifiers: list[PreTrainedModel]) -> dict[str, float]:
    """Return the peak bytes of the stages sft (0 if nothing is tuned), train and evaluate.

    Each includes what this process holds now. `classifiers` are on the meta device. Prompts have the 95th percentile of
    lengths, and responses their maximum length.
    """
    policy = bare_policy(config, prepared.tokenizer)
    trained = weight_bytes(policy)
    # The packed copies stay from the first sampling on.
    models = sum(weight_bytes(model) for model in (policy.model, *classifiers)) + _packed_bytes(policy)
    baselines = len(baseline_names(config, prepared.rows))
    sampling, scoring, update = _policy_peaks(policy, config, prepared)
    judging = _judging_peak(classifiers, config.generation)

    # On a GPU only tensors take memory, not the process.
    process = 0 if PartialState().device.type == "cuda" else psutil.Process().memory_info().rss
    process += _LOADED_LATER

    sft = 0.0
    if config.sft.steps + config.sft.baseline_steps > 0:
        sft = process + _finetuning_peak(policy, config, prepared)
    if baselines > 0:
        # Two baselines learn from samples of the initial policy, one of them in passes no larger than an update's.
        sft = max(sft, process + models + 4 * trained + max(sampling, update))

    return {
        "sft": sft,
        # The weights that train also have a gradient, two moments and a frozen copy as the reference.
        "train": process + models + 4 * trained + max(sampling, scoring, update, judging),
        "evaluate": process + models + (1 + baselines) * trained + max(sampling, judging),
    }


def response_tokens(config: Config, prepared: Prepared) -> int:
    """Return the tokens of a long response: the 95th percentile of the references, or the limit without references."""
    limit = config.generation.max_new_tokens
    return min(limit, _reference_tokens(config, prepared))


def bare_policy(config: Config, tokenizer: PreTrainedTokenizerBase) -> Policy:
    """Return the policy that a run begins with, its adapter included, on the meta device."""
    with _META:
        if config.policy.base == "scratch":
            model = scratch_base(tokenizer, config.seed)
        else:
            model = load_shapes(config.policy.base, config.policy.bf16)

        return make_policy(model, tokenizer, None, config.policy, config.seed)


def weight_bytes(model: Policy | torch.nn.Module) -> int:
    """Return the bytes of a module's weights, or of the weights of a policy that train."""
    return sum(weight.nbytes for weight in model.parameters())


def _policy_peaks(policy: Policy, config: Config, prepared: Prepared) -> tuple[float, float, float]:
    """Return the peak bytes of sampling a batch, of its log-probs under the reference, and of a microbatch's update."""
    texts = _long_prompts(config, prepared)
    length = config.generation.max_new_tokens
    temperature = config.generation.temperature
    with torch.no_grad(), Meter():
        encoded = policy.with_shared_cross(policy.encode(texts))

    def read(prompts: int, group_size: int, tokens: int) -> Scored:
        prompts = min(prompts, len(texts))
        ids = torch.zeros(prompts * group_size, tokens, dtype=torch.long, device=_META)
        with_entropy = torch.is_grad_enabled() and config.rl.entropy_coef > 0
        return policy.logprobs(_first_rows(encoded, prompts), ids, temperature, entropy_gradient=with_entropy)

    def learn() -> None:
        responses = config.rl.microbatch_size or config.rl.minibatch_size
        group_size = min(responses, config.rl.responses_per_prompt)
        read(responses // group_size, group_size, response_tokens(config, prepared)).logprobs.sum().backward()

    # Validation samples one response to each prompt of a batch, which takes more memory than groups.
    with torch.no_grad():
        sampling = _sampling_peak(policy, texts, length, temperature)
        scoring = _peak(lambda: read(policy.rows_at_once(length), 1, length))

    return sampling, scoring, _peak(learn)


def _sampling_peak(policy: Policy, texts: list[str], length: int, temperature: float) -> float:
    """Return the peak bytes of sampling a response of `length` tokens to each text.

    Only a few tokens are sampled: every further one adds the same number of bytes.
    """

    def peak(tokens: int) -> int:
        uniforms = torch.ones(len(texts), tokens, device=_META)
        return _peak(lambda: policy.sample(policy.with_shared_cross(policy.encode(texts)), uniforms, temperature))

    if policy.has_encoder:
        few, more = peak(2), peak(6)
        return few + (more - few) / 4 * (length - 2)

    # A causal model reads its prompts in the pass that gives the first token. Later passes hold less than that one
    # beside the cache, so the sum is an upper bound.
    return peak(1) + _cache_bytes(policy) * len(texts) * (length - 1)


def _packed_bytes(policy: Policy) -> int:
    """Return the bytes of the weights that a fast network packs for sampling on this machine's CPU."""
    dtype = packed_dtype_on_cpu(policy.model.dtype)
    if dtype is None or not policy.has_fast_network or PartialState().device.type != "cpu":
        return 0

    model: Any = policy.weights.active
    decoder = model.decoder if policy.has_encoder else model.model
    head = model.get_output_embeddings()
    layers = [module.weight for module in decoder.modules() if type(module) is torch.nn.Linear]
    # The factors of a LoRA are linear layers too, but small.
    return sum(weight.numel() * dtype.itemsize for weight in (*layers, head.weight))


def _cache_bytes(policy: Policy) -> int:
    """Return the bytes of the keys and values that a causal model caches for one token: in float32 at most."""
    token = torch.zeros(1, 1, dtype=torch.long, device=_META)
    with Meter() as meter:
        cache = policy.model(input_ids=token, use_cache=True).past_key_values
        held: int = meter.held  # The cache alone: the other outputs are released.

    del cache
    size: int = policy.model.dtype.itemsize
    return held * torch.float32.itemsize // size


def _judging_peak(classifiers: list[PreTrainedModel], config: GenerationConfig) -> int:
    """Return the peak bytes of a batch of responses that every classifier reads."""
    rows = max(1, TOKENS // config.max_new_tokens)
    rows = min(rows, 2 * config.batch_size)
    ids = torch.zeros(rows, config.max_new_tokens, dtype=torch.long, device=_META)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        return _peak(lambda: [classifier(ids, attention_mask=mask).logits for classifier in classifiers])


def _finetuning_peak(policy: Policy, config: Config, prepared: Prepared) -> int:
    """Return the peak bytes of a step of supervised fine-tuning, with the weights and their optimizer state."""
    if config.sft.full_weights:  # they train in fp32
        in_fp32 = replace(config, policy=replace(config.policy, bf16=False))
        policy = bare_policy(in_fp32, prepared.tokenizer)
        policy.model.requires_grad_(True)

    whole = weight_bytes(policy.model)
    held = whole + 3 * weight_bytes(policy)  # a gradient and two moments
    if config.sft.bf16 and bf16_capable(PartialState().device):
        held += whole // 2  # autocast keeps each weight in bfloat16 for the backward pass

    prompt = prepared.account["prompt_tokens"]["p95"]
    target = _reference_tokens(config, prepared)
    logits: dict[str, int] = {}
    if not policy.has_encoder:  # A causal model reads both in a row, and makes no logits of the prompt.
        prompt += target
        target += 1
        logits = {"logits_to_keep": target}

    ids = torch.ones(config.sft.batch_size, prompt, dtype=torch.long, device=_META)
    labels = torch.ones(config.sft.batch_size, target, dtype=torch.long, device=_META)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **logits}
    recomputing = recomputing_layers(policy.model) if policy.checkpointing else nullcontext()
    with recomputing:
        return held + _peak(lambda: policy.model(**batch, use_cache=False).loss.backward())


def _reference_tokens(config: Config, prepared: Prepared) -> int:
    spread = prepared.account["reference_tokens"]
    return int(spread["p95"]) if spread else config.generation.max_new_tokens


def _long_prompts(config: Config, prepared: Prepared) -> list[str]:
    """Return a batch of training prompts that ends at the 95th percentile of lengths."""
    ordered = sorted((row.prompt for row in prepared.rows["train"]), key=len)
    end = max(2, round(0.95 * len(ordered)))
    return ordered[:end][-config.generation.batch_size :]


def _first_rows(encoded: Encoded, rows: int) -> Encoded:
    cross = None if encoded.cross is None else encoded.cross[:, :, :rows]
    return replace(encoded, states=encoded.states[:rows], mask=encoded.mask[:rows], cross=cross)


def _storages(tree: Any) -> set[torch.UntypedStorage]:
    return {leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


def _peak(work: Callable[[], Any]) -> int:
    """Return the most bytes that `work` holds at once."""
    meter = Meter()
    with meter:
        work()
    return meter.peak
