"""What do trl 1.16's GRPO and RLOO compute for one small fixed case?

Writes the numbers for tests/rl/test_group_oracle.py. It needs its own environment:

python -m venv trl-env && trl-env/bin/pip install torch==2.13.0
trl-env/bin/pip install -r benchmarks/oracle/trl_group-requirements.txt
trl-env/bin/python benchmarks/oracle/trl_group_oracle.py tests/rl/oracle/trl_1_16.json

The GPT-2 and its three adapters are those of trl_oracle.py; here each prompt has a group of four responses. Importing
this file takes no trl. trl's trainers run as they are, in train mode, but for this:

- Generation returns the given responses, and the reward function the given scores.
- Dropout is off (`disable_dropout`), which it is not by default.
- The KL is k3, as in DeepSeekMath; by default trl multiplies it by the probability ratio (`use_bias_correction_kl`).
- The model gets positions that count real tokens. trl 1.16 gives it none, so GPT-2 would count the padding.

What the last three change is recorded too.
"""

from __future__ import annotations

import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

import trl_oracle
from trl_oracle import Case, Rows, build, distance, relative, write_json

FAMILY = "gpt2"
PROMPTS = trl_oracle.PROMPTS[:4]
RESPONSES = [
    [19, 13, 24, 4, 19, 17, 0, 2], [15, 1], [13, 13, 13, 21, 21, 21, 36, 1], [1],
    [12, 12, 0, 21, 20, 20, 10, 37], [21, 21, 1], [36, 0, 0, 0, 1], [21, 21, 0, 26, 25, 20, 24, 0],
    [5, 1], [25, 25, 25, 25, 1], [21, 21, 1], [24, 21, 24, 39, 39, 0, 0, 0],
    [2, 37, 23, 24, 15, 9, 9, 12], [0, 0, 1], [29, 1], [21, 19, 21, 21, 29, 1],
]  # fmt: skip
"""Four to each prompt. Some end with EOS (1), some are cut; some contain the pad token (0)."""
SCORES = [1.5, -0.75, 0.25, 2.0, 0.51, 0.5, 0.505, 0.495, 0.25, 0.25, 0.25, 0.25, -1.25, 0.5, 3.0, -0.5]
"""The second group nearly agrees, the third one agrees."""
SETTINGS: dict[str, Any] = {
    "group_size": 4, "kl_coef": 0.2, "clip": 0.2, "clip_high": 0.28, "max_tokens": 8, "lr": 3.0, "max_grad_norm": 0.1,
}  # fmt: skip
LOSS_TYPES = ("dapo", "bnpo", "grpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo")
UPDATES = {"first": "rollout", "later": "updated"}
"""The adapter that an update starts from. The responses are always those of `rollout`, the reference is `start`."""


# trl


