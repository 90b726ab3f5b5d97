"""Do our numbers agree with those of trl 1.16's GRPO and RLOO on one fixed case, and where do definitions differ?

benchmarks/oracle/trl_group_oracle.py recorded what trl's own trainers computed, so these tests need no trl.

GRPO: ours is trl's with loss_type `dapo` or `bnpo` and `use_bias_correction_kl` off.

- Advantages: the score less the mean of its group, over the group's std (ddof 1) plus 1e-4.
- Loss: the clipped ratio of each token and k3, divided by the number of tokens of the minibatch.

RLOO: the advantages are trl's; with std scaling ours are divided by the std of the batch with ddof 0, trl's with
ddof 1 and plus 1e-4. Ours clips the ratio of each token and divides by the number of tokens, trl clips the ratio of a
whole response and divides by the number of responses. In the first update only that divisor differs.
"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import trl_group_oracle
from closeness import close
from conftest import small_config
from detoxrl.config.schema import Config, PolicyConfig, RlConfig
from detoxrl.models.lora import load_policy
from detoxrl.models.types import Prompt, Responses, Rollout
from detoxrl.models.weights import REFERENCE
from detoxrl.rl.advantages import group_relative, token_rewards, zero_variance_share
from detoxrl.rl.algorithm import ALGORITHMS, Targets
from detoxrl.rl.kl import k3
from detoxrl.rl.losses import kl_loss, policy_loss
from detoxrl.training.learner import Learner
from learning import learner_of
from trl_group_oracle import FAMILY, PROMPTS, RESPONSES, SETTINGS, UPDATES
from trl_oracle import Case, Rows, build

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "oracle" / "trl_1_16.json").read_text("utf-8"))
SCORES = torch.tensor(trl_group_oracle.SCORES)
SIZE = SETTINGS["group_size"]
CLIP = (SETTINGS["clip"], SETTINGS["clip_high"])


def laid(rows: Rows) -> torch.Tensor:
    """Return the rows as one tensor (B, T), 0 after the end of each row."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True)


IDS = laid(RESPONSES)
MASK = laid([[1.0] * len(row) for row in RESPONSES]).bool()
TOKENS = int(MASK.sum())


@cache
def trl_logprobs(step: str) -> torch.Tensor:
    """Return trl's log-probs (B, T) under an adapter."""
    return laid(RECORDED["logprobs"][step])


def trl_gradient(recorded: dict[str, list[float]]) -> torch.Tensor:
    """Return the recorded gradient of all LoRA weights as one vector."""
    return torch.cat([torch.tensor(recorded[name]) for name in sorted(recorded)])


def rl_config(algorithm: str, **changes: Any) -> RlConfig:
    """The settings that trl had: one minibatch of all responses for one pass."""
    settings: dict[str, Any] = {
        "algorithm": algorithm, "group_size": SIZE, "batch_size": len(RESPONSES), "minibatch_size": len(RESPONSES),
        "microbatch_size": None, "epochs": 1, "kl_coef": SETTINGS["kl_coef"], "clip": SETTINGS["clip"],
        "clip_high": SETTINGS["clip_high"], "lr": SETTINGS["lr"], "max_grad_norm": SETTINGS["max_grad_norm"],
    }  # fmt: skip
    return replace(small_config().rl, **(settings | changes))


