"""How long does a step of detoxrl on a causal model take, with and without groups? A worker that group_speed.py starts.

    python benchmarks/speed/group_worker.py --make FOLDER SIZE     write the model of all contestants instead

The model has random weights and the exact shapes of SmolLM2-135M. Scores are random, so a step is generation, the
reference's log-probs and the update.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.data.rows import Row
from detoxrl.models.loading import save_base
from detoxrl.models.types import Prompt
from detoxrl.rewards.terms import single_term
from detoxrl.runs import Run
from detoxrl.runtime.allocator import keep_freed_memory
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.training.learner import Learner
from detoxrl.training.memory import MemoryPlan
from group_case import KL_COEF, LEARNING_RATE, LORA, GroupTask, group_task
from recipe_memory import KNOWN
from step_case import STEPS, Step, serve, texts
from step_worker import make_step

SHAPES: dict[str, dict[str, int]] = {
    "smollm2-135m": {
        "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    },
    "tiny": {
        "vocab_size": 256, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 3, "num_key_value_heads": 1, "max_position_embeddings": 256,
    },
}  # fmt: skip


def make_model(folder: Path, size: str) -> None:
    """Write a Llama of a size with random weights, and a tokenizer in which every word is one token."""
    shape = SHAPES[size]
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(KNOWN.split())]
    words += [f"w{number}" for number in range(len(words), shape["vocab_size"])]
    ids = {word: number for number, word in enumerate(words)}
    word_level = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}

    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **ends, **shape))
    save_base(model, PreTrainedTokenizerFast(tokenizer_object=word_level, **special), folder)


def settings(given: GroupTask) -> Config:
    """Return the settings of the task, without a KL limit."""
    step = given.step
    changes = {
        "policy.base": given.models,
        "policy.lora_rank": LORA["r"],
        "policy.lora_alpha": LORA["alpha"],
        "policy.lora_targets": LORA["targets"],
        "generation.max_new_tokens": step.response,
        "generation.batch_size": step.batch,
        "data.limit": step.prompts,
        "rl.algorithm": given.algorithm,
        "rl.group_size": given.group_size,
        "rl.kl_coef": KL_COEF,
        "rl.lr": LEARNING_RATE,
        "rl.batch_size": step.batch,
        "rl.minibatch_size": step.minibatch,
        "rl.microbatch_size": given.microbatch,
        "rl.epochs": step.epochs,
        "rl.steps": STEPS,
        "rl.update_kl_limit": None,
    }
    return recipe("realtoxicity", changes)


def random_scores(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
    """Return a random score (B,) for each response."""
    return torch.rand(len(responses))


def make_learner(given: GroupTask) -> Learner:
    """Return a learner whose responses never end early, and whose prompts all have the full length."""
    run = Run(RunFolder(Path(given.models)), settings(given))
    placeholder = Row(id="0", text="", prompt="")
    run.use_rows({"train": [placeholder], "validation": [placeholder]})
    learner = Learner(run, reward=single_term(random_scores))
    policy = learner.policy
    policy.eos_token_ids = [-1]  # No token ends a response.
    learner.memory = MemoryPlan(microbatch_size=given.microbatch, keep_cross=True)

    step = given.step
    words = texts(
        policy.tokenizer.get_vocab(), step.prompt + 1, step.prompts
    )  # `texts` counts an EOS, which is not here.
    learner.prompts = [Prompt(id=str(number), text=text) for number, text in enumerate(words)]
    return learner


def stepper(given: GroupTask) -> Callable[[int, Step], dict[str, Any]]:
    """Load the model and return a function that makes one step with it."""
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # As at the start of every stage of a run.
    learner = make_learner(given)

    def run(number: int, step: Step) -> dict[str, Any]:
        assert step == given.step, "the learner was made for the shapes of the task"
        measured, rollout = make_step(learner, number)
        assert rollout.responses.response_mask.sum(1).tolist() == [step.response] * step.batch
        assert rollout.encoded.mask.sum(1).tolist() == [step.prompt] * (step.batch // given.group_size)
        rollout_seconds = measured["seconds/sample"] + measured["seconds/score"]
        stages = {"rollout": rollout_seconds, "update": measured["seconds/update"]}
        return {"seconds": measured["seconds/step"], "stages": stages}

    return run


def main() -> None:
    if sys.argv[1] == "--make":
        make_model(Path(sys.argv[2]), sys.argv[3])
        return
    given = group_task(sys.argv[1:])
    serve(given.step, stepper(given))


if __name__ == "__main__":
    main()
