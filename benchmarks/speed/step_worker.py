"""How long does the shipped step of detoxrl take? A worker of benchmarks/step_speed.py, which starts it.

It loads models as a run does, and steps as `detoxrl.train.train` does: a batch of the shuffled prompts, then `ppo_step`
under a `Watch`, whose laps are the stages. The lap of sampling is parted where the policy's methods begin and end:
`encode`, `sample`, and `log-probs`, which is what whole responses are read for without a gradient (the reference, and
with a base in bf16 the policy again). With `--make FOLDER SIZE` it writes the models of all contestants instead.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import RobertaConfig, RobertaForSequenceClassification, T5Config, T5ForConditionalGeneration

from detoxrl.config.recipes import recipe
from detoxrl.config.schema import Config
from detoxrl.models.loading import save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.types import Prompt
from detoxrl.rewards.shaping import Normaliser
from detoxrl.runs import scorer
from detoxrl.runtime.randomness import batch_indices
from detoxrl.training.memory import MemoryPlan, keep_freed_memory
from detoxrl.training.metrics import Watch
from detoxrl.training.train import ppo_step
from recipe_memory import SHAPES, tokenizer
from step_case import STEPS, Step, Task, serve, task, texts

TINY_T5 = {"d_model": 64, "d_ff": 128, "num_layers": 2, "num_heads": 2}
TINY_ROBERTA = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


def make_models(folder: Path, size: str) -> None:
    """Write a FLAN-T5 of a size and a RoBERTa-base classifier, of random weights; `tiny` is for trying things out."""
    policy, reward = (TINY_T5, TINY_ROBERTA) if size == "tiny" else (SHAPES[size], {})
    words = tokenizer()
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=32128, d_kv=64, feed_forward_proj="gated-gelu", tie_word_embeddings=False,
                  decoder_start_token_id=0, pad_token_id=0, eos_token_id=1, **policy)  # fmt: skip
    model = T5ForConditionalGeneration(t5)
    # A fresh T5's head is tied to its embeddings, FLAN-T5's is not; and as it is made, logits are so large that every
    # response would be one token again and again.
    model.lm_head.weight = torch.nn.Parameter(0.02 * model.lm_head.weight.detach())
    save_base(model, words, folder / "policy")
    labels = dict(enumerate(("nothate", "hate")))
    roberta = RobertaConfig(max_position_embeddings=514, type_vocab_size=1, id2label=labels,
                            label2id={label: i for i, label in labels.items()}, **reward)  # fmt: skip
    torch.manual_seed(0)  # one classifier beside every policy: a random label may come out reversed, which is refused
    RobertaForSequenceClassification(roberta).save_pretrained(folder / "reward")
    words.save_pretrained(folder / "reward")


class Parts:
    """Seconds inside some of the policy's methods, and how many prompts it encoded."""

    def __init__(self, policy: Policy) -> None:
        self.seconds: dict[str, float] = {}
        self.encoded = 0
        for name in ("encode", "sample"):
            setattr(policy, name, self._timed(name, getattr(policy, name)))

    def _timed(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(first: Any, *rest: Any, **named: Any) -> Any:
            started = time.perf_counter()
            found = method(first, *rest, **named)
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
            self.encoded += len(first) if name == "encode" else 0
            return found

        return timed

    def stages(self, laps: dict[str, float]) -> dict[str, float]:
        """Return the laps of a step by stage, the one of sampling in its parts."""
        found = {name.removeprefix("seconds/"): seconds for name, seconds in laps.items()}
        rest = found["sample"] - sum(self.seconds.values())
        return self.seconds | {"log-probs": rest, "score": found["score"], "update": found["update"]}


def settings(given: Task, step: Step) -> Config:
    """Return the recipe with the shapes of a step; every epoch is made."""
    changes = {
        "policy.base": f"{given.models}/policy", "policy.bf16": given.dtype == "bf16", "policy.lora_rank": 32,
        "policy.lora_targets": ("q", "v"), "reward.classifier": f"{given.models}/reward",
        "reward.bf16": given.dtype == "bf16",
        "generation.max_new_tokens": step.response, "data.limit": max(step.prompts, step.batch),
        "rl.batch_size": step.batch, "rl.minibatch_size": step.minibatch, "rl.microbatch_size": step.minibatch,
        "rl.epochs": step.epochs, "rl.steps": STEPS, "rl.update_kl_limit": None,
    }  # fmt: skip
    return recipe("dialogsum", changes)


def stepper(given: Task) -> Callable[[int, Step], dict[str, Any]]:
    """Load the models and return what makes one step with them."""
    torch.set_num_threads(given.threads)
    keep_freed_memory()  # as every stage of a run begins
    config = settings(given, given.step)
    accelerator, rl = Accelerator(), config.rl
    policy = load_policy(config.policy.base, None, config.policy, config.seed).to(accelerator.device)
    policy.ends = [-1]  # no token ends a response, so all have their full length
    learning = (policy.parameters(), rl.lr), (list(policy.value_head.parameters()), rl.value_lr)
    groups = [{"params": weights, "lr": peak} for weights, peak in learning]
    optimizer = accelerator.prepare(torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0))
    found = scorer(config, None, None)
    assert found is not None
    reward, vocabulary, parts = found.reward, policy.tokenizer.get_vocab(), Parts(policy)

    parameters = sum(weight.numel() for name, weight in policy.model.named_parameters() if "lora_" not in name)

    room = MemoryPlan(microbatch_size=given.step.minibatch, keep_cross=True)  # what a run chooses where memory is free

    @lru_cache(maxsize=8)
    def data(tokens: int, count: int) -> list[Prompt]:
        return [Prompt(id=str(i), text=text) for i, text in enumerate(texts(vocabulary, tokens, count))]

    def run(i: int, step: Step) -> dict[str, Any]:
        prompts, config = data(step.prompt, step.prompts), settings(given, step)
        parts.seconds, parts.encoded = {}, 0
        watch = Watch()
        batch = [prompts[row] for row in batch_indices(config.seed, "prompts", i, step.batch, len(prompts))]
        rollout, _, _ = ppo_step(
            policy, accelerator, optimizer, reward, Normaliser(), batch, config, i, config.rl.kl_coef, watch, room
        )
        seconds = time.perf_counter() - watch.started
        assert rollout.responses.response_mask.sum(1).tolist() == [step.response] * step.batch
        assert rollout.encoded.mask.sum(1).tolist() == [step.prompt] * step.batch
        stages = parts.stages(watch.laps)
        return {"seconds": seconds, "stages": stages, "encoded": parts.encoded / step.batch, "parameters": parameters}

    return run


def main() -> None:
    if sys.argv[1] == "--make":
        make_models(Path(sys.argv[2]), sys.argv[3])
        return
    given = task(sys.argv[1:])
    serve(given.step, stepper(given))


if __name__ == "__main__":
    main()
