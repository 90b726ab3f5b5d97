"""How long does each kind of step of a run take on this machine?

The step is small, so that it takes seconds on a large model too. Its time is extrapolated linearly in responses and in
tokens. No correction factor is applied.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import torch

from detoxrl.commands.forecast import response_tokens
from detoxrl.commands.prepare import Prepared
from detoxrl.commands.workload import StepSeconds
from detoxrl.config.schema import Config
from detoxrl.data.rows import Row, to_prompts
from detoxrl.evaluation.judges import Judge
from detoxrl.models.chat import uses_chat_template
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws
from detoxrl.models.types import Encoded, Prompt, Rollout
from detoxrl.rewards.terms import Reward, single_term
from detoxrl.rl.algorithm import Targets
from detoxrl.runs import Run
from detoxrl.runtime.checkpoint import trainable
from detoxrl.training.finetune import Tuned, bf16_capable, examples, loss_of
from detoxrl.training.learner import Learner
from detoxrl.training.rollout import collect_rollout

Measurement = TypeVar("Measurement")
# Sampling is timed at two lengths of responses, in tokens. The difference is the time of further tokens.
_FEW_TOKENS = 2
_MORE_TOKENS = 16
# A step that takes so many seconds is not repeated on a larger batch.
_LONG_STEP = 3.0
_WARM_UP_CHARACTERS = 64


class Timed(NamedTuple):
    """Seconds of a batch, and the tokens of its longest response."""

    seconds: float
    tokens: int


def policy_seconds(run: Run, prepared: Prepared) -> StepSeconds:
    """Return what a step of training and a judgement take.

    A score by the embedded reward, which does not exist before `prepare`, takes 0 seconds.
    """
    config = run.config
    reward = None if run.uses_embedded_reward else run.reward
    learner = Learner(run, reward or single_term(_no_reward))
    policy = learner.policy
    tokens = response_tokens(config, prepared)

    def step(rows: list[Row]) -> StepSeconds:
        prompts = to_prompts(rows)
        responses = len(rows) * config.rl.responses_per_prompt
        reading, encoded = _timed_reading(policy, prompts)
        few = _timed_sampling(policy, prompts, encoded, config, _FEW_TOKENS)
        more = _timed_sampling(policy, prompts, encoded, config, _MORE_TOKENS)
        rollout_seconds, rollout = _timed_rollout(policy, prompts, encoded, config)
        texts = [_response_like(row, prepared, tokens) for row in rows]

        # The time of reference and update is proportional to the tokens they read, which may include the prompts. A
        # group shares the tokens of its prompt.
        reads_prompts = policy.train_encoder or not policy.has_encoder
        prompt_tokens = encoded.mask.shape[1] / config.rl.responses_per_prompt if reads_prompts else 0
        scale = (prompt_tokens + tokens) / (prompt_tokens + more.tokens)

        return StepSeconds(
            sample=(reading + seconds_at(few, more, tokens)) / responses,
            reference=max(0.0, rollout_seconds - more.seconds) * scale / responses,
            score=_timed_scoring(reward, prompts, texts) / len(rows) if reward else 0.0,
            update=_timed_update(learner, rollout) * scale / responses,
            judges=[seconds / len(rows) for seconds in _timed_judging(run.judges, texts)],
        )

    largest = min(config.rl.prompts_per_step, config.generation.batch_size // config.rl.responses_per_prompt)
    return growing_batch(step, prepared.rows["train"], largest)


def finetuning_seconds(run: Run, prepared: Prepared) -> float:
    """Return what an optimizer step of supervised fine-tuning takes; 0 if the run makes none."""
    config = run.config
    if config.sft.steps + config.sft.baseline_steps == 0:
        return 0.0

    tokens = response_tokens(config, prepared)
    tuned = _tuned(run)

    def step(rows: list[Row]) -> float:
        pairs = [(row.prompt, _response_like(row, prepared, tokens)) for row in rows]
        return _timed_finetuning(tuned, pairs, config) / len(rows)

    return growing_batch(step, prepared.rows["train"], config.sft.batch_size) * config.sft.batch_size


def growing_batch(step: Callable[[list[Row]], Measurement], rows: Sequence[Row], largest: int) -> Measurement:
    """Return what `step` measures on the largest batch that takes seconds, of at most `largest` rows.

    For a large model one row is enough. A small model needs many: on one row most of its time is the overhead of calls,
    which a batch shares.
    """
    ordered = sorted(rows, key=lambda row: len(row.prompt))
    largest = min(largest, len(ordered))
    # The first call has an overhead of its own. It is made on a tiny row, and its time does not count.
    step([replace(ordered[0], prompt=ordered[0].prompt[:_WARM_UP_CHARACTERS])])

    size = 1
    while True:
        started = time.perf_counter()
        measurement = step(evenly_spaced(ordered, size))
        if size == largest or time.perf_counter() - started > _LONG_STEP:
            return measurement

        size = min(4 * size, largest)


def evenly_spaced(ordered: Sequence[Row], size: int) -> list[Row]:
    """Return `size` rows at equal distances. In order of length, they represent the lengths of all rows."""
    return [ordered[(2 * i + 1) * len(ordered) // (2 * size)] for i in range(size)]


def seconds_at(few: Timed, more: Timed, tokens: int) -> float:
    """Return the seconds of a batch with responses of `tokens` tokens, on the line through two measurements."""
    if more.tokens <= few.tokens:  # Every response ended early.
        return more.seconds

    per_token = (more.seconds - few.seconds) / (more.tokens - few.tokens)
    return more.seconds + max(0.0, per_token) * (tokens - more.tokens)


def _response_like(row: Row, prepared: Prepared, tokens: int) -> str:
    """Return a text as long as a response to the row: its reference, or the first `tokens` tokens of its text."""
    if row.references:
        return row.references[0]

    ids = prepared.tokenizer(row.text, add_special_tokens=False).input_ids
    return str(prepared.tokenizer.decode(ids[:tokens]))


# Each function below makes one call that a run makes often, and returns its seconds.


def _timed_reading(policy: Policy, prompts: list[Prompt]) -> tuple[float, Encoded]:
    started = time.perf_counter()
    with torch.no_grad():
        encoded = policy.encode([prompt.text for prompt in prompts])
    _wait_for(encoded.states)
    return time.perf_counter() - started, encoded


def _timed_sampling(policy: Policy, prompts: list[Prompt], encoded: Encoded, config: Config, tokens: int) -> Timed:
    """Sample a group of responses of at most `tokens` tokens to each prompt."""
    tokens = min(tokens, config.generation.max_new_tokens)
    uniforms = _draws(config).uniforms(policy, prompts, tokens)
    started = time.perf_counter()
    with torch.no_grad():
        responses = policy.sample(policy.with_shared_cross(encoded), uniforms, config.generation.temperature)

    longest = int(responses.response_mask.sum(1).max())
    return Timed(time.perf_counter() - started, longest)


def _timed_rollout(policy: Policy, prompts: list[Prompt], encoded: Encoded, config: Config) -> tuple[float, Rollout]:
    """Sample the responses that `_timed_sampling` sampled, and compute their log-probs under the reference."""
    generation = replace(config.generation, max_new_tokens=min(_MORE_TOKENS, config.generation.max_new_tokens))
    started = time.perf_counter()
    rollout = collect_rollout(policy, prompts, generation, _draws(config), encoded=encoded)
    return time.perf_counter() - started, rollout


def _draws(config: Config) -> Draws:
    return Draws(config.seed, "rollout", samples=range(config.rl.responses_per_prompt))


def _timed_scoring(reward: Reward, prompts: list[Prompt], texts: list[str]) -> float:
    started = time.perf_counter()
    # What a similarity compares with is a response too.
    reward([replace(prompt, initial_response=text) for prompt, text in zip(prompts, texts, strict=True)], texts)
    return time.perf_counter() - started


def _timed_update(learner: Learner, rollout: Rollout) -> float:
    """Make one pass over a rollout, in minibatches."""
    rl = replace(learner.config.rl, epochs=1)
    learner.config = replace(learner.config, rl=rl)
    learner.rollout = rollout
    # Advantages of 0 take as long as others and leave the policy as it is.
    responses = rollout.responses
    targets = Targets(advantages=torch.zeros_like(responses.logprobs), returns=responses.values)
    started = time.perf_counter()
    learner.update(targets, step=0)
    return time.perf_counter() - started


def _timed_judging(judges: Mapping[str, Judge], texts: list[str]) -> list[float]:
    # Judges remember the texts they rated. The number makes each text a new one.
    unseen = [f"{text} {len(texts)}" for text in texts]
    seconds = []
    for judge in judges.values():
        started = time.perf_counter()
        judge(unseen)
        seconds.append(time.perf_counter() - started)

    return seconds


def _tuned(run: Run) -> Tuned:
    """Return what supervised fine-tuning changes, as the sft stage does, in training mode."""
    sft = run.config.sft
    if sft.steps > 0 and sft.full_weights:
        base = run.base(bf16=False)
        tuned = Tuned(base.model(), base.tokenizer)
    else:
        tuned = Tuned.of(run.initial_policy())

    model: Any = tuned.model
    model.to(run.world.device).train()
    return tuned


def _timed_finetuning(tuned: Tuned, pairs: list[tuple[str, str]], config: Config) -> float:
    """Make one optimizer step on (prompt, target) pairs."""
    model = tuned.model
    weights = trainable(model).values()
    first = next(iter(weights))
    optimizer = torch.optim.AdamW(weights, lr=config.sft.lr, weight_decay=0.0, fused=True)
    in_chat = uses_chat_template(config.data, tuned.tokenizer)
    inputs, labels = examples(tuned.tokenizer, pairs, model.config.is_encoder_decoder, in_chat)
    bf16 = config.sft.bf16 and bf16_capable(first.device)

    started = time.perf_counter()
    loss = loss_of(tuned, inputs, labels, bf16)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    _wait_for(first)
    return time.perf_counter() - started


def _no_reward(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
    return torch.zeros(len(responses))


def _wait_for(tensor: torch.Tensor) -> None:
    """Wait until the device has computed a tensor: a GPU returns before that."""
    tensor.flatten()[0].item()
