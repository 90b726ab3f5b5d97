"""What does trl 0.11.4 compute for one small fixed case? Writes the numbers for tests/rl/test_oracle.py.

This was the last version of trl whose PPO supports encoder-decoders. It needs its own environment:

python -m venv trl-env && trl-env/bin/pip install torch==2.13.0
trl-env/bin/pip install -r benchmarks/oracle/trl-requirements.txt
trl-env/bin/python benchmarks/oracle/trl_oracle.py tests/rl/oracle/trl_0_11_4.json

`build` creates the case without trl, and the tests use it too. The rest of the file calls trl's own methods.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import peft
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file

VOCABULARY = ["<pad>", "</s>", "<unk>", *(f"w{i}" for i in range(3, 39)), "kind"]
T5 = {
    "model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 40, "d_model": 32, "d_kv": 8,
    "d_ff": 64, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "feed_forward_proj": "gated-gelu",
    "relative_attention_num_buckets": 8, "relative_attention_max_distance": 16, "dropout_rate": 0.1,
    "tie_word_embeddings": False, "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
GPT2 = {
    "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 40, "n_embd": 32, "n_layer": 2,
    "n_head": 4, "n_positions": 64, "resid_pdrop": 0.1, "embd_pdrop": 0.1, "attn_pdrop": 0.1, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 1,
}  # fmt: skip
FAMILIES = ("t5", "gpt2")
STEPS = ("start", "rollout", "updated")
"""Three adapters of one policy: the initial one (its reference), the one that sampled, and one after an update."""

PROMPTS = ["w3 w4 w5", "w6 w7 w8 w9 w10 w11 w12", "kind w13", "w14 w15 w16 w17 w18", "w19", "w20 w21 w22 w23 kind w24"]
RESPONSES = {
    "t5": [
        [25, 22], [3, 9, 1], [22, 25, 39, 22, 22, 25, 22, 39], [3, 37, 19, 3, 1], [22, 2, 22, 29, 13, 1], [12, 25, 0],
    ],
    "gpt2": [
        [1], [12, 12, 1], [25, 25, 25, 36, 13, 21, 25, 25], [25, 25, 15, 34, 1], [12, 15, 0, 24, 0, 1], [2, 25, 0],
    ],
}  # fmt: skip
"""Sampled once from the initial policy. Some end with EOS (1), some are cut; some contain the pad token (0)."""
SCORES = [1.5, -0.75, 0.25, 2.0, -1.25, 0.5]
SETTINGS = {"kl_coef": 0.2, "gamma": 0.99, "lam": 0.95, "clip": 0.2, "value_clip": 0.2, "value_coef": 0.1}
CONTROLLER: dict[str, Any] = {"kls": [0.0, 6.3, 100.0], "target": 6.0, "horizon": 1000, "batch_size": 100}
"""KLs in nats per response, given to an adaptive KL coefficient one after the other, and its settings."""

Rows = list[list[float]]
"""One list per response with one number per token."""


@dataclass(frozen=True)
class Case:
    """A base model, three adapters and sampled responses; the same on every machine and in both environments."""

    family: str
    folder: Path
    responses: list[list[int]]
    values: Rows
    new_values: Rows

    @property
    def base(self) -> Path:
        """Folder of base model and tokenizer."""
        return self.folder / "base"

    def adapter(self, step: str) -> Path:
        """Folder of the LoRA at one of STEPS."""
        return self.folder / step

    def fingerprint(self) -> str:
        """Return a hash of all weights; the recorded numbers are valid only for this hash."""
        digest = hashlib.sha256()
        files = [self.base / "model.safetensors"]
        files += [self.adapter(step) / "adapter_model.safetensors" for step in STEPS]
        for file in files:
            for name, tensor in sorted(load_file(file).items()):
                digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()


def build(family: str, folder: Path) -> Case:
    """Write base, tokenizer and adapters of a tiny T5 or GPT-2 below `folder`; return them with the samples."""
    responses = RESPONSES[family]
    draw = np.random.RandomState(127)
    values = [np.round(draw.standard_normal(len(ids)), 3) for ids in responses]
    moves = [np.round(0.3 * draw.standard_normal(len(ids)), 3) for ids in responses]
    new_values = [np.round(value + move, 3).tolist() for value, move in zip(values, moves, strict=True)]
    case = Case(family, folder, responses, [value.tolist() for value in values], new_values)
    _write_base(case)
    _write_tokenizer(case)
    _write_adapters(case)
    return case


def _normal(draw: np.random.RandomState, shape: torch.Size, scale: float) -> torch.Tensor:
    # Rounded, so that the last bits do not depend on the platform.
    return torch.from_numpy(np.round(scale * draw.standard_normal(tuple(shape)), 4)).float()


def _model_class(family: str) -> Any:
    return transformers.T5ForConditionalGeneration if family == "t5" else transformers.GPT2LMHeadModel


def _write_base(case: Case) -> None:
    settings = T5 if case.family == "t5" else GPT2
    case.base.mkdir(parents=True)
    (case.base / "config.json").write_text(json.dumps(settings), encoding="utf-8")
    model = _model_class(case.family)(transformers.AutoConfig.from_pretrained(case.base))
    tied = ("embed_tokens.weight",) if case.family == "t5" else ("lm_head.weight",)
    draw = np.random.RandomState(1)
    weights = {}
    for name, tensor in sorted(model.state_dict().items()):
        norm = "layer_norm.weight" in name or (".ln_" in name and name.endswith("weight"))
        wide = name.endswith(("shared.weight", "lm_head.weight", "wte.weight", "wpe.weight"))
        if not name.endswith(tied):
            weights[name] = _normal(draw, tensor.shape, 0.3 if wide else 0.1) + (1.0 if norm else 0.0)
    save_file(weights, case.base / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(case: Case) -> None:
    ids = {word: i for i, word in enumerate(VOCABULARY)}
    word_level = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<unk>"))
    word_level.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if case.family == "t5":
        end = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
        word_level.post_processor = end
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=word_level, **special).save_pretrained(case.base)


def _write_adapters(case: Case) -> None:
    t5 = case.family == "t5"
    config = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        lora_dropout=0.05,
        target_modules=r".*decoder\..*\.(q|v)" if t5 else r".*\.c_attn",
        fan_in_fan_out=not t5,
        task_type="SEQ_2_SEQ_LM" if t5 else "CAUSAL_LM",
    )
    model = peft.get_peft_model(_model_class(case.family).from_pretrained(case.base), config)
    lora = sorted((name, weight) for name, weight in model.named_parameters() if "lora_" in name)
    for seed, step in enumerate(STEPS, start=2):
        draw = np.random.RandomState(seed)
        for _, weight in lora:
            if step == "start":
                weight.data = _normal(draw, weight.shape, 0.25)
            else:
                weight.data = weight.data + _normal(draw, weight.shape, 0.03)
        model.save_pretrained(str(case.adapter(step)))


# trl


class Oracle:
    """trl's PPOTrainer with the policy at one of STEPS, and the case arranged as its `step` does."""

    def __init__(
        self, case: Case, step: str, *, reference: Any = None, lr: float = 0.0, side: str = "right", **settings: Any
    ) -> None:
        import trl

        torch.manual_seed(0)  # trl's value head has random weights
        t5, rows = case.family == "t5", len(PROMPTS)
        base = _model_class(case.family).from_pretrained(case.base)
        lora = peft.PeftModel.from_pretrained(base, str(case.adapter(step)), is_trainable=True)
        with_head = trl.AutoModelForSeq2SeqLMWithValueHead if t5 else trl.AutoModelForCausalLMWithValueHead
        self.model = with_head.from_pretrained(lora)
        chosen = {
            "init_kl_coef": SETTINGS["kl_coef"], "gamma": SETTINGS["gamma"], "lam": SETTINGS["lam"],
            "cliprange": SETTINGS["clip"], "cliprange_value": SETTINGS["value_clip"], "vf_coef": SETTINGS["value_coef"],
            "mini_batch_size": rows, "ppo_epochs": 1, "accelerator_kwargs": {"cpu": True},
        }  # fmt: skip
        config = trl.PPOConfig(batch_size=rows, **(chosen | settings))
        tokenizer = transformers.AutoTokenizer.from_pretrained(case.base, padding_side=side)
        self.sgd = torch.optim.SGD([weight for weight in self.model.parameters() if weight.requires_grad], lr=lr)
        self.trainer = trl.PPOTrainer(config, self.model, reference, tokenizer, optimizer=self.sgd)
        self.queries = [torch.tensor(tokenizer(prompt).input_ids) for prompt in PROMPTS]
        # T5's output begins with its start token, and trl expects it.
        self.responses = [torch.tensor([0, *ids] if t5 else ids) for ids in case.responses]
        self.inputs = self.trainer.prepare_model_inputs(self.queries, self.responses)
        self.lengths = [len(ids) for ids in case.responses]
        # Where each response begins in trl's (B, L), whose column 0 predicts the second token of the whole row.
        self.starts = [0] * rows
        if not t5:
            padding = (self.inputs["attention_mask"] == 0).sum(1).tolist() if side == "left" else [0] * rows
            self.starts = [pad + len(query) - 1 for pad, query in zip(padding, self.queries, strict=True)]

    def forward(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probs (B, L), logits (B, L, V) and trl's mask (B, L)."""
        logprobs, logits, _, mask = self.trainer.batched_forward_pass(
            self.trainer.model, self.queries, self.responses, self.inputs, return_logits=True
        )
        return logprobs, logits, mask

    @torch.no_grad()
    def logprobs(self) -> Rows:
        """Return the log-probs of the responses."""
        return self.rows(self.forward()[0])

    @torch.no_grad()
    def bare_logprobs(self) -> Rows:
        """Return what trl uses as the reference's log-probs if the policy has an adapter."""
        with self.trainer.optional_peft_ctx():
            return self.logprobs()

    @torch.no_grad()
    def logprobs_at(self, temperature: float) -> Rows:
        """Return the log-probs of the distribution that tokens are sampled from at a temperature."""
        from trl.core import logprobs_from_logits

        return self.rows(logprobs_from_logits(self.forward()[1] / temperature, self._labels()))

    @torch.no_grad()
    def logprobs_in_train_mode(self) -> Rows:
        """Return the log-probs of the responses in train mode, in which trl samples after its first step."""
        from trl.core import logprobs_from_logits

        self.model.train()
        torch.manual_seed(0)
        logits = self.model(**self.inputs)[0][:, :-1]
        return self.rows(logprobs_from_logits(logits, self._labels()))

    def step(self) -> dict[str, Any]:
        """Run trl's whole `step` and return its statistics."""
        stats: dict[str, Any] = self.trainer.step(self.queries, self.responses, list(torch.tensor(SCORES)))
        return stats

    def lora(self) -> dict[str, torch.nn.Parameter]:
        """Return the adapter's weights."""
        return {name: weight for name, weight in self.model.pretrained_model.named_parameters() if "lora_" in name}

    def rows(self, tensor: torch.Tensor) -> Rows:
        """Return the values of a (B, L) tensor at the tokens of the responses."""
        cut = zip(tensor, self.starts, self.lengths, strict=True)
        return [row[start : start + length].tolist() for row, start, length in cut]

    def laid(self, rows: Rows) -> torch.Tensor:
        """Return a (B, L) tensor with the numbers at the tokens of the responses and 0 elsewhere."""
        tensor = torch.zeros(self._labels().shape)
        for i, (row, start, length) in enumerate(zip(rows, self.starts, self.lengths, strict=True)):
            tensor[i, start : start + length] = torch.tensor(row)
        return tensor

    def _labels(self) -> torch.Tensor:
        return self.inputs["decoder_input_ids" if "decoder_input_ids" in self.inputs else "input_ids"][:, 1:]


def update(case: Case, oracle: Oracle, mask: torch.Tensor, logprobs: Rows, ref_logprobs: Rows) -> dict[str, Any]:
    """Return trl's rewards and advantages of a rollout under a mask, and its losses for the updated policy `oracle`."""
    trainer = oracle.trainer
    old = oracle.laid(logprobs)
    values = oracle.laid(case.values)
    rewards, _, _ = trainer.compute_rewards(torch.tensor(SCORES), old, oracle.laid(ref_logprobs), mask)
    values, advantages, returns = trainer.compute_advantages(values, rewards, mask)
    new_values = oracle.laid(case.new_values).requires_grad_()
    new_logprobs, logits, _ = oracle.forward()
    policy_loss, value_loss, stats = trainer.loss(
        old, values, logits, new_values, new_logprobs, mask, advantages, returns
    )
    (policy_loss + value_loss).backward()
    return {
        "rewards": oracle.rows(rewards),
        "raw_advantages": oracle.rows(returns - values),
        "returns": oracle.rows(returns),
        "advantages": oracle.rows(advantages),
        "policy_loss": policy_loss.item(),
        "value_loss": value_loss.item(),
        "clip_fraction": stats["policy/clipfrac"].item(),
        "entropy": stats["policy/entropy"].item(),
        "k1": stats["policy/policykl"].item(),
        "value_gradient": oracle.rows(new_values.grad),
        "gradient": {name: weight.grad.flatten().tolist() for name, weight in oracle.lora().items()},
    }


def figures(case: Case) -> dict[str, Any]:
    """Return all numbers to compare."""
    start = Oracle(case, "start")
    rollout = Oracle(case, "rollout")
    logprobs = rollout.logprobs()
    ref_logprobs = start.logprobs()
    _, _, mask = rollout.forward()

    every = rollout.laid([[1.0] * length for length in rollout.lengths]).long()
    masks = {"every_token": every}
    if case.family == "t5":
        masks["without_first"] = mask
    else:
        assert torch.equal(mask, every)

    updates = {}
    for name, counted in masks.items():
        updates[name] = update(case, Oracle(case, "updated"), counted, logprobs, ref_logprobs)
    return {
        "fingerprint": case.fingerprint(),
        "values": case.values,
        "new_values": case.new_values,
        "logprobs": {step: Oracle(case, step).logprobs() for step in STEPS},
        "bare_logprobs": start.bare_logprobs(),
        "logprobs_at_0.7": rollout.logprobs_at(0.7),
        "trl_mask": rollout.rows(mask),
        **updates,
    }


# Errors of trl


def faults(case: Case, numbers: dict[str, Any]) -> dict[str, Any]:
    """Return the size of trl's errors, in nats unless the name says otherwise."""
    rollout = Oracle(case, "rollout")
    measured = {
        "kl_at_step_0": _kl_at_step_0(case),
        "dropout": distance(_after_a_step(case).logprobs_in_train_mode(), rollout.logprobs()),
        "temperature_0.7": distance(rollout.logprobs_at(0.7), rollout.logprobs()),
        "mean_of_means": relative(_weight_change(case, 2), _weight_change(case, len(PROMPTS))),
        "gradient_norms_clipped_to_0.01": _clipped_norms(case),
        "whitened_std": _whitened_std(numbers),
    }
    if case.family == "t5":
        measured |= {"first_token": _first_token(numbers), "one_token_response": _one_token_response(case)}
    else:
        measured["left_padding"] = distance(Oracle(case, "rollout", side="left").logprobs(), rollout.logprobs())
    return measured


def _kl_at_step_0(case: Case) -> float:
    """Return the KL that trl measures when its reference is a copy of the policy; it uses the bare base instead."""
    import trl

    copy = trl.create_reference_model(Oracle(case, "start").model)
    return float(Oracle(case, "start", reference=copy).step()["objective/kl"])


def _after_a_step(case: Case) -> Oracle:
    oracle = Oracle(case, "rollout")
    oracle.step()
    assert all(module.training for module in oracle.model.modules() if isinstance(module, torch.nn.Dropout))
    return oracle


def _differences(first: Rows, second: Rows) -> Rows:
    differences = []
    for first_row, second_row in zip(first, second, strict=True):
        differences.append([a - b for a, b in zip(first_row, second_row, strict=True)])
    return differences


def distance(first: Rows, second: Rows) -> dict[str, float]:
    """Return the mean and the largest absolute difference."""
    distances = [abs(difference) for row in _differences(first, second) for difference in row]
    return {"mean": sum(distances) / len(distances), "max": max(distances)}


def _weight_change(case: Case, mini_batch_size: int) -> torch.Tensor:
    """Return the weight change of one step of plain gradient descent over all responses, minibatches accumulated."""
    times = len(PROMPTS) // mini_batch_size
    settings = {"mini_batch_size": mini_batch_size, "gradient_accumulation_steps": times, "vf_coef": 0.0}
    oracle = Oracle(case, "rollout", lr=1.0, **settings)
    before = torch.cat([weight.detach().flatten() for weight in oracle.lora().values()])
    oracle.step()
    return torch.cat([weight.detach().flatten() for weight in oracle.lora().values()]) - before


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference, divided by the norm of what is expected."""
    return float((actual - expected).norm() / expected.norm())


def _clipped_norms(case: Case) -> list[float]:
    """Return the gradient norms of three optimizer steps with `max_grad_norm` 0.01."""
    oracle = Oracle(case, "rollout", mini_batch_size=2, max_grad_norm=0.01)
    norms: list[float] = []

    def note(sgd: torch.optim.Optimizer, *_: Any) -> None:
        gradients = [weight.grad.flatten() for group in sgd.param_groups for weight in group["params"]]
        norms.append(float(torch.cat(gradients).norm()))

    oracle.sgd.register_step_pre_hook(note)
    oracle.step()
    return norms


def _whitened_std(numbers: dict[str, Any]) -> float:
    """Return the standard deviation of trl's whitened advantages; 1 is correct."""
    return float(np.std([advantage for row in numbers["every_token"]["advantages"] for advantage in row]))


def _first_token(numbers: dict[str, Any]) -> dict[str, float]:
    """Return how KL, loss and gradient change when the first token is left out, as trl does."""
    kl = _differences(numbers["logprobs"]["start"], numbers["bare_logprobs"])
    every_token = numbers["every_token"]
    without_first = numbers["without_first"]
    gradients = []
    for side in (without_first, every_token):
        gradients.append(torch.cat([torch.tensor(weight) for weight in side["gradient"].values()]))
    return {
        "kl_at_step_0_of_every_token": sum(map(sum, kl)) / len(kl),
        "policy_loss_difference": without_first["policy_loss"] - every_token["policy_loss"],
        "gradient_relative_difference": relative(*gradients),
        "gradient_cosine": float(torch.cosine_similarity(*gradients, dim=0)),
    }


def _one_token_response(case: Case) -> str:
    oracle = Oracle(case, "rollout")
    oracle.responses[0] = oracle.responses[0][:2]
    try:
        oracle.step()
    except IndexError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def controller() -> list[float]:
    """Return the coefficients of trl's adaptive controller after each of the KLs."""
    from trl.trainer.utils import AdaptiveKLController

    control = AdaptiveKLController(SETTINGS["kl_coef"], CONTROLLER["target"], CONTROLLER["horizon"])
    coefs = []
    for kl in CONTROLLER["kls"]:
        control.update(kl, CONTROLLER["batch_size"])
        coefs.append(float(control.value))
    return coefs


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_rounded(part) for part in value]
    return float(f"{value:.9g}") if isinstance(value, float) else value  # 9 digits represent every float32


def write_json(written: dict[str, Any], file: Path) -> None:
    """Write numbers with 9 digits, and each list of numbers on one line."""
    text = json.dumps(_rounded(written), indent=1)
    lists_on_one_line = re.sub(r"\[[^][{}]*\]", lambda match: " ".join(match[0].split()), text)
    file.write_text(lists_on_one_line + "\n", encoding="utf-8")


def main(file: str) -> None:
    """Write the numbers of both model families."""
    import trl

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    packages = (trl, torch, transformers, peft, np)
    written: dict[str, Any] = {"versions": {package.__name__: package.__version__ for package in packages}}
    written |= {"settings": SETTINGS, "scores": SCORES, "controller": controller()}
    for family in FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            case = build(family, Path(folder))
            numbers = figures(case)
            written[family] = numbers | {"faults": faults(case, numbers)}
    write_json(written, Path(file))


if __name__ == "__main__":
    main(sys.argv[1])
