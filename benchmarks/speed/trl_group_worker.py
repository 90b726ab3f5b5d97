"""How long does a step of trl 1.16's GRPOTrainer take on the same case? A worker that group_speed.py starts.

It runs in the environment of benchmarks/oracle/trl_group-requirements.txt. The trainer's own `train` makes the steps;
a callback waits for a request before each, and measures from there to the end of the optimizer step. The settings are
trl's defaults, but for the KL to the reference, activations that are kept instead of recomputed, and EOS suppressed.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from group_case import KL_COEF, LEARNING_RATE, LORA, GroupTask, group_task
from step_case import STEPS, Requests, texts


class Steps(TrainerCallback):
    """Lets the trainer make a step for each request, and answers with what it took."""

    def __init__(self, given: GroupTask) -> None:
        self.step = given.step
        self.requests = Requests(given.step)
        self.trainer: GRPOTrainer | None = None
        self.started = 0.0
        self.rollout_seconds = 0.0
        self.tokens = 0

    def attach(self, trainer: GRPOTrainer) -> None:
        """Measure the trainer's rollouts: generation, the reference's log-probs and the reward."""
        self.trainer = trainer
        make_rollout = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            started = time.perf_counter()
            batch = make_rollout(inputs)
            self.rollout_seconds = time.perf_counter() - started
            assert batch["completion_mask"].sum(1).tolist() == [self.step.response] * self.step.batch
            assert batch["prompt_mask"].sum(1).tolist() == [self.step.prompt] * self.step.batch
            return batch

        trainer._generate_and_score_completions = timed

    def on_step_begin(self, _: Any, __: Any, control: Any, **___: Any) -> None:
        """Wait for a request; without one, end the process, whose work is done."""
        requested = self.requests.next()
        if requested is None:
            sys.exit()
        assert requested[1] == self.step, "the trainer supports only the shapes it was created with"
        self.started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """Answer the request."""
        seconds = time.perf_counter() - self.started
        stages = {"rollout": self.rollout_seconds, "update": seconds - self.rollout_seconds}
        self.requests.answer({"seconds": seconds, "stages": stages})


def make_trainer(given: GroupTask, steps: Steps) -> GRPOTrainer:
    """Return a trainer with a LoRA on the model of the task."""
    step = given.step
    tokenizer = AutoTokenizer.from_pretrained(given.models)
    prompts = texts(tokenizer.get_vocab(), step.prompt + 1, step.prompts)  # `texts` counts an EOS, which is not here.
    config = GRPOConfig(
        output_dir=str(Path(given.models) / "trl"),
        use_cpu=True,
        bf16=False,
        learning_rate=LEARNING_RATE,
        beta=KL_COEF,
        num_generations=given.group_size,
        per_device_train_batch_size=given.microbatch,
        gradient_accumulation_steps=step.minibatch // given.microbatch,
        max_completion_length=step.response,
        generation_kwargs={"min_new_tokens": step.response},
        gradient_checkpointing=False,
        max_steps=STEPS,
        logging_strategy="no",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    lora = LoraConfig(
        r=LORA["r"], lora_alpha=LORA["alpha"], target_modules=list(LORA["targets"]), task_type="CAUSAL_LM"
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(given.models, dtype=torch.float32),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [random.random() for _ in completions],
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        peft_config=lora,
        callbacks=[steps],
    )
    steps.attach(trainer)
    return trainer


def main() -> None:
    given = group_task(sys.argv[1:])
    assert given.algorithm == "grpo"
    torch.set_num_threads(given.threads)
    make_trainer(given, Steps(given)).train()


if __name__ == "__main__":
    main()
