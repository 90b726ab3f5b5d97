"""Do our numbers agree with those of trl 0.11.4 on one fixed case, and how far is trl off where it is wrong?

benchmarks/oracle/trl_oracle.py recorded what trl's own methods returned, so these tests need no trl.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch.nn.utils.rnn import pad_sequence

import trl_oracle
from closeness import close
from conftest import small_config
from detoxrl.config.schema import PolicyConfig
from detoxrl.models.lora import load_policy
from detoxrl.models.sampling import Draws
from detoxrl.models.types import Prompt
from detoxrl.models.weights import REFERENCE
from detoxrl.rl.advantages import gae, token_rewards
from detoxrl.rl.algorithm import Targets
from detoxrl.rl.kl import adapt_kl_coef, k1
from detoxrl.rl.losses import policy_loss, value_loss
from detoxrl.rl.ops import whiten
from detoxrl.training.rollout import collect_rollout
from learning import learner_of, use_sgd
from trl_oracle import CONTROLLER, FAMILIES, PROMPTS, SETTINGS, Case, Rows

RECORDED: dict[str, Any] = json.loads((Path(__file__).parent / "oracle" / "trl_0_11_4.json").read_text("utf-8"))
SCORES = torch.tensor(trl_oracle.SCORES)
CLIP = (SETTINGS["clip"], SETTINGS["clip"])


class Trl:
    """trl's numbers over the tokens that count: all of them, or all but the first, which is what trl does on T5."""

    def __init__(self, family: str, counted: str = "every_token") -> None:
        self.family, self.all, self.update = family, RECORDED[family], RECORDED[family][counted]
        self.first = int(counted == "without_first")
        self.mask = self.rows([[1.0] * len(row) for row in self.all["values"]]).bool()
        self.tokens = int(self.mask.sum())
        self.values, self.new_values = self.rows(self.all["values"]), self.rows(self.all["new_values"])
        logprobs = {step: self.rows(rows) for step, rows in self.all["logprobs"].items()}
        self.ref_logprobs, self.logprobs, self.new_logprobs = (logprobs[step] for step in trl_oracle.STEPS)
        # trl divides the variance by n - 1, so its whitened advantages are the correct ones times this factor.
        self.unbiased = ((self.tokens - 1) / self.tokens) ** 0.5

    def rows(self, rows: Rows) -> torch.Tensor:
        """Return the rows as one tensor (B, T), 0 after the end of each row."""
        return pad_sequence([torch.tensor(row[self.first :]) for row in rows], batch_first=True)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.rows(self.update[name])


class Ours:
    """Our policy on the case. It starts from the adapter that is also its reference."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.policy = load_policy(str(case.base), case.adapter("start"), PolicyConfig(base="given"), seed=0)
        self.policy.add_value_head()
        self.ids = pad_sequence([torch.tensor(row) for row in case.responses], batch_first=True)
        self.mask = pad_sequence([torch.ones(len(row)).bool() for row in case.responses], batch_first=True)

    def at(self, step: str) -> Ours:
        """Load the policy's adapter of a step: rollout or updated."""
        weights = load_file(self.case.adapter(step) / "adapter_model.safetensors")
        set_peft_model_state_dict(self.policy.model, weights, adapter_name="default")
        return self

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Return the weights that training may change, by name."""
        return {name: weight for name, weight in self.policy.model.named_parameters() if weight.requires_grad}

    def both(self, temperature: float = 1.0, **adapter: str | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log-probs and entropies (B, T) in nats, 0 after the last token."""
        encoded = self.policy.encode(PROMPTS, **adapter)
        logprobs, entropy, _ = self.policy.logprobs(encoded, self.ids, temperature, **adapter)
        return torch.where(self.mask, logprobs, 0.0), torch.where(self.mask, entropy, 0.0)

    def logprobs(self, temperature: float = 1.0, **adapter: str | None) -> torch.Tensor:
        """Return log-probs (B, T) in nats, 0 after the last token."""
        return self.both(temperature, **adapter)[0]


@pytest.fixture(params=[("t5", "every_token"), ("t5", "without_first"), ("gpt2", "every_token")], ids="-".join)
def trl(request: pytest.FixtureRequest) -> Trl:
    return Trl(*request.param)


