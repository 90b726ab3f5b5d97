"""How long does a step of trl 0.11.4's PPOTrainer take on the same case? A worker that step_speed.py starts.

It runs in the environment of benchmarks/oracle/trl-requirements.txt. The policy is trl's seq2seq model with a value
head and peft's LoRA on every q and v; the reference is a deep copy; the reward is computed in one batch under no_grad.
Everything else is trl's default. `per-prompt` samples in a loop over prompts, as course notebooks do; `batched` passes
`generate` a list. Tokenization is not timed, which favours trl.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from peft import LoraConfig, TaskType, get_peft_model
from transformers import PreTrainedTokenizerFast, RobertaForSequenceClassification, T5ForConditionalGeneration
from transformers.utils import logging
from trl import AutoModelForSeq2SeqLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model

from step_case import Step, Task, serve, task, texts


def stepper(given: Task) -> Callable[[int, Step], dict[str, Any]]:
    """Load the models and return a function that makes one step with them."""
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[given.dtype]
    base = T5ForConditionalGeneration.from_pretrained(f"{given.models}/policy", torch_dtype=dtype)
    reward = RobertaForSequenceClassification.from_pretrained(f"{given.models}/reward", torch_dtype=dtype).eval()
    lora = LoraConfig(
        r=32, lora_alpha=32, lora_dropout=0.05, target_modules=["q", "v"], task_type=TaskType.SEQ_2_SEQ_LM
    )
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(get_peft_model(base, lora), torch_dtype=dtype)
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{given.models}/policy/tokenizer.json", **special)
    trained_step = given.step
    config = PPOConfig(
        learning_rate=1.41e-5,
        ppo_epochs=trained_step.epochs,
        batch_size=trained_step.batch,
        mini_batch_size=trained_step.minibatch,
        accelerator_kwargs={"cpu": True},
    )
    trainer = PPOTrainer(config=config, model=model, ref_model=create_reference_model(model), tokenizer=tokenizer)
    length = {"min_new_tokens": trained_step.response, "max_new_tokens": trained_step.response}
    sampling: dict[str, Any] = {**length, "do_sample": True, "top_k": 0, "top_p": 1.0}

    prompt_texts = texts(tokenizer.get_vocab(), trained_step.prompt, trained_step.prompts)
    prompts = [torch.tensor(tokenizer(text).input_ids) for text in prompt_texts]

    def run(i: int, step: Step) -> dict[str, Any]:
        assert step == trained_step, "the trainer supports only the shapes it was created with"
        queries = [prompts[row % len(prompts)] for row in range(i * step.batch, (i + 1) * step.batch)]
        assert all(len(query) == step.prompt for query in queries)
        laps = [time.perf_counter()]
        if given.generate == "per-prompt":
            responses = [trainer.generate(query, **sampling).squeeze() for query in queries]
        else:
            responses = trainer.generate(queries, batch_size=step.batch, remove_padding=False, **sampling)
        laps.append(time.perf_counter())
        assert all(len(response) == step.response + 1 for response in responses)
        with torch.no_grad():
            end = torch.tensor([tokenizer.eos_token_id])
            read = torch.stack([torch.cat([response[1:], end]) for response in responses])
            logits = reward(input_ids=read, attention_mask=torch.ones_like(read)).logits.float()
        laps.append(time.perf_counter())
        statistics = trainer.step(queries, responses, list(logits[:, 0]))
        laps.append(time.perf_counter())
        sample, score, rest = (after - before for before, after in pairwise(laps))
        passes = float(statistics["time/ppo/forward_pass"])
        stages = {"sample": sample, "score": score, "log-probs": passes, "update": rest - passes}
        return {"seconds": laps[-1] - laps[0], "stages": stages}

    return run


def main() -> None:
    requested = task(sys.argv[1:])
    serve(requested.step, stepper(requested))


if __name__ == "__main__":
    main()
