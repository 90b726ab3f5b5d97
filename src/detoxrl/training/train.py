"""How does reinforcement learning make the policy less toxic?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size

from detoxrl.config.schema import Config, RlConfig
from detoxrl.data.rows import Row, to_prompts
from detoxrl.evaluation.judges import Judge
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import in_row_order, sample_batches
from detoxrl.models.types import Prompt, Rollout
from detoxrl.rewards.shaping import Normaliser, Reward, fit_normaliser, shape_scores
from detoxrl.rl.advantages import gae, token_rewards
from detoxrl.rl.kl import adapt_kl_coef, k3
from detoxrl.rl.losses import explained_variance, policy_loss, value_loss
from detoxrl.rl.ops import whiten
from detoxrl.runtime import processes
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.console import log, progress
from detoxrl.runtime.randomness import batch_indices
from detoxrl.runtime.run_folder import NOTHING_BETTER, PRODUCTS, RunFolder
from detoxrl.runtime.signals import resume_hint
from detoxrl.training.best import BestCheckpoint
from detoxrl.training.memory import MemoryPlan
from detoxrl.training.metrics import Totals, Watch, log_samples, require_finite, rollout_statistics, warn_of_ratios
from detoxrl.training.rollout import collect_rollout, deal_rows, join_rollouts, minibatches
from detoxrl.training.validation import Validator

_PARTED = "from there on the score is above the least toxic policy's, and toxicity above or quality below"


def train(
    folder: RunFolder,
    config: Config,
    policy: Policy,
    reward: Reward,
    judge: Judge,
    rows: Sequence[Row],
    validation_rows: Sequence[Row],
) -> None:
    """Train the policy with PPO (Schulman et al. 2017) and keep its best checkpoint in `folder`.

    Goes on from checkpoints/train where there is one. Ctrl-C and SIGTERM end the step, write a checkpoint and raise
    KeyboardInterrupt; a reward that raises leaves a checkpoint of its step. Raises TrainingError when a logged number
    is not finite; the best policy so far stays. The last checkpoint stays too, for a run that is to be longer.
    """
    rl, reward = config.rl, processes.shared(reward)
    accelerator, optimizer = learner(policy, rl)
    prompts, best = to_prompts(rows), BestCheckpoint(folder, rl)
    validate = Validator(policy, config, validation_rows)
    head = {f"value_head.{name}": weight for name, weight in policy.value_head.named_parameters()}
    products = [folder / name for name in PRODUCTS["train"] if name != "checkpoints/train"]
    checkpoints = Checkpoints(folder / "checkpoints/train", trainable(policy.model) | head, optimizer, products)
    begun = checkpoints.restore() or {"step": 0, "kl_coef": rl.kl_coef, "best": [], "shown": ""}
    first, kl_coef, shown = begun["step"], begun["kl_coef"], begun["shown"]
    best.recall(begun["best"])
    processes.tell("begin")
    processes.begin_alike(optimizer)
    if not (folder / "normaliser.json").is_file():
        processes.tell("normalise")
        folder.write_json("normaliser.json", asdict(reference_normaliser(policy, reward, prompts, config)))
    normaliser = Normaliser(**folder.read_json("normaliser.json"))
    room = MemoryPlan.of(folder, policy, prompts, config)

    @contextmanager
    def kept(step: int) -> Iterator[None]:
        """Keep the state before the step when the block fails, as a user's function may do late."""
        try:
            yield
        except Exception as error:
            checkpoints.point(step, state(), now=True)
            error.add_note(f"step {step} is kept: {resume_hint(folder.root)}")
            raise

    def scored(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        with kept(step):
            return reward(prompts, responses)

    def state() -> dict[str, Any]:
        return {"kl_coef": kl_coef, "best": best.seen(), "shown": shown}

    with progress("train", rl.steps) as reach, checkpoints.stoppable():
        for step in range(first, rl.steps + 1):
            watch, last = Watch(), step == rl.steps
            # A checkpoint follows its step's validation, unless that failed, so what it goes on with is validated.
            done = bool(best.series) and best.series[-1].step == step
            if (last or step % rl.validate_every == 0) and not done:
                with kept(step):
                    processes.tell("validate", step)
                    found = validate(reward, judge, step)
                require_finite({f"validation/{name}": value for name, value in asdict(found).items()}, step)
                folder.append("validation.jsonl", asdict(found) | {"kept": best.offer(policy, found)})
                shown = f"validation toxicity {found.toxicity:.3f} quality {found.quality:.3f}"
                watch.lap("validate")
            last = last or best.stopped_step is not None
            checkpoints.point(step, state(), now=last)
            watch.lap("checkpoint")
            if last:
                break
            batch = [prompts[i] for i in batch_indices(config.seed, "prompts", step, rl.batch_size, len(prompts))]
            processes.tell("step", normaliser, step, kl_coef, room)
            rollout, raw, statistics = ppo_step(
                policy, accelerator, optimizer, scored, normaliser, batch, config, step, kl_coef, watch, room
            )
            if statistics["microbatch_size"] < room.microbatch_size:
                room = replace(room, microbatch_size=int(statistics["microbatch_size"]))
                room.keep(folder, rl.microbatch_size)
            require_finite(statistics, step)
            if rl.kl_target is not None:
                kl = statistics["kl/reference"]
                kl_coef = adapt_kl_coef(kl_coef, kl, rl.kl_target, rl.kl_horizon, rl.batch_size)
            warn_of_ratios(statistics, step, config.policy.bf16)
            tokens = int(rollout.responses.response_mask.sum())
            folder.append("metrics.jsonl", {"step": step} | statistics | watch.metrics(tokens))
            log_samples(folder, rollout, raw, step)
            reach(step + 1, f"score {statistics['score/mean']:.2f}  kl {statistics['kl/reference']:.2f}  {shown}")
    checkpoints.forget(keep=1)
    _say_how_it_ended(folder, best, shown)


def learner(policy: Policy, rl: RlConfig) -> tuple[Accelerator, Any]:
    """Move the policy to its device; return what knows that, and what updates weights and value head."""
    accelerator = Accelerator()
    policy.to(accelerator.device)
    learning = (policy.parameters(), rl.lr), (list(policy.value_head.parameters()), rl.value_lr)
    groups = [{"params": weights, "lr": peak} for weights, peak in learning]
    return accelerator, accelerator.prepare(torch.optim.AdamW(groups, eps=1e-5, weight_decay=0.0))


def _say_how_it_ended(folder: RunFolder, best: BestCheckpoint, shown: str) -> None:
    # Patience may end a run that was made longer where it stood, with no validation that would have written this.
    ended = folder.read_json("checkpoint.json") | {"stopped_step": best.stopped_step}
    folder.write_json("checkpoint.json", ended)
    if best.stopped_step is not None:
        log.print(f"train: stopped at step {best.stopped_step}: {best.rl.patience} validations in a row were no better")
    log.print(f"train: kept the policy of step {ended['kept_step']}; at the end {shown}")
    if ended["parted_step"] is not None:
        log.print(f"train: score and judge part at step {ended['parted_step']}: {_PARTED}")
    if ended["kept_step"] == 0:
        log.print(f"train: {NOTHING_BETTER}")


def reference_normaliser(policy: Policy, reward: Reward, prompts: Sequence[Prompt], config: Config) -> Normaliser:
    """Return mean and std of the raw scores of reference responses to the first prompts (none: 0 and 1)."""
    if config.reward.normalise_on == 0:
        return Normaliser()
    some, seed, start = prompts[: config.reward.normalise_on], config.seed, policy.reference
    how = config.generation
    batches = sample_batches(policy, some, how, seed=seed, stream="normaliser", adapter=start, together=True)
    scores = reward([prompt.text for prompt in some], [text for (text,) in in_row_order(batches)])
    if bool((scores == scores[0]).all()):
        what = f"all {len(scores)} responses of the start score {scores[0]:.3g}"
        log.print(f"train: {what}; nothing is to be learnt here")
    return fit_normaliser(scores)


def ppo_step(
    policy: Policy,
    accelerator: Accelerator,
    optimizer: Any,
    reward: Reward,
    normaliser: Normaliser,
    prompts: list[Prompt],
    config: Config,
    step: int,
    kl_coef: float,
    watch: Watch,
    room: MemoryPlan,
) -> tuple[Rollout, torch.Tensor, dict[str, float]]:
    """Sample a response to each prompt, score them and update the policy; return rollout, raw scores and statistics."""
    rl = config.rl
    decay = 1 - step / rl.steps
    for group, peak in zip(optimizer.param_groups, (rl.lr, rl.value_lr), strict=True):
        group["lr"] = peak * decay
    how, dealt = config.generation, deal_rows(minibatches(config, step, 0, len(prompts)), processes.count())
    prompts = sorted(prompts, key=lambda prompt: len(prompt.text))
    some = [prompts[row] for row in processes.share(dealt)[0]]
    rollout = collect_rollout(policy, some, how, seed=config.seed, step=step, keep_cross=room.keep_cross)
    rollout = join_rollouts(rollout, prompts, dealt, how, policy.pad)
    watch.lap("sample")
    responses, mask = rollout.responses, rollout.responses.response_mask
    raw = reward([prompt.text for prompt in rollout.prompts], rollout.texts).to(accelerator.device)
    scores = shape_scores(raw, rollout.texts, responses.ended, normaliser, config.reward)
    watch.lap("score")
    rewards = token_rewards(scores, responses.logprobs, rollout.ref_logprobs, mask, kl_coef)
    advantages, returns = gae(rewards, responses.values, mask, rl.gamma, rl.lam)
    critic = explained_variance(responses.values, returns, mask)
    targets = Targets(advantages=whiten(advantages, mask), returns=returns)
    updates = update(policy, accelerator, optimizer, rollout, targets, config, step, room.microbatch_size)
    watch.lap("update")
    statistics = rollout_statistics(rollout, raw, scores, rewards) | updates
    statistics |= {"value/explained_variance": float(critic), "kl_coef": kl_coef, "lr": rl.lr * decay}
    return rollout, raw, statistics


@dataclass(frozen=True, kw_only=True)
class Targets:
    """What an update pulls towards, each (B, T): whitened advantages and returns."""

    advantages: torch.Tensor
    returns: torch.Tensor


def update(
    policy: Policy,
    accelerator: Accelerator,
    optimizer: Any,
    rollout: Rollout,
    targets: Targets,
    config: Config,
    step: int,
    microbatch_size: int | None = None,
) -> dict[str, float]:
    """Make `epochs` passes of clipped updates over a rollout; return statistics over all its minibatches.

    Gradients are sums over microbatches, and over the processes' rows, divided by the minibatch's token count, so
    microbatches change memory only. Where one does not fit into memory a process begins its part of the minibatch again
    with microbatches half as large.
    """
    rl = config.rl
    weights = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    totals, size = Totals(), microbatch_size or rl.microbatch_size or rl.minibatch_size
    for epoch in range(rl.epochs):
        passed = list[tuple[list[dict[str, float]], float]]()
        for rows in minibatches(config, step, epoch, len(rollout.texts)):
            minibatch = torch.tensor(rows, device=policy.device)
            tokens, parts = int(rollout.responses.response_mask[minibatch].sum()), list[dict[str, float]]()
            mine = minibatch if rollout.mine is None else minibatch[torch.isin(minibatch, rollout.mine)]
            while len(mine) and not parts:
                try:
                    for microbatch in mine.split(size):
                        part = _losses(policy, rollout, targets, microbatch, config)
                        accelerator.backward((part["policy"] + rl.value_coef * part["value"]) / tokens)
                        parts.append({name: float(value.detach()) for name, value in part.items()})
                except RuntimeError as error:
                    if size == 1 or not should_reduce_batch_size(error):
                        raise
                    size, parts = -(-size // 2), []
                    optimizer.zero_grad()
                    log.print(f"step {step}: out of memory, so an update reads {size} responses at once from here on")
            processes.sum_gradients(weights)
            passed.append((parts, float(accelerator.clip_grad_norm_(weights, rl.max_grad_norm))))
            optimizer.step()
            optimizer.zero_grad()
        size = min(processes.everyone(size))
        for minibatch_parts in zip(*processes.everyone(passed), strict=True):
            totals.add([part for parts, _ in minibatch_parts for part in parts])
            totals.norms.append(minibatch_parts[0][1])
        if rl.update_kl_limit is not None and totals.pass_kl() > rl.update_kl_limit:
            break
    return totals.metrics(epochs=epoch + 1) | {"microbatch_size": float(size)}


def _losses(
    policy: Policy, rollout: Rollout, targets: Targets, rows: torch.Tensor, config: Config
) -> dict[str, torch.Tensor]:
    """Return loss sums and statistics over the tokens of some rows; padding past their longest response is cut."""
    rl, responses = config.rl, rollout.responses
    length = int(responses.response_mask[rows].sum(1).max())
    mask, logprobs = responses.response_mask[rows, :length], responses.logprobs[rows, :length]
    if policy.train_encoder:
        encoded = policy.encode([rollout.prompts[row].text for row in rows.tolist()])
    else:
        encoded = rollout.encoded_at(rows)
    ids = responses.ids[rows, :length]
    new_logprobs, entropy, new_values = policy.logprobs(encoded, ids, config.generation.temperature, mask=mask)
    advantages, returns = targets.advantages[rows, :length], targets.returns[rows, :length]
    policy_sum, clipped = policy_loss(new_logprobs, logprobs, advantages, mask, rl.clip)
    value_sum = value_loss(new_values, responses.values[rows, :length], returns, mask, rl.value_clip)
    with torch.no_grad():
        ratio = (new_logprobs - logprobs)[mask].exp()
        found = {"policy": policy_sum, "value": value_sum, "tokens": mask.sum(), "clipped": clipped.sum()}
        found |= {"entropy": entropy[mask].sum(), "kl": k3(logprobs, new_logprobs)[mask].sum()}
        return found | {"ratio": ratio.sum(), "ratio_max": ratio.max(), "ratio_min": ratio.min()}