@pytest.fixture(params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    return trl_oracle.build(request.param, tmp_path)


# Where trl is correct: the same numbers


def test_the_case_is_the_one_that_trl_saw(case: Case) -> None:
    recorded = RECORDED[case.family]
    assert case.fingerprint() == recorded["fingerprint"]
    assert (case.values, case.new_values) == (recorded["values"], recorded["new_values"])
    assert (RECORDED["settings"], RECORDED["scores"]) == (SETTINGS, trl_oracle.SCORES)


def test_rewards_are_trls(trl: Trl) -> None:
    close(token_rewards(SCORES, trl.logprobs, trl.ref_logprobs, trl.mask, SETTINGS["kl_coef"]), trl["rewards"])


def test_advantages_and_returns_are_trls(trl: Trl) -> None:
    advantages, returns = gae(trl["rewards"], trl.values, trl.mask, SETTINGS["gamma"], SETTINGS["lam"])
    close(advantages, trl["raw_advantages"])
    close(returns, trl["returns"])


def test_whitened_advantages_are_trls_but_for_its_unbiased_variance(trl: Trl) -> None:
    whitened = whiten(trl["raw_advantages"], trl.mask)
    close(whitened * trl.unbiased, trl["advantages"])
    close(whitened[trl.mask].std(correction=0), 1.0)
    assert trl["advantages"][trl.mask].std(correction=0) < 0.985


def test_policy_loss_and_clip_fraction_are_trls(trl: Trl) -> None:
    loss, clipped = policy_loss(trl.new_logprobs, trl.logprobs, trl["advantages"], trl.mask, CLIP)
    close(loss / trl.tokens, trl.update["policy_loss"])
    assert int(clipped.sum()) == round(trl.update["clip_fraction"] * trl.tokens) > 0


def test_value_loss_and_its_gradient_are_trls(trl: Trl) -> None:
    new_values = trl.new_values.requires_grad_()
    loss = value_loss(new_values, trl.values, trl["returns"], trl.mask, SETTINGS["value_clip"])
    (SETTINGS["value_coef"] * loss / trl.tokens).backward()
    close(SETTINGS["value_coef"] * loss / trl.tokens, trl.update["value_loss"])
    assert new_values.grad is not None
    close(new_values.grad, trl["value_gradient"])


def test_kl_since_the_rollout_and_the_adaptive_coefficient_are_trls(trl: Trl) -> None:
    close(k1(trl.logprobs, trl.new_logprobs)[trl.mask].mean(), trl.update["k1"])
    coef, coefs = SETTINGS["kl_coef"], []
    for kl in CONTROLLER["kls"]:
        coef = adapt_kl_coef(coef, kl, CONTROLLER["target"], CONTROLLER["horizon"], CONTROLLER["batch_size"])
        coefs.append(coef)
    assert coefs == pytest.approx(RECORDED["controller"], rel=1e-8)


def test_logprobs_of_policy_reference_and_bare_base_are_trls(case: Case) -> None:
    ours, trl = Ours(case), Trl(case.family)
    close(ours.at("rollout").logprobs(), trl.logprobs)
    close(ours.logprobs(adapter=REFERENCE), trl.ref_logprobs)
    close(ours.logprobs(adapter=None), trl.rows(trl.all["bare_logprobs"]))
    close(ours.at("updated").logprobs(), trl.new_logprobs)


def test_a_whole_update_is_trls_from_the_prompts_to_the_gradient_of_every_lora_weight(trl: Trl, tmp_path: Path) -> None:
    ours = Ours(trl_oracle.build(trl.family, tmp_path))
    with torch.no_grad():
        ref_logprobs, logprobs = ours.logprobs(adapter=REFERENCE), ours.at("rollout").logprobs()
    new_logprobs, entropy = ours.at("updated").both()
    ref_logprobs, logprobs, new_logprobs, entropy = (
        tensor[:, trl.first :] for tensor in (ref_logprobs, logprobs, new_logprobs, entropy)
    )
    rewards = token_rewards(SCORES, logprobs, ref_logprobs, trl.mask, SETTINGS["kl_coef"])
    advantages, _ = gae(rewards, trl.values, trl.mask, SETTINGS["gamma"], SETTINGS["lam"])
    advantages = whiten(advantages, trl.mask) * trl.unbiased
    loss, _ = policy_loss(new_logprobs, logprobs, advantages, trl.mask, CLIP)
    (loss / trl.tokens).backward()
    close(loss / trl.tokens, trl.update["policy_loss"])
    close(entropy[trl.mask].mean(), trl.update["entropy"])
    assert ours.trained().keys() == trl.update["gradient"].keys()
    for name, weight in ours.trained().items():
        assert weight.grad is not None
        close(weight.grad.flatten(), torch.tensor(trl.update["gradient"][name]))


# Where trl is wrong


def test_kl_to_the_reference_is_zero_at_the_start_where_trl_with_an_adapter_measures_to_the_bare_base(
    case: Case,
) -> None:
    ours, theirs, first = Ours(case), RECORDED[case.family]["faults"]["kl_at_step_0"], int(case.family == "t5")
    policy = ours.logprobs()
    assert k1(policy, ours.logprobs(adapter=REFERENCE)).abs().max() < 1e-6
    close(k1(policy, ours.logprobs(adapter=None))[:, first:].sum(1).mean(), theirs)
    assert theirs > 2


def test_the_first_token_counts_where_trl_leaves_it_out_of_t5s_kl_loss_and_gradient() -> None:
    t5, gpt2, fault = Trl("t5"), Trl("gpt2"), RECORDED["t5"]["faults"]["first_token"]
    assert torch.equal(gpt2.rows(gpt2.all["trl_mask"]).bool(), gpt2.mask)
    missing = t5.mask & ~t5.rows(t5.all["trl_mask"]).bool()
    assert missing.nonzero().tolist() == [[row, 0] for row in range(len(PROMPTS))]
    kl, without = k1(t5.ref_logprobs, t5.rows(t5.all["bare_logprobs"])), t5.all["faults"]["kl_at_step_0"]
    close(kl[:, 1:].sum(1).mean(), without)
    close(kl.sum(1).mean(), fault["kl_at_step_0_of_every_token"])
    assert fault["kl_at_step_0_of_every_token"] - without > 0.3
    assert abs(fault["policy_loss_difference"]) > 0.01
    assert fault["gradient_relative_difference"] > 0.2


def test_a_response_of_one_token_is_learnt_from_where_trl_fails_on_t5() -> None:
    assert RECORDED["t5"]["faults"]["one_token_response"].startswith("IndexError")
    mask, old = torch.ones(2, 1).bool(), torch.tensor([[-1.0], [-2.0]])
    rewards = token_rewards(torch.tensor([1.0, -3.0]), old, old, mask, SETTINGS["kl_coef"])
    advantages, _ = gae(rewards, torch.zeros(2, 1), mask, SETTINGS["gamma"], SETTINGS["lam"])
    new = old.clone().requires_grad_()
    policy_loss(new, old, whiten(advantages, mask), mask, CLIP)[0].backward()
    close(torch.as_tensor(new.grad), torch.tensor([[-1.0], [1.0]]))


def test_dropout_is_off_where_trl_samples_with_it(case: Case) -> None:
    ours = Ours(case)
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in ours.policy.model.modules())
    assert torch.equal(ours.logprobs(), ours.logprobs())
    assert RECORDED[case.family]["faults"]["dropout"]["mean"] > 0.5


