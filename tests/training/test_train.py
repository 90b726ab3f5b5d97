"""The loops learn, stop on NaN, and keep what they should."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from conftest import ENCODER_DECODERS, Make, disturb, policy_config, prompted_rows, small_config
from detoxrl.config.schema import Config, RewardConfig
from detoxrl.config.terms import parse_term
from detoxrl.data.rows import to_prompts
from detoxrl.errors import TrainingError
from detoxrl.models.loading import load_base, load_tokenizer, scratch_base, scratch_tokenizer
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, sample_all
from detoxrl.models.types import Prompt
from detoxrl.rewards.shaping import Normaliser
from detoxrl.rewards.terms import Reward, ScoredTerm, single_term, text_score
from detoxrl.rl import algorithm
from detoxrl.runtime import cache as cache_module
from detoxrl.runtime.cache import cached, tidy_cache
from detoxrl.runtime.world import World
from detoxrl.training import sft as sft_module
from detoxrl.training import train as train_module
from detoxrl.training.finetune import Tuned, examples, fine_tune, loss_of, pad_batch
from detoxrl.training.learner import Learner
from detoxrl.training.rollout import collect_rollout
from detoxrl.training.train import train
from learning import metrics_of, run_of

T = TypeVar("T")
ROWS = prompted_rows({"train": 64, "validation": 8})


def share_of_e(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
    """A toy reward that any policy can learn: how much of the response is the letter e."""
    return torch.tensor([response.count("e") / max(len(response), 1) for response in responses])


def no_judge(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.linspace(0.4, 0.6, len(texts))


def no_score(prompts: Sequence[str], texts: Sequence[str]) -> torch.Tensor:
    return torch.zeros(len(texts))


def learn(folder: Path, base: Path, config: Config, reward: object = share_of_e) -> list[dict[str, float]]:
    policy = load_policy(str(base), None, policy_config("t5"), config.seed)
    train(run_of(policy, folder, config, reward, no_judge, ROWS))
    return metrics_of(folder)


def learning_config() -> Config:
    small = small_config()
    rl = replace(
        small.rl, steps=30, batch_size=32, minibatch_size=16, microbatch_size=16, kl_coef=0.0, lr=2e-2,
        validate_every=100, update_kl_limit=None,
    )  # fmt: skip
    return replace(small, rl=rl)


@pytest.fixture(scope="module")
def learned(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, float]]]:
    """The metrics of trainings without a KL penalty, by their seed."""
    configs = [replace(learning_config(), seed=seed) for seed in (0, 1, 2)]
    return [learn(tmp_path_factory.mktemp("learned"), bases["t5"], config) for config in configs]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_policy_learns_a_toy_reward(learned: list[list[dict[str, float]]], seed: int) -> None:
    # Without learning (lr 1e-9) a batch never got above 0.12 in 40 steps; learning levels off at 0.43.
    records = learned[seed]
    scores = [record["score/mean"] for record in records]
    assert np.mean(scores[:2]) < 0.12
    assert np.mean(scores[-3:]) > 0.27
    assert records[-1]["kl/reference"] > 0.1


def test_without_a_reason_to_move_the_kl_penalty_holds_the_policy(
    learned: list[list[dict[str, float]]], bases: dict[str, Path], tmp_path: Path
) -> None:
    free = learning_config()
    held = replace(free, rl=replace(free.rl, kl_coef=5.0))
    moved = [record["kl/reference"] for record in learned[free.seed]]
    kept = [record["kl/reference"] for record in learn(tmp_path, bases["t5"], held)]
    assert abs(kept[-1]) < 0.3 * moved[-1]


def test_an_adaptive_coefficient_is_logged_and_moves(bases: dict[str, Path], tmp_path: Path) -> None:
    config = replace(
        learning_config(), rl=replace(learning_config().rl, steps=3, kl_coef=0.1, kl_target=1e-3, kl_horizon=64)
    )
    coefficients = [record["kl_coef"] for record in learn(tmp_path, bases["t5"], config)]
    assert coefficients[0] == 0.1
    assert coefficients[1] == pytest.approx(0.1 * 0.9)
    assert coefficients[2] > coefficients[1]


def test_the_same_seed_gives_the_same_run_and_another_seed_another(bases: dict[str, Path], tmp_path: Path) -> None:
    config = small_config()
    runs = [
        [
            {name: value for name, value in record.items() if "second" not in name}
            for record in learn(tmp_path / name, bases["t5"], replace(config, seed=seed))
        ]
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_the_loop_passes_its_settings_where_they_belong(
    bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, list[object]] = {"gae": [], "ended": [], "groups": []}
    gae = algorithm.gae
    shape_scores = train_module.shape_scores
    adam = torch.optim.AdamW

    def spy_gae(rewards: object, values: object, mask: object, gamma: float, lam: float) -> object:
        asked["gae"].append((gamma, lam))
        return gae(rewards, values, mask, gamma, lam)  # type: ignore[arg-type]

    def spy_scores(raw: object, texts: object, ended: torch.Tensor, *others: object) -> object:
        asked["ended"].append(float(ended.float().mean()))
        return shape_scores(raw, texts, ended, *others)  # type: ignore[arg-type]

    def spy_adam(groups: list[dict[str, object]], **settings: object) -> object:
        asked["groups"].append([(len(group["params"]), group["lr"]) for group in groups])  # type: ignore[arg-type]
        return adam(groups, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(algorithm, "gae", spy_gae)
    monkeypatch.setattr(train_module, "shape_scores", spy_scores)
    monkeypatch.setattr(torch.optim, "AdamW", spy_adam)
    small = small_config()
    config = replace(small, rl=replace(small.rl, gamma=0.9, lam=0.8, lr=1e-3, value_lr=3e-3, steps=4))
    records = learn(tmp_path, bases["t5"], config)
    assert asked["gae"] == [(0.9, 0.8)] * 4
    assert asked["ended"] == [pytest.approx(record["eos_rate"], rel=1e-5) for record in records]
    ((adapter, lr), (head, value_lr)) = asked["groups"][0]  # type: ignore[misc]
    assert (adapter > 2, lr, head, value_lr) == (True, 1e-3, 2, 3e-3)
    assert [record["lr"] for record in records] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4])


def test_every_second_of_a_step_goes_to_a_stage(bases: dict[str, Path], tmp_path: Path) -> None:
    first, second = learn(
        tmp_path, bases["t5"], replace(small_config(), rl=replace(small_config().rl, validate_every=2))
    )
    stages = {"seconds/sample", "seconds/score", "seconds/update", "seconds/checkpoint"}
    assert {key for key in second if "second" in key} == stages | {"seconds/step", "tokens_per_second"}
    assert {key for key in first if "second" in key} - {key for key in second} == {"seconds/validate"}
    for record in (first, second):
        named = sum(record.get(stage, 0.0) for stage in (*stages, "seconds/validate"))
        assert 0.5 * record["seconds/step"] < named <= record["seconds/step"] * 1.001
        tokens = record["response_length/mean"] * 8
        assert record["tokens_per_second"] * record["seconds/step"] == pytest.approx(tokens, rel=1e-4)


def test_the_policy_goes_where_accelerate_says(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[torch.device] = []

    def note(policy: Policy, device: torch.device) -> Policy:
        moved.append(device)
        return policy

    monkeypatch.setattr(World, "device", torch.device("meta"))
    monkeypatch.setattr(Policy, "to", note)
    Learner(run_of(make_policy("t5", "fresh"), tmp_path, small_config(), rows=ROWS))
    assert moved == [torch.device("meta")]


class _InTurn(World):
    """Two processes that do their shares one after the other."""

    def announce(self, method: str, arguments: tuple[object, ...]) -> None:
        pass

    def gather_results(self, compute: Callable[[], T]) -> list[T]:
        results = []
        for rank in range(self.size):
            self.rank = rank
            results.append(compute())
        return results


def test_processes_score_their_shares_and_compare_all_responses(make_policy: Make, tmp_path: Path) -> None:
    same = parse_term("sameness")
    terms = (ScoredTerm(parse_term("function"), share_of_e), ScoredTerm(same, text_score(same, None)))
    learner = Learner(run_of(make_policy("t5", "fresh"), tmp_path, small_config(), Reward(terms), no_judge, ROWS))
    prompts = to_prompts(ROWS["train"][:5])
    responses = ["Eels.", "I see.", "Eels.", "Why?", "I see."]
    # Eels are in the share of the first process alone.
    expected = [[1 / 5, 1 / 4], [2 / 6, 1 / 4], [1 / 5, 1 / 4], [0, 0], [2 / 6, 1 / 4]]
    for world in (World(), _InTurn(size=2)):
        learner.world = world
        assert np.allclose(learner._score(prompts, responses), expected)


def test_validation_draws_the_same_uniforms_at_every_step(bases: dict[str, Path], tmp_path: Path) -> None:
    small = small_config()
    still = replace(small, rl=replace(small.rl, lr=1e-12, steps=3))
    learn(tmp_path, bases["t5"], still)
    with (tmp_path / "validation.jsonl").open() as lines:
        found = [json.loads(line) for line in lines]
    assert [one["step"] for one in found] == [0, 1, 2, 3]
    assert len({one["length"] for one in found}) == 1
    assert 1 < found[0]["length"] <= 12  # words of up to 12 tokens
    toxicity = no_judge([""] * 8)
    assert found[0]["toxicity"] == pytest.approx(toxicity.mean(), rel=1e-5)
    assert found[0]["toxicity_error"] == pytest.approx(toxicity.std(ddof=1) / 8**0.5, rel=1e-5)


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_validation_gives_each_row_its_text_and_measures_score_and_distance(
    make_policy: Make, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy, small, rows = make_policy(name, "loaded"), small_config(), ROWS["validation"]
    judged: list[str] = []
    scored: list[tuple[str, str]] = []

    def judge(texts: Sequence[str]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        judged.extend(texts)
        return no_judge(texts)

    def reward(prompts: Sequence[Prompt], texts: Sequence[str]) -> torch.Tensor:
        scored.extend(zip([prompt.text for prompt in prompts], texts, strict=True))
        return torch.arange(len(texts)).float()

    config = replace(small, generation=replace(small.generation, batch_size=3))
    run = run_of(policy, tmp_path, config, no_score, no_judge, ROWS)
    learner = Learner(run)
    learner.validate(0)
    disturb(policy)
    encode = Mock(wraps=policy.encode)
    monkeypatch.setattr(policy, "encode", encode)
    learner.judge = judge
    learner.reward = single_term(reward)
    found = learner.validate(step=5)
    assert encode.call_count == 0  # each prompt was read once
    assert len({len(row.prompt) for row in rows}) > 3  # batches of like length are not in the order of rows
    alone = [
        collect_rollout(policy, [prompt], config.generation, Draws(config.seed, "validation"))
        for prompt in to_prompts(rows)
    ]
    assert judged == [one.texts[0] for one in alone]
    sampled = sample_all(policy, to_prompts(rows), config.generation, Draws(config.seed, "validation"))
    assert judged == [response.text for (response,) in sampled]
    assert scored == [(row.prompt, text) for row, text in zip(rows, judged, strict=True)]
    assert (found.step, found.score) == (5, 3.5)
    distances = [float((one.responses.logprobs - one.ref_logprobs).sum()) for one in alone]
    assert found.kl == pytest.approx(np.mean(distances), rel=1e-4)
    assert found.kl > 0.5


def test_validation_reads_prompts_again_where_the_encoder_trains(make_policy: Make, tmp_path: Path) -> None:
    policy = make_policy("t5", "loaded")
    policy.train_encoder = True
    learner = Learner(run_of(policy, tmp_path, small_config(), no_score, no_judge, ROWS))
    first = learner.validate(0)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if "encoder" in name and "lora" not in name:
                weight.mul_(1.5)
    assert learner.validate(1).length != first.length


def test_the_baseline_learns_civil_references_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[str, str]] = []

    def fine_tune(tuned: object, pairs: Sequence[tuple[str, str]], *_: object) -> Iterator[object]:
        seen.extend(pairs)
        return iter(())

    monkeypatch.setattr(sft_module, "fine_tune", fine_tune)
    run = run_of(Mock(), tmp_path, small_config(), rows=ROWS)
    sft_module.civil_baseline(run, tmp_path, tmp_path)
    assert [target for _, target in seen] == [row.civil_references[0] for row in ROWS["train"]]


def test_what_fine_tuning_minimises_is_what_the_policy_gives_to_the_targets(fresh: Policy, architecture: str) -> None:
    pairs = [(row.prompt, row.references[0]) for row in ROWS["train"][:3]]
    inputs, labels = examples(fresh.tokenizer, pairs, architecture in ENCODER_DECODERS)
    targets = [torch.tensor([[token for token in row if token >= 0]]) for row in labels]
    assert all(target[0, -1] == fresh.tokenizer.eos_token_id for target in targets)
    found = [
        fresh.logprobs(fresh.encode([prompt]), target, 1.0)[0].flatten()
        for (prompt, _), target in zip(pairs, targets, strict=True)
    ]
    sizes: list[int] = []
    head = fresh.model.get_output_embeddings()
    hook = head.register_forward_hook(lambda _, inputs, logits: sizes.append(logits.shape[1]))
    model_alone = Tuned(fresh.model, fresh.tokenizer)
    loss = loss_of(model_alone, inputs, labels, bf16=False)
    hook.remove()
    torch.testing.assert_close(loss, -torch.cat(found).mean(), rtol=1e-5, atol=1e-6)
    columns = (pad_batch(0, inputs, labels, fresh.device)["labels"] >= 0).any(0)
    first = int(columns.nonzero()[0])
    # A causal model has one more behind the last label.
    expected = len(columns) if architecture in ENCODER_DECODERS else len(columns) - first + 1
    assert sizes == [expected]
    assert fresh.tokenizer.decode(targets[0][0], skip_special_tokens=True).strip() == pairs[0][1]


def test_a_policy_with_a_fast_network_is_fine_tuned_through_it(
    make_policy: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = make_policy("llama", "loaded")
    disturb(policy)
    policy.value_head = None  # Fine-tuning has no critic.
    pairs = [(row.prompt[-30 * number :], row.references[0]) for number, row in enumerate(ROWS["train"][:4], start=1)]
    inputs, labels = examples(policy.tokenizer, pairs, encoder_decoder=False)

    def gradient(tuned: Tuned, bf16: bool) -> tuple[float, torch.Tensor]:
        loss = loss_of(tuned, inputs, labels, bf16)
        parts = torch.autograd.grad(loss, policy.parameters())
        return loss.item(), torch.cat([part.flatten() for part in parts])

    model_alone = Tuned(policy.model, policy.tokenizer)
    loss, exact = gradient(model_alone, bf16=False)
    _, exact_in_bf16 = gradient(model_alone, bf16=True)

    monkeypatch.setattr(policy.model, "forward", Mock(side_effect=AssertionError("the model's own forward pass")))
    fast_loss, found = gradient(Tuned.of(policy), bf16=False)
    assert fast_loss == pytest.approx(loss, rel=1e-5)
    assert (found - exact).norm() < 1e-5 * exact.norm()

    fast_loss, found = gradient(Tuned.of(policy), bf16=True)
    assert fast_loss == pytest.approx(loss, rel=5e-3)
    assert (found - exact).norm() < 1.5 * (exact_in_bf16 - exact).norm()


def test_dropout_of_fine_tuning_follows_from_the_seed(bases: dict[str, Path], tmp_path: Path) -> None:
    pairs = [(row.text, row.references[0]) for row in ROWS["train"]]
    losses: list[list[float]] = [[], [], []]
    for run, seed in enumerate((0, 0, 1)):
        model, tokenizer = load_base(str(bases["t5"]))
        sft = replace(small_config().sft, steps=2, lr=1e-3, batch_size=8)
        config = replace(small_config(), sft=sft, seed=seed)
        losses[run].extend(loss for _, loss in fine_tune(Tuned(model, tokenizer), pairs, config, tmp_path / str(run)))
    assert losses[0] == losses[1] != losses[2]


def test_a_nan_stops_the_run_with_its_step_and_name(bases: dict[str, Path], tmp_path: Path) -> None:
    calls: list[int] = []

    def broken(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        calls.append(len(responses))
        return share_of_e(prompts, responses) * float("nan" if len(calls) in broken_at else 1)

    config = replace(small_config(), reward=RewardConfig(normalise_on=0))
    broken_at = [2]  # 1 is the first validation, 2 the first rollout
    with pytest.raises(TrainingError, match="stopped at step 0: score/mean is nan"):
        learn(tmp_path / "rollout", bases["t5"], config, broken)
    assert (tmp_path / "rollout/adapter/adapter_model.safetensors").exists()
    calls.clear()
    broken_at = [3]
    with pytest.raises(TrainingError, match="stopped at step 1: validation/score is nan"):
        learn(tmp_path / "validation", bases["t5"], config, broken)
    assert json.loads((tmp_path / "validation/checkpoint.json").read_text())["kept_step"] == 0


def test_scores_are_normalised_on_the_reference(
    bases: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = load_policy(str(bases["t5"]), None, policy_config("t5"), 0)
    seen: list[str] = []
    factor = 1.0

    def remember(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        seen.extend(responses)
        return torch.arange(len(responses)).float() * factor

    def normaliser(name: str, config: Config) -> Normaliser:
        run = run_of(policy, tmp_path / name, config, remember, no_judge, ROWS)
        run.folder.root.mkdir()
        return train_module._normaliser(run, Learner(run))

    found = normaliser("first", small_config())
    assert len(seen) == 16
    assert found.means == (7.5,)
    assert "nothing to learn" not in " ".join(capsys.readouterr().err.split())

    disturb(policy)  # The policy moves, its reference does not.
    factor = 0.0
    normaliser("second", small_config())
    assert seen[16:] == seen[:16]
    message = "all 16 responses of the initial policy score 0, so there is nothing to learn from"
    assert message in " ".join(capsys.readouterr().err.split())

    off = replace(small_config(), reward=RewardConfig(normalise_on=0))
    assert normaliser("off", off).stds == (1.0,)
    assert len(seen) == 32


def test_fine_tuning_lowers_the_loss_and_a_nan_stops_it(tmp_path: Path) -> None:
    pairs = [(row.text, row.references[0]) for row in ROWS["train"]]
    tokenizer = scratch_tokenizer([text for pair in pairs for text in pair], vocab_size=1500)
    model = scratch_base(tokenizer, seed=0)
    sft = replace(small_config().sft, steps=30, lr=3e-3, batch_size=8, warmup_steps=2)
    config = replace(small_config(), sft=sft)
    losses: list[float] = []
    losses.extend(loss for _, loss in fine_tune(Tuned(model, tokenizer), pairs, config, tmp_path / "one"))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(TrainingError, match="sft stopped at step 0"):
        next(fine_tune(Tuned(model, tokenizer), pairs, config, tmp_path / "two"))


def test_what_was_trained_once_is_taken_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOXRL_CACHE", str(tmp_path / "cache"))
    built: list[str] = []

    def build(folder: Path) -> None:
        built.append(folder.name)
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_text(str(len(built)))

    cached("base", ["a"], tmp_path / "one", build)
    cached("base", ["a"], tmp_path / "two", build)
    assert built == ["one"]
    assert (tmp_path / "two" / "weights").read_text() == "1"
    cached("base", ["b"], tmp_path / "one", build)
    assert built == ["one", "one"]
    assert (tmp_path / "one" / "weights").read_text() == "2"


def test_every_ingredient_and_the_training_code_are_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    key = cache_module._key(["a", "b"])
    assert key == cache_module._key(["a", "b"])
    assert len({key, cache_module._key(["a", "c"]), cache_module._key(["c", "b"]), cache_module._key(["ab"])}) == 4
    monkeypatch.setattr(cache_module, "_SOURCES", ("training/sft.py",))
    assert cache_module._key(["a", "b"]) != key


def test_two_builds_of_the_same_do_not_collide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOXRL_CACHE", str(tmp_path / "cache"))

    def build(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").touch()

    def slow(folder: Path) -> None:  # another that began later finishes first
        cached("base", ["a"], tmp_path / "other", build)
        build(folder)

    tidy_cache()  # there is none yet
    half = tmp_path / "cache" / ".base-0.new999"  # as one that was killed leaves it
    half.mkdir(parents=True)
    cached("base", ["a"], tmp_path / "one", slow)
    tidy_cache()
    assert (tmp_path / "one" / "weights").exists()
    assert (tmp_path / "other" / "weights").exists()
    assert not half.exists()


def test_a_build_that_fails_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETOXRL_CACHE", str(tmp_path / "cache"))

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        cached("base", ["a"], tmp_path / "one", fail)
    cached("base", ["a"], tmp_path / "one", Path.mkdir)
    assert (tmp_path / "one").is_dir()


def test_targets_of_an_encoder_decoder_end_whether_its_tokenizer_ends_them_or_not(bases: dict[str, Path]) -> None:
    pairs = [("Read.", "Write."), ("Read.", "")]
    adds_none, adds = load_tokenizer(str(bases["gpt2"])), load_tokenizer(str(bases["t5"]))
    assert adds_none("Write.").input_ids[-1] != adds_none.eos_token_id
    for tokenizer in (adds_none, adds):
        _, labels = examples(tokenizer, pairs, encoder_decoder=True)
        assert [row[-1] for row in labels] == [tokenizer.eos_token_id] * 2
        assert [row.count(tokenizer.eos_token_id) for row in labels] == [1, 1]