def targets_of(rl: RlConfig, logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> Targets:
    """Return the targets that training derives from a rollout with the given scores."""
    in_reward, in_loss = (rl.kl_coef, 0.0) if rl.kl_place == "reward" else (0.0, rl.kl_coef)
    rewards = token_rewards(SCORES, logprobs, ref_logprobs, MASK, in_reward)
    return replace(ALGORITHMS[rl.algorithm].targets(rewards, None, MASK, rl), kl_coef=in_loss)


def advantages_of(algorithm: str, **changes: Any) -> torch.Tensor:
    """Return advantages (B, T) for trl's log-probs."""
    rl = rl_config(algorithm, **changes)
    return targets_of(rl, trl_logprobs("rollout"), trl_logprobs("start")).advantages


def of_responses(advantages: torch.Tensor) -> torch.Tensor:
    """Return the advantages (B,) of responses whose tokens all have the same one."""
    assert torch.equal(advantages, torch.where(MASK, advantages[:, :1], 0.0))
    return advantages[:, 0]


class Ours:
    """Our policy on the case. It starts from the adapter that is also its reference."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.policy = load_policy(str(case.base), case.adapter("start"), PolicyConfig(base="given"), seed=0)
        self.encoded = self.policy.encode(PROMPTS)

    def at(self, step: str) -> Ours:
        """Load the policy's adapter of a step: rollout or updated."""
        weights = load_file(self.case.adapter(step) / "adapter_model.safetensors")
        set_peft_model_state_dict(self.policy.model, weights, adapter_name="default")
        return self

    def logprobs(self, temperature: float = 1.0, **adapter: str | None) -> torch.Tensor:
        """Return log-probs (B, T); the prompt of a group is read once."""
        return self.policy.logprobs(self.encoded, IDS, temperature, mask=MASK, **adapter).logprobs

    def gradient(self) -> torch.Tensor:
        """Return the gradient of all LoRA weights as one vector."""
        trained = {name: weight for name, weight in self.policy.model.named_parameters() if weight.requires_grad}
        assert trained.keys() == RECORDED["rloo"]["first"]["gradient"].keys()
        gradients = []
        for name in sorted(trained):
            gradient = trained[name].grad
            assert gradient is not None
            gradients.append(gradient.flatten())
        return torch.cat(gradients)

    @torch.no_grad()
    def rollout(self) -> Rollout:
        """Return the case as a rollout that our policy sampled."""
        return Rollout(
            prompts=[Prompt(id=str(row), text=text) for row, text in enumerate(PROMPTS)],
            encoded=self.encoded,
            responses=Responses(
                ids=IDS,
                response_mask=MASK,
                logprobs=self.at("rollout").logprobs(),
                values=None,
                ended=torch.tensor([row[-1] == 1 for row in RESPONSES]),
            ),
            texts=[str(row) for row in RESPONSES],
            ref_logprobs=self.logprobs(adapter=REFERENCE),
        )


@pytest.fixture
def ours(tmp_path: Path) -> Ours:
    return Ours(build(FAMILY, tmp_path))


def test_the_case_is_the_one_that_trl_saw(ours: Ours) -> None:
    assert ours.case.fingerprint() == RECORDED["fingerprint"]
    assert RECORDED["settings"] == SETTINGS
    assert (RECORDED["prompts"], RECORDED["responses"]) == (PROMPTS, RESPONSES)
    assert RECORDED["scores"] == trl_group_oracle.SCORES


# The same numbers


def test_logprobs_of_groups_that_share_their_prompt_are_trls(ours: Ours) -> None:
    close(ours.logprobs(adapter=REFERENCE), trl_logprobs("start"))
    close(ours.at("rollout").logprobs(), trl_logprobs("rollout"))
    close(ours.logprobs(temperature=0.7), trl_logprobs("rollout at 0.7"))
    close(ours.at("updated").logprobs(), trl_logprobs("updated"))


@pytest.mark.parametrize(("std_scaling", "setting"), [(True, "group"), (False, "none")])
def test_grpo_advantages_are_trls(std_scaling: bool, setting: str) -> None:
    advantages = of_responses(advantages_of("grpo", std_scaling=std_scaling))
    close(advantages, torch.tensor(RECORDED["advantages"][f"grpo, {setting}"]))
    assert advantages[2 * SIZE : 3 * SIZE].tolist() == [0.0] * SIZE  # A group that agrees.


def test_the_share_of_groups_without_variance_is_trls() -> None:
    assert float(zero_variance_share(SCORES, SIZE)) == RECORDED["advantages"]["zero_variance"] == 1 / len(PROMPTS)


def test_rloo_advantages_with_the_kl_in_the_reward_are_trls() -> None:
    close(of_responses(advantages_of("rloo")), torch.tensor(RECORDED["advantages"]["rloo, plain"]))


@pytest.mark.parametrize(("update", "step"), UPDATES.items())
def test_grpo_loss_and_its_gradient_are_those_of_trls_dapo(update: str, step: str) -> None:
    trl = RECORDED["grpo"][update]
    new = trl_logprobs(step).clone().requires_grad_()
    loss, clipped = policy_loss(new, trl_logprobs("rollout"), advantages_of("grpo"), MASK, CLIP)
    kl = kl_loss(new, trl_logprobs("start"), MASK, "k3")
    whole = (loss + SETTINGS["kl_coef"] * kl) / TOKENS
    whole.backward()
    close(loss / TOKENS, trl["policy_loss"])
    close(kl / TOKENS, trl["kl"])
    close(whole, trl["loss"])
    assert new.grad is not None
    close(new.grad, laid(trl["logprob_gradient"]))
    assert int(clipped.sum()) == round((trl["clipped_low"] + trl["clipped_high"]) * TOKENS)
    assert all(trl[f"clipped_{side}"] > 0.05 for side in ("low", "high")) == (update == "later")


@pytest.mark.parametrize(("update", "step"), UPDATES.items())
def test_the_gradient_of_every_lora_weight_is_trls_from_the_prompts_on(ours: Ours, update: str, step: str) -> None:
    rollout = ours.rollout()
    new = ours.at(step).logprobs()
    targets = targets_of(rl_config("grpo"), rollout.responses.logprobs, rollout.ref_logprobs)
    loss, _ = policy_loss(new, rollout.responses.logprobs, targets.advantages, MASK, CLIP)
    whole = (loss + targets.kl_coef * kl_loss(new, rollout.ref_logprobs, MASK, "k3")) / TOKENS
    whole.backward()
    close(whole, RECORDED["grpo"][update]["loss"])
    close(ours.gradient(), trl_gradient(RECORDED["grpo"][update]["gradient"]))


def sgd_learner(ours: Ours, folder: Path, config: Config) -> tuple[Learner, list[torch.Tensor]]:
    """Return a learner whose steps are the gradients times the learning rate, and the gradients of its steps."""
    learner = learner_of(ours.policy, folder, config, ours.rollout())
    learner.optimizer = torch.optim.SGD(ours.policy.parameters(), lr=0.0)  # type: ignore[assignment]
    gradients: list[torch.Tensor] = []
    learner.optimizer.register_step_pre_hook(lambda *_: gradients.append(ours.gradient()))
    return learner, gradients


@pytest.mark.parametrize("microbatch_size", [16, 4, 2])
def test_two_updates_by_our_learner_are_those_of_trls_train(ours: Ours, tmp_path: Path, microbatch_size: int) -> None:
    """trl's is one batch. With `dapo` its microbatches add up to the same, with `bnpo` it averages their means."""
    config = replace(small_config(), rl=rl_config("grpo", kl_estimator="k3", microbatch_size=microbatch_size))
    learner, gradients = sgd_learner(ours, tmp_path, config)
    assert learner.rollout is not None
    targets = targets_of(config.rl, learner.rollout.responses.logprobs, learner.rollout.ref_logprobs)
    for number, trl in enumerate(RECORDED["train"]):
        metrics = learner.update(targets, step=0)
        close(metrics["policy/loss"] + SETTINGS["kl_coef"] * metrics["kl/loss"], trl["loss"])
        close(metrics["kl/loss"], trl["kl"])
        close(metrics["entropy"], trl["entropy"])
        close(metrics["grad_norm"], trl["grad_norm"])
        close(gradients[number], trl_gradient(trl["gradient"]))
        assert metrics["clip_fraction"] == pytest.approx(trl["clipped"])
        close(gradients[number].norm(), SETTINGS["max_grad_norm"])
    assert [update["clipped"] > 0.1 for update in RECORDED["train"]] == [False, True]
    by_microbatches = RECORDED["faults"]["accumulation"]
    assert by_microbatches["dapo"] < 1e-6 < 0.15 < by_microbatches["bnpo"]


# Where definitions differ


def test_grpo_scales_by_the_std_of_the_group_where_trl_can_take_that_of_the_batch() -> None:
    # Of the scores of the batch, not of its advantages.
    unscaled = group_relative(SCORES, SIZE, std_scaling=False)
    close(unscaled / (SCORES.std() + 1e-4), torch.tensor(RECORDED["advantages"]["grpo, batch"]))


@pytest.mark.parametrize(("update", "step"), UPDATES.items())
def test_trls_default_multiplies_k3_by_the_ratio_which_gives_it_the_gradient_of_our_k2(update: str, step: str) -> None:
    trl = RECORDED["grpo"][update]["weighted_kl"]
    new = trl_logprobs(step).clone().requires_grad_()
    old, ref = trl_logprobs("rollout"), trl_logprobs("start")
    ratio = (new.detach() - old).exp()
    close((ratio * k3(new, ref))[MASK].mean(), trl["kl"])

    loss, _ = policy_loss(new, old, advantages_of("grpo"), MASK, CLIP)
    loss.backward(retain_graph=True)
    assert new.grad is not None
    of_policy = new.grad.clone()
    gradients = {}
    for estimator in ("k2", "k3"):
        new.grad = None
        kl_loss(new, ref, MASK, estimator).backward()
        assert new.grad is not None
        gradients[estimator] = (of_policy + SETTINGS["kl_coef"] * ratio * new.grad) / TOKENS

    # In the first update all ratios are 1; later trl also weights the gradient by the ratio, and ours does not.
    theirs = laid(trl["logprob_gradient"])
    close(gradients["k2"], theirs)
    assert float((gradients["k3"] - theirs).norm() / theirs.norm()) > 0.015


def test_normalized_rloo_advantages_have_variance_1_where_trl_divides_by_the_unbiased_std() -> None:
    plain, theirs = (torch.tensor(RECORDED["advantages"][f"rloo, {name}"]) for name in ("plain", "normalized"))
    normalized = of_responses(advantages_of("rloo", std_scaling=True))
    trl_std, our_std = plain.std() + 1e-4, plain.std(correction=0)
    close(normalized * our_std / trl_std, theirs)
    close(normalized.std(correction=0), 1.0)
    assert 0.965 < float(our_std / trl_std) < 0.97  # sqrt(15 / 16), and the 1e-4


def test_the_loss_is_a_mean_over_tokens_as_dapo_and_bnpo_where_trls_others_weight_responses() -> None:
    for update, step in UPDATES.items():
        losses = RECORDED["grpo"][update]["losses"]
        new, old, ref = trl_logprobs(step), trl_logprobs("rollout"), trl_logprobs("start")
        advantages = advantages_of("grpo")
        of_rows = []
        for row in range(len(RESPONSES)):
            tensors = [tensor[row, None] for tensor in (new, old, advantages, MASK)]
            loss, _ = policy_loss(*tensors, CLIP)
            of_rows.append(loss + SETTINGS["kl_coef"] * kl_loss(new[row], ref[row], MASK[row], "k3"))
        sums = torch.stack(of_rows)
        close(sums.sum() / TOKENS, losses["dapo"])
        close(sums.sum() / TOKENS, losses["bnpo"])
        close(sums.sum() / (len(RESPONSES) * SETTINGS["max_tokens"]), losses["dr_grpo"])
        close((sums / MASK.sum(1)).mean(), losses["grpo"])
        close(sums.mean(), losses["luspo"])


def rloo_gradient(ours: Ours, step: str) -> torch.Tensor:
    """Return the gradient of our RLOO, summed over tokens and divided by the number of responses, as trl's is."""
    rollout = ours.rollout()
    targets = targets_of(rl_config("rloo"), rollout.responses.logprobs, rollout.ref_logprobs)
    new = ours.at(step).logprobs()
    loss, _ = policy_loss(new, rollout.responses.logprobs, targets.advantages, MASK, CLIP)
    (loss / len(RESPONSES)).backward()
    return ours.gradient()


def test_the_first_rloo_update_has_trls_gradient_but_for_the_divisor(ours: Ours) -> None:
    # trl divides by the number of responses, we by that of tokens: a constant factor, and RLOO's learning rate.
    close(rloo_gradient(ours, "rollout"), trl_gradient(RECORDED["rloo"]["first"]["gradient"]))
    assert TOKENS / len(RESPONSES) == 5


def test_later_rloo_updates_clip_the_ratio_of_each_token_where_trl_clips_that_of_a_response(ours: Ours) -> None:
    theirs = RECORDED["rloo"]["later"]
    old, new = (trl_logprobs(step).sum(1, keepdim=True) for step in ("rollout", "updated"))
    advantages = advantages_of("rloo")
    every = torch.ones(len(RESPONSES), 1).bool()
    loss, clipped = policy_loss(new, old, advantages[:, :1], every, CLIP)
    close(loss / len(RESPONSES), theirs["loss"])
    assert int(clipped.sum()) == round((theirs["clipped_low"] + theirs["clipped_high"]) * len(RESPONSES))

    gradient, trl = rloo_gradient(ours, "updated"), trl_gradient(theirs["gradient"])
    assert float((gradient - trl).norm() / trl.norm()) > 0.5


# Where trl's defaults give other numbers


def test_left_padding_changes_nothing_where_trl_shifts_gpt2s_positions(ours: Ours) -> None:
    ours.at("rollout")
    for group, prompt in enumerate(PROMPTS):
        rows = slice(group * SIZE, (group + 1) * SIZE)
        alone = ours.policy.logprobs(ours.policy.encode([prompt]), IDS[rows], 1.0, mask=MASK[rows]).logprobs
        close(alone, trl_logprobs("rollout")[rows])
    assert RECORDED["faults"]["left_padding"]["mean"] > 0.6


def test_dropout_is_off_where_trl_scores_with_it_by_default(ours: Ours) -> None:
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in ours.policy.model.modules())
    assert torch.equal(ours.logprobs(), ours.logprobs())
    assert RECORDED["faults"]["dropout"]["mean"] > 0.7
