"""How long does a step of detoxrl take? A worker that step_speed.py starts.

It makes a step as `detoxrl.training.train` does: a Learner samples responses to a batch of the shuffled prompts, scores
them and updates the policy, and a StepTimer measures these stages. Sampling is split further by timing the policy's
methods `encode` and `sample`; the rest is `log-probs`, which reads whole responses without a gradient (for the
reference, and with a base in bf16 also for the policy).

    python benchmarks/speed/step_worker.py --make FOLDER SIZE     write the models of all contestants instead
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.data.rows import Row
from detoxrl.models.policy import Policy
from detoxrl.models.types import Prompt, Rollout
from detoxrl.rewards.shaping import Normaliser, shape_scores
from detoxrl.rl.advantages import token_rewards
from detoxrl.runs import Run
from detoxrl.runtime.allocator import keep_freed_memory
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.learner import Learner
from detoxrl.training.memory import MemoryPlan
from detoxrl.training.metrics import StepTimer
from detoxrl.training.prompt_choice import PromptChoice
from recipe_memory import SHAPES, save_classifier, save_t5
from step_case import STEPS, Step, Task, serve, task, texts

TINY_T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2}
TINY_ROBERTA = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def make_models(folder: Path, size: str) -> None:
    """Write a FLAN-T5 of a size and a RoBERTa-base classifier with random weights; `tiny` is for tests."""
    is_tiny = size == "tiny"
    save_t5(folder / "policy", TINY_T5 if is_tiny else SHAPES[size])
    save_classifier(folder / "reward", ("nothate", "hate"), TINY_ROBERTA if is_tiny else {})


class PolicyTimer:
    """Measures the seconds spent in the policy's methods `encode` and `sample`, and counts encoded prompts."""

    def __init__(self, policy: Policy) -> None:
        self.seconds: dict[str, float] = {}
        self.encoded = 0
        for name in ("encode", "sample"):
            setattr(policy, name, self._timed(name, getattr(policy, name)))

    def reset(self) -> None:
        """Begin a new step."""
        self.seconds = {}
        self.encoded = 0

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(first: Any, *arguments: Any, **keywords: Any) -> Any:
            started = time.perf_counter()
            result = method(first, *arguments, **keywords)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            if name == "encode":
                self.encoded += len(first)
            return result

        return timed

    def stages(self, measured: dict[str, float]) -> dict[str, float]:
        """Return the seconds of a step by stage, with sampling split; `measured` is what StepTimer returns."""
        rest = measured["seconds/sample"] - sum(self.seconds.values())
        return {
            **self.seconds,
            "log-probs": rest,
            "score": measured["seconds/score"],
            "update": measured["seconds/update"],
        }


def settings(given: Task, step: Step) -> Config:
    """Return the recipe with the shapes of a step and without a KL limit, so that every epoch runs."""
    changes = {
        "policy.base": f"{given.models}/policy",
        "policy.bf16": given.dtype == "bf16",
        "policy.lora_rank": 32,
        "policy.lora_targets": ("q", "v"),
        "reward.classifier": f"{given.models}/reward",
        "reward.bf16": given.dtype == "bf16",
        "generation.max_new_tokens": step.response,
        "data.limit": max(step.prompts, step.batch),
        "rl.batch_size": step.batch,
        "rl.minibatch_size": step.minibatch,
        "rl.microbatch_size": step.minibatch,
        "rl.epochs": step.epochs,
        "rl.steps": STEPS,
        "rl.update_kl_limit": None,
    }
    return recipe("dialogsum", changes)


def make_learner(given: Task) -> Learner:
    """Return a learner with the models of the task, whose responses never end early."""
    run = Run(RunFolder(Path(given.models)), settings(given, given.step))
    placeholder = Row(id="0", text="", prompt="")  # Each step sets its own prompts.
    run.use_rows({"train": [placeholder], "validation": [placeholder]})
    learner = Learner(run)
    learner.policy.eos_token_ids = [-1]  # No token ends a response, so all have the full length.
    # What a run chooses if memory is free.
    learner.memory = MemoryPlan(microbatch_size=given.step.minibatch, keep_cross=True)
    return learner


def make_step(learner: Learner, number: int) -> tuple[dict[str, float], Rollout]:
    """Make a step as training does; return what StepTimer measured, and the rollout."""
    timer = StepTimer()
    with timer.stage("sample"):
        indices = PromptChoice(learner.config, learner.prompts).indices(number)
        rollout = learner.sample(indices, number)
    responses = rollout.responses
    mask = responses.response_mask

    with timer.stage("score"):
        raw = learner.score(rollout)
        scores = shape_scores(
            raw, rollout.texts, responses.ended, Normaliser.identity(learner.reward.terms), learner.config
        )

    with timer.stage("update"):
        rl = learner.config.rl
        in_reward, in_loss = (rl.kl_coef, 0.0) if rl.kl_place == "reward" else (0.0, rl.kl_coef)
        rewards = token_rewards(scores, responses.logprobs, rollout.ref_logprobs, mask, in_reward)
        targets = learner.algorithm.targets(rewards, responses.values, mask, rl)
        learner.update(replace(targets, kl_coef=in_loss), number)

    return timer.metrics(int(mask.sum())), rollout


def stepper(given: Task) -> Callable[[int, Step], dict[str, Any]]:
    """Load the models and return a function that makes one step with them."""
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # As at the start of every stage of a run.
    learner = make_learner(given)
    policy = learner.policy
    vocabulary = policy.tokenizer.get_vocab()
    timer = PolicyTimer(policy)
    parameters = sum(weight.numel() for name, weight in policy.model.named_parameters() if "lora_" not in name)

    @lru_cache(maxsize=8)
    def data(tokens: int, count: int) -> list[Prompt]:
        return [Prompt(id=str(i), text=text) for i, text in enumerate(texts(vocabulary, tokens, count))]

    def run(i: int, step: Step) -> dict[str, Any]:
        learner.config = settings(given, step)
        learner.prompts = data(step.prompt, step.prompts)
        timer.reset()
        measured, rollout = make_step(learner, i)

        assert rollout.responses.response_mask.sum(1).tolist() == [step.response] * step.batch
        assert rollout.encoded.mask.sum(1).tolist() == [step.prompt] * step.batch
        return {
            "seconds": measured["seconds/step"],
            "stages": timer.stages(measured),
            "encoded": timer.encoded / step.batch,
            "parameters": parameters,
        }

    return run


def main() -> None:
    if sys.argv[1] == "--make":
        make_models(Path(sys.argv[2]), sys.argv[3])
        return
    requested = task(sys.argv[1:])
    serve(requested.step, stepper(requested))


if __name__ == "__main__":
    main()