def test_the_sampling_temperature_is_in_the_logprobs_where_trl_leaves_it_out(case: Case) -> None:
    ours, trl = Ours(case).at("rollout"), Trl(case.family)
    sampled = trl.rows(trl.all["logprobs_at_0.7"])
    close(ours.logprobs(temperature=0.7), sampled)
    close((sampled - trl.logprobs)[trl.mask].abs().mean(), trl.all["faults"]["temperature_0.7"]["mean"])
    assert trl.all["faults"]["temperature_0.7"]["mean"] > 0.3


def test_a_padded_prompt_scores_as_it_does_alone_where_trl_shifts_gpt2s_positions(case: Case) -> None:
    ours, trl = Ours(case).at("rollout"), Trl(case.family)
    for row, prompt in enumerate(PROMPTS):
        alone, _, _ = ours.policy.logprobs(ours.policy.encode([prompt]), ours.ids[row : row + 1], 1.0)
        close(torch.where(trl.mask[row], alone[0], 0.0), trl.logprobs[row])
    close(ours.logprobs(), trl.logprobs)
    assert RECORDED["gpt2"]["faults"]["left_padding"]["max"] > 1


def test_microbatches_add_up_to_the_whole_where_trl_averages_means(trl: Trl) -> None:
    sums, tokens = [], []
    for rows in torch.arange(len(PROMPTS)).split(2):
        tensors = (trl.new_logprobs, trl.logprobs, trl["advantages"], trl.mask)
        sums.append(policy_loss(*(tensor[rows] for tensor in tensors), CLIP)[0])
        tokens.append(int(trl.mask[rows].sum()))
    close(sum(sums) / sum(tokens), trl.update["policy_loss"])
    mean_of_means = sum(part / count for part, count in zip(sums, tokens, strict=True)) / len(sums)
    assert abs(float(mean_of_means) / trl.update["policy_loss"] - 1) > 0.05
    assert trl.all["faults"]["mean_of_means"] > 0.1


def test_every_gradient_is_clipped_where_trl_clips_the_first_of_a_run_alone(case: Case, tmp_path: Path) -> None:
    ours, settings = Ours(case), small_config()
    config = replace(settings, rl=replace(settings.rl, minibatch_size=2, microbatch_size=2, max_grad_norm=0.01))
    config = replace(config, rl=replace(config.rl, lr=1e-30, value_lr=1e-30))  # The weights stay.
    prompts = [Prompt(id=str(row), text=text) for row, text in enumerate(PROMPTS)]
    rollout = collect_rollout(ours.policy, prompts, config.generation, Draws(0, "rollout"))
    weights = [*ours.trained().values(), *ours.policy.add_value_head().parameters()]
    norms = []
    learner = learner_of(ours.policy, tmp_path, config, rollout)
    use_sgd(learner)

    def note(*_: Any) -> None:
        norms.append(float(torch.cat([weight.grad.flatten() for weight in weights if weight.grad is not None]).norm()))

    learner.optimizer.register_step_pre_hook(note)
    ones = rollout.responses.response_mask.float()
    learner.update(Targets(advantages=ones, returns=ones), step=0)
    assert len(norms) == 3 * config.rl.epochs
    assert norms == pytest.approx([0.01] * len(norms), rel=1e-3)
    first, *others = RECORDED[case.family]["faults"]["gradient_norms_clipped_to_0.01"]
    assert first == pytest.approx(0.01, rel=1e-3)
    assert min(others) > 1