class Oracle:
    """trl's GRPOTrainer or RLOOTrainer on the case: its reference is the adapter `start`, its policy `rollout`."""

    def __init__(
        self, case: Case, algorithm: str, *, corrects_positions: bool = True, dropout: bool = False, **settings: Any
    ) -> None:
        import datasets
        import trl

        self.case = case
        tokenizer = transformers.AutoTokenizer.from_pretrained(case.base)
        base = transformers.GPT2LMHeadModel.from_pretrained(case.base)
        if corrects_positions:
            base.register_forward_pre_hook(_with_positions, with_kwargs=True)
        self.model = peft.PeftModel.from_pretrained(base, str(case.adapter("start")), is_trainable=True)

        chosen = {
            "beta": SETTINGS["kl_coef"], "epsilon": SETTINGS["clip"], "epsilon_high": SETTINGS["clip_high"],
            "num_generations": SETTINGS["group_size"], "max_completion_length": SETTINGS["max_tokens"],
            "per_device_train_batch_size": len(RESPONSES), "gradient_accumulation_steps": 1,
            "num_iterations": 2,  # With one, trl takes the ratio of the only update to be 1.
            "max_steps": 2, "max_grad_norm": SETTINGS["max_grad_norm"], "lr_scheduler_type": "constant",
            "disable_dropout": not dropout, "shuffle_dataset": False, "gradient_checkpointing": False,
            "output_dir": str(case.folder / "trl"), "use_cpu": True, "bf16": False, "report_to": "none",
            "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True,
        }  # fmt: skip
        self.weights = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        self.sgd = torch.optim.SGD(self.weights.values(), lr=SETTINGS["lr"])
        trainer, config = trl.RLOOTrainer, trl.RLOOConfig
        if algorithm == "grpo":
            trainer, config = trl.GRPOTrainer, trl.GRPOConfig
            chosen["use_bias_correction_kl"] = False
        self.trainer = trainer(
            model=self.model,
            reward_funcs=_scores,
            args=config(**(chosen | settings)),
            train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS]),
            processing_class=tokenizer,
            optimizers=(self.sgd, None),
        )
        self._replace_generation(tokenizer, returns_logprobs=algorithm == "grpo")
        self._keep_logprobs()
        self.trainer.current_gradient_accumulation_steps = 1  # `train` sets it too.
        self.at("rollout")
        self.model.train()

    def _replace_generation(self, tokenizer: Any, returns_logprobs: bool) -> None:
        expected = [tokenizer(prompt).input_ids for prompt in _prompt_of_each_response()]

        def generate(prompt_ids: list[list[int]], *_: Any) -> Any:
            assert prompt_ids == expected
            return (RESPONSES, None) if returns_logprobs else RESPONSES

        self.trainer._generate_single_turn = generate

    def _keep_logprobs(self) -> None:
        """Keep what the last pass over the responses returned, so that it has a gradient after `backward`."""
        compute = self.trainer._get_per_token_logps_and_entropies

        def compute_and_keep(*arguments: Any, **keywords: Any) -> Any:
            logprobs, entropies, auxiliary = compute(*arguments, **keywords)
            if logprobs.requires_grad:
                logprobs.retain_grad()
            self.logprobs, self.entropies = logprobs, entropies
            return logprobs, entropies, auxiliary

        self.trainer._get_per_token_logps_and_entropies = compute_and_keep

    def at(self, step: str) -> Oracle:
        """Load the policy's adapter of a step: rollout or updated. The reference stays."""
        set_peft_model_state_dict(self.model, load_file(self.case.adapter(step) / "adapter_model.safetensors"))
        return self

    def rollout(self) -> dict[str, Any]:
        """Run trl's own step from prompts to advantages, and return what it gives to an update."""
        inputs = [{"prompt": prompt} for prompt in _prompt_of_each_response()]
        batch: dict[str, Any] = self.trainer._generate_and_score_completions(inputs)
        lengths = batch["completion_mask"].sum(1).tolist()
        assert lengths == [len(ids) for ids in RESPONSES]
        return batch

    def update(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return loss, gradients and statistics of trl's `_compute_loss`."""
        self.trainer._metrics["train"].clear()
        self.sgd.zero_grad()
        loss = self.trainer._compute_loss(self.model, batch)
        loss.backward()
        statistics = {name: values[-1] for name, values in self.trainer._metrics["train"].items()}
        return {
            "loss": loss.item(),
            "clipped_low": statistics.get("clip_ratio/low_mean"),
            "clipped_high": statistics.get("clip_ratio/high_mean"),
            "kl": statistics.get("kl"),
            "entropy": statistics["entropy"],
            "logprob_gradient": token_rows(self.logprobs.grad),
            "gradient": self.gradient(),
        }

    def gradient(self) -> dict[str, list[float]]:
        """Return the gradient of every LoRA weight."""
        return {name: weight.grad.flatten().tolist() for name, weight in self.weights.items()}

    def train(self) -> list[dict[str, Any]]:
        """Run trl's whole `train`, two updates on one rollout; return what each logs, and its clipped gradient."""
        gradients = []
        self.sgd.register_step_pre_hook(lambda *_: gradients.append(self.gradient()))
        self.trainer.train()
        logged = [entry for entry in self.trainer.state.log_history if "grad_norm" in entry]
        assert len(logged) == len(gradients) == 2
        rows = []
        for entry, gradient in zip(logged, gradients, strict=True):
            row = {name: entry[name] for name in ("loss", "kl", "entropy", "grad_norm") if name in entry}
            rows.append(row | {"clipped": entry["clip_ratio/region_mean"], "gradient": gradient})
        return rows


def token_rows(tensor: torch.Tensor) -> Rows:
    """Return the numbers of a (B, T) tensor at the tokens of the responses."""
    return [row[: len(ids)].tolist() for row, ids in zip(tensor, RESPONSES, strict=True)]


def _prompt_of_each_response() -> list[str]:
    return [prompt for prompt in PROMPTS for _ in range(SETTINGS["group_size"])]


def _with_positions(_: torch.nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    positions = (keywords["attention_mask"].cumsum(1) - 1).clamp_min(0)
    return arguments, keywords | {"position_ids": positions}


def _scores(prompts: list[str], **_: Any) -> list[float]:
    assert prompts == _prompt_of_each_response()
    return SCORES


# Numbers


def logprobs(case: Case) -> dict[str, Any]:
    """Return the log-probs (nats) that trl computes under each adapter, and at another temperature."""
    oracle = Oracle(case, "grpo")
    batch = oracle.rollout()
    rows = {"start": token_rows(batch["ref_per_token_logps"]), "rollout": token_rows(batch["old_per_token_logps"])}
    oracle.at("updated").update(batch)
    rows["updated"] = token_rows(oracle.logprobs)
    rows["rollout at 0.7"] = token_rows(Oracle(case, "grpo", temperature=0.7).rollout()["old_per_token_logps"])
    return rows


def advantages(case: Case) -> dict[str, Any]:
    """Return the advantages of each response, by trl's settings, and the share of groups whose scores are equal."""
    by_setting: dict[str, Any] = {}
    for scale in ("group", "none", "batch"):
        oracle = Oracle(case, "grpo", scale_rewards=scale)
        by_setting[f"grpo, {scale}"] = oracle.rollout()["advantages"].tolist()
        if scale == "group":
            by_setting["zero_variance"] = oracle.trainer._metrics["train"]["frac_reward_zero_std"][-1]
    for name, normalizes in (("plain", False), ("normalized", True)):
        oracle = Oracle(case, "rloo", normalize_advantages=normalizes)
        by_setting[f"rloo, {name}"] = oracle.rollout()["advantages"].tolist()
    return by_setting


def grpo(case: Case) -> dict[str, Any]:
    """Return the loss of each type, and everything of `dapo`, trl's default, for each of UPDATES."""
    numbers = {}
    for name, step in UPDATES.items():
        losses = {}
        for loss_type in LOSS_TYPES:
            oracle = Oracle(case, "grpo", loss_type=loss_type)
            batch = oracle.rollout()
            losses[loss_type] = oracle.at(step).update(batch)["loss"]
        without_kl = Oracle(case, "grpo", beta=0.0)
        batch = without_kl.rollout()
        policy_loss = without_kl.at(step).update(batch)["loss"]

        weighted_kl = Oracle(case, "grpo", use_bias_correction_kl=True)
        batch = weighted_kl.rollout()
        by_default = weighted_kl.at(step).update(batch)

        oracle = Oracle(case, "grpo")
        batch = oracle.rollout()
        numbers[name] = oracle.at(step).update(batch) | {"losses": losses, "policy_loss": policy_loss}
        numbers[name]["weighted_kl"] = {key: by_default[key] for key in ("kl", "loss", "logprob_gradient")}
    return numbers


def rloo(case: Case) -> dict[str, Any]:
    """Return loss, gradients and statistics for each of UPDATES."""
    numbers = {}
    for name, step in UPDATES.items():
        oracle = Oracle(case, "rloo")
        batch = oracle.rollout()
        numbers[name] = oracle.at(step).update(batch)
    return numbers


def faults(case: Case) -> dict[str, Any]:
    """Return what trl's defaults change, in nats unless the name says otherwise."""
    correct = token_rows(Oracle(case, "grpo").rollout()["old_per_token_logps"])
    padded = token_rows(Oracle(case, "grpo", corrects_positions=False).rollout()["old_per_token_logps"])
    dropped = token_rows(Oracle(case, "grpo", dropout=True).rollout()["old_per_token_logps"])
    whole = {"per_device_train_batch_size": len(RESPONSES), "gradient_accumulation_steps": 1}
    by_group = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": len(PROMPTS)}
    measured: dict[str, Any] = {"left_padding": distance(padded, correct), "dropout": distance(dropped, correct)}
    measured["accumulation"] = {}
    for loss_type in ("dapo", "bnpo", "grpo", "dr_grpo"):
        gradients = []
        for batches in (by_group, whole):
            first, _ = Oracle(case, "grpo", loss_type=loss_type, max_grad_norm=0.0, **batches).train()
            gradients.append(torch.cat([torch.tensor(weight) for weight in first["gradient"].values()]))
        measured["accumulation"][loss_type] = relative(*gradients)
    return measured


def main(file: str) -> None:
    """Write the numbers."""
    import trl

    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    packages = (trl, torch, transformers, peft, np)
    written: dict[str, Any] = {"versions": {package.__name__: package.__version__ for package in packages}}
    written |= {"settings": SETTINGS, "prompts": PROMPTS, "responses": RESPONSES, "scores": SCORES}
    with tempfile.TemporaryDirectory() as folder:
        case = build(FAMILY, Path(folder))
        written |= {
            "fingerprint": case.fingerprint(),
            "logprobs": logprobs(case),
            "advantages": advantages(case),
            "grpo": grpo(case),
            "rloo": rloo(case),
            "train": Oracle(case, "grpo").train(),
            "faults": faults(case),
        }
    write_json(written, Path(file))


if __name__ == "__main__":
    main(sys.argv[1])
