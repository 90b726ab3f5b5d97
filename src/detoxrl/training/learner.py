"""What trains the policy, the same in every process of a run?"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from detoxrl.data.rows import to_prompts
from detoxrl.evaluation.judges import Judge, memoized
from detoxrl.models.groups import response_rows, split_into_passes
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, batches_by_length, sample_texts
from detoxrl.models.types import Prompt, Rollout
from detoxrl.rewards.shaping import Normaliser, overall
from detoxrl.rewards.terms import Reward
from detoxrl.rl.algorithm import ALGORITHMS, Targets
from detoxrl.rl.kl import k3
from detoxrl.rl.losses import kl_loss
from detoxrl.runs import Run
from detoxrl.runtime.checkpoint import trainable
from detoxrl.runtime.console import log
from detoxrl.runtime.world import together
from detoxrl.training.initial_responses import InitialResponses
from detoxrl.training.memory import MemoryPlan
from detoxrl.training.metrics import Metrics, Totals
from detoxrl.training.rollout import collect_rollout, deal_prompts, join_rollouts, minibatches, sorted_by_length
from detoxrl.training.validation import Validation, ValidationResponse, ValidationSampler, summarise


class Learner:
    """The policy, its optimizer, the reward and the memory plan of a run.

    The training loop in the main process calls `sample`, `score`, `update` and `validate`. They share their work among
    all processes and return the result for the whole batch.
    """

    def __init__(self, run: Run, reward: Reward | None = None) -> None:
        """Make the initial policy of a run learn by the run's reward, or by the one given."""
        self.run = run
        self.config = run.config
        self.world = run.world
        self.algorithm = ALGORITHMS[run.config.rl.algorithm]
        self.reward = reward or run.reward
        self.normaliser = Normaliser.identity(self.reward.terms)
        self.policy: Policy = run.initial_policy().to(run.world.device)
        self.value_head = self.policy.add_value_head() if self.config.rl.traits.has_critic else None
        self.optimizer = self._new_optimizer()
        self.prompts = to_prompts(run.rows("train"))
        self.memory = MemoryPlan(microbatch_size=self.config.rl.minibatch_size, keep_cross=True)

        self._validation_rows = run.rows("validation")
        self._validation_prompts = to_prompts(self._validation_rows)
        self._validation = ValidationSampler(self.policy, self.config, self._validation_rows, self.world)
        self._initial_responses = InitialResponses(self.policy, self.config)
        self.rollout: Rollout | None = None  # The last one, on which `update` trains.

    @cached_property
    def judge(self) -> Judge:
        """The primary judge, which rates each text once. Only the main process judges."""
        return memoized(self.run.primary_judge)

    def _new_optimizer(self) -> torch.optim.AdamW:
        rl = self.config.rl
        groups: list[dict[str, Any]] = [{"params": self.policy.parameters(), "lr": rl.lr}]
        if self.value_head is not None:
            groups.append({"params": list(self.value_head.parameters()), "lr": rl.value_lr})
        return torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0)

    def trainable_weights(self) -> dict[str, torch.nn.Parameter]:
        """Return what training changes, by name: the policy's trainable weights, and those of a critic."""
        weights = trainable(self.policy.model)
        if self.value_head is not None:
            for name, weight in self.value_head.named_parameters():
                weights[f"value_head.{name}"] = weight
        return weights

    @together
    def synchronise(self) -> None:
        """Give every process the weights and moments of the main one, after these were restored."""
        self.world.copy_optimizer(self.optimizer)

    @together
    def plan_memory(self) -> None:
        """Take the memory plan that the run has stored, or choose one by the memory that is free now and store it."""
        plan: MemoryPlan | None = None
        if self.world.is_main:
            plan = MemoryPlan.stored(self.run.folder, self.config, self.world)
            if plan is None:
                plan = MemoryPlan.choose(self.policy, self.prompts, self.config, self.world)
                plan.save(self.run.folder, self.config, self.world)

        plan = self.world.broadcast(plan)
        assert plan is not None
        self.memory = plan

    def initial_scores(self) -> torch.Tensor:
        """Return raw values (N, terms) of the reference's responses to the first `reward.normalise_on` prompts."""
        prompts = self.prompts[: self.config.reward.normalise_on]
        texts = self._reference_responses()
        return self._score(prompts, texts)

    @together
    def _reference_responses(self) -> list[str]:
        prompts = self.prompts[: self.config.reward.normalise_on]
        draws = Draws(self.config.seed, "normaliser")
        generation = self.config.generation
        texts: dict[int, str] = {}
        for batch in batches_by_length(prompts, generation.batch_size * self.world.size):
            mine = self.world.share(batch)
            batch_prompts = [prompts[index] for index in mine]
            sampled = sample_texts(self.policy, batch_prompts, generation, draws, adapter=self.policy.reference)
            texts_here = {index: text for index, (text,) in zip(mine, sampled, strict=True)}
            for part in self.world.gather(texts_here):
                texts.update(part)
        return [texts[index] for index in range(len(prompts))]

    @together
    def sample(self, indices: list[int], step: int) -> Rollout:
        """Sample a group of responses to each of some training prompts; keep and return the rollout of all of them."""
        config = self.config
        prompts = sorted_by_length([self.prompts[index] for index in indices])

        # Each process samples the prompts that it will update on, so what it encoded need not travel.
        first_pass = minibatches(config, step, 0, len(prompts))
        dealt = deal_prompts(first_pass, self.world.size)
        mine = [prompts[number] for number in dealt[self.world.rank]]

        draws = Draws(config.seed, "rollout", step, range(config.rl.responses_per_prompt))
        part = collect_rollout(self.policy, mine, config.generation, draws, self.memory.keep_cross)
        self.rollout = join_rollouts(part, prompts, dealt, self.world, self.policy)
        return self.rollout

    def score(self, rollout: Rollout) -> torch.Tensor:
        """Return the raw values (B, terms) of a rollout's responses, on the policy's device."""
        return self._score(rollout.prompts_of_responses, rollout.texts).to(self.policy.device)

    @together
    def _score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        if self.world.size == 1:
            return self.reward.with_shared(self._values(prompts, responses), prompts, responses)

        def score_share() -> torch.Tensor:
            return self._values(self.world.share(prompts), self.world.share(responses)).cpu()

        values = torch.zeros(len(prompts), len(self.reward.terms))
        for rank, part in enumerate(self.world.gather_results(score_share)):
            rows = values[rank :: self.world.size]
            rows.copy_(part[: len(rows)])
        return self.reward.with_shared(values, prompts, responses)

    def _values(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        """Return raw values (B, terms) of the terms that read each of some responses by itself."""
        if self.reward.reads_initial_responses:
            prompts = self._initial_responses.with_initial_responses(prompts)
        return self.reward.alone(prompts, responses)

    def update(self, targets: Targets, step: int) -> Metrics:
        """Make up to `rl.epochs` passes of clipped updates over the last rollout; return metrics of all minibatches.

        Gradients are sums over microbatches and over the processes' rows, divided by the minibatch's token count, so a
        microbatch changes memory only. A process in which one does not fit into memory begins its part of the minibatch
        again with microbatches of half the size, and at last recomputes activations in the backward pass.
        """
        return self._update(targets.to(torch.device("cpu")), step)  # A pickled tensor knows only its own GPU.

    @together
    def _update(self, targets: Targets, step: int) -> Metrics:
        rl = self.config.rl
        targets = targets.to(self.policy.device)
        self._set_learning_rates(step)
        totals = Totals()
        passes = 0
        for epoch in range(rl.epochs):
            self._pass_over_rollout(targets, step, epoch, totals)
            passes += 1
            if rl.update_kl_limit is not None and totals.pass_kl() > rl.update_kl_limit:
                break
        return totals.metrics(epochs=passes) | {"microbatch_size": float(self.memory.microbatch_size)}

    def learning_rate(self, step: int) -> float:
        """Return the policy's learning rate at a step: a linear decay to 0."""
        return self.config.rl.lr * self._decay(step)

    def _decay(self, step: int) -> float:
        return 1 - step / self.config.rl.steps

    def _set_learning_rates(self, step: int) -> None:
        rl = self.config.rl
        # The second group is that of a critic.
        for group, peak in zip(self.optimizer.param_groups, (rl.lr, rl.value_lr), strict=False):
            group["lr"] = peak * self._decay(step)

    def _pass_over_rollout(self, targets: Targets, step: int, epoch: int, totals: Totals) -> None:
        """Make one optimizer step for each minibatch, and add what all processes measured to `totals`."""
        rollout = self._last_rollout()
        weights = self._optimized_weights()
        before = self.memory
        measured: list[tuple[list[Metrics], float]] = []
        for prompts in minibatches(self.config, step, epoch, len(rollout.prompts)):
            sums = self._backward(torch.tensor(prompts, device=self.policy.device), targets, step)
            self.world.sum_gradients(weights)
            norm = torch.nn.utils.clip_grad_norm_(weights, self.config.rl.max_grad_norm)
            measured.append((sums, float(norm)))
            self.optimizer.step()
            self.optimizer.zero_grad()

        self._agree_on_memory(before)
        for of_minibatch in zip(*self.world.gather(measured), strict=True):
            of_microbatches = [sums for parts, _ in of_minibatch for sums in parts]
            _, gradient_norm = of_minibatch[0]
            totals.add(of_microbatches, gradient_norm)

    def _optimized_weights(self) -> list[torch.nn.Parameter]:
        return [weight for group in self.optimizer.param_groups for weight in group["params"]]

    def _last_rollout(self) -> Rollout:
        assert self.rollout is not None, "sample comes before update"
        return self.rollout

    def _backward(self, prompts: torch.Tensor, targets: Targets, step: int) -> list[Metrics]:
        """Add the gradient of this process's part of a minibatch; return the sums of its microbatches."""
        rollout = self._last_rollout()
        rows = response_rows(prompts, rollout.group_size)
        tokens = int(rollout.responses.response_mask[rows].sum())
        mine = prompts if rollout.local_prompts is None else prompts[torch.isin(prompts, rollout.local_prompts)]
        if len(mine) == 0:
            return []

        while True:
            try:
                return self._backward_in_microbatches(mine, targets, tokens)
            except RuntimeError as error:
                smaller = self.memory.reduced(self.policy)
                if smaller is None or not should_reduce_batch_size(error):
                    raise
                self.memory = smaller
                self.optimizer.zero_grad()
                log.print(f"step {step}: out of memory, so from now on an update {smaller}")

    def _backward_in_microbatches(self, prompts: torch.Tensor, targets: Targets, tokens: int) -> list[Metrics]:
        group_size = self._last_rollout().group_size
        measured = []
        for part, rows in split_into_passes(prompts, group_size, self.memory.microbatch_size):
            with self.policy.recomputing(self.policy.checkpointing or self.memory.recompute):
                sums = self._losses(part, rows, targets)
            loss = self._objective(sums, targets.kl_coef) / tokens
            loss.backward()
            measured.append({name: float(value.detach()) for name, value in sums.items()})
        return measured

    def _objective(self, sums: dict[str, torch.Tensor], kl_coef: float) -> torch.Tensor:
        """Return what the update minimises, summed over tokens."""
        rl = self.config.rl
        objective = sums["policy"]
        if "value" in sums:
            objective = objective + rl.value_coef * sums["value"]
        if "kl_loss" in sums:
            objective = objective + kl_coef * sums["kl_loss"]
        if rl.entropy_coef > 0:
            objective = objective - rl.entropy_coef * sums["entropy"]
        return objective

    def _agree_on_memory(self, before: MemoryPlan) -> None:
        """Take the plan that fits into the memory of all processes, and store it if it has changed."""
        self.memory = self.memory.together_with(self.world.gather(self.memory))
        if self.world.is_main and self.memory != before:
            self.memory.save(self.run.folder, self.config, self.world)

    def _losses(self, prompts: torch.Tensor, rows: torch.Tensor, targets: Targets) -> dict[str, torch.Tensor]:
        """Return loss sums and statistics over the tokens of some rows, which answer some prompts in equal numbers.

        Padding past their longest response is cut.
        """
        rl = self.config.rl
        rollout = self._last_rollout()
        responses = rollout.responses
        length = int(responses.response_mask[rows].sum(1).max())
        mask = responses.response_mask[rows, :length]
        old_logprobs = responses.logprobs[rows, :length]
        advantages = targets.advantages[rows, :length]

        if self.policy.train_encoder:
            encoded = self.policy.encode([rollout.prompts[prompt].text for prompt in prompts.tolist()])
        else:
            encoded = rollout.encoded_at(prompts)
        temperature = self.config.generation.temperature
        ids = responses.ids[rows, :length]
        scored = self.policy.logprobs(encoded, ids, temperature, mask=mask, entropy_gradient=rl.entropy_coef > 0)

        policy_loss, clipped = self.algorithm.policy_loss(
            scored.logprobs, old_logprobs, advantages, mask, rl.clip_range
        )
        sums = {"policy": policy_loss, "entropy": scored.entropy[mask].sum()}
        if self.algorithm.value_loss is not None:
            assert scored.values is not None, "an algorithm with a value loss has a critic"
            assert responses.values is not None
            assert targets.returns is not None
            old_values = responses.values[rows, :length]
            returns = targets.returns[rows, :length]
            sums["value"] = self.algorithm.value_loss(scored.values, old_values, returns, mask, rl.value_clip)
        if rl.kl_place == "loss":
            sums["kl_loss"] = kl_loss(scored.logprobs, rollout.ref_logprobs[rows, :length], mask, rl.kl_by)

        with torch.no_grad():
            ratio = (scored.logprobs - old_logprobs)[mask].exp()
            statistics = {
                "tokens": mask.sum(),
                "clipped": clipped.sum(),
                "kl": k3(old_logprobs, scored.logprobs)[mask].sum(),
                "ratio": ratio.sum(),
                "ratio_max": ratio.max(),
                "ratio_min": ratio.min(),
            }
        return sums | statistics

    def validate(self, step: int) -> Validation:
        """Return how the policy does on the validation prompts before `step`."""
        rows = self._validation_rows
        responses = self._validation_responses()
        texts = [response.text for response in responses]
        toxicity = self.judge(texts)
        raw = self._score(self._validation_prompts, texts)
        scores = overall(raw, self.reward.terms, self.normaliser, self.config.reward.clip)
        distances = torch.tensor([response.kl for response in responses])
        return summarise(step, rows, texts, toxicity, float(scores.mean()), float(distances.mean()))

    @together
    def _validation_responses(self) -> list[ValidationResponse]:
        """Return one response for each validation row, in order."""
        parts = self.world.gather(self._validation.sample())
        responses = {response.index: response for part in parts for response in part}
        return [responses[index] for index in range(len(self._validation_rows))]
