"""Which prompts a step takes: in turn, or by how much their responses differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import Make
from detoxrl.config.schema import Config
from detoxrl.models.types import Prompt
from detoxrl.runtime.randomness import batch_indices, weighted_indices
from detoxrl.training import train as train_module
from detoxrl.training.prompt_choice import PromptChoice
from learning import ROWS, loop_config, metrics_of, run_of, share_of_e

PROMPTS = [Prompt(id=f"prompt {number}", text="?" * number) for number in range(12)]
GROUP_SIZE = 4


def config_of(prompt_sampling: str, seed: int = 0, **rl: object) -> Config:
    """A config whose steps take 3 prompts."""
    sizes = {"batch_size": 3 * GROUP_SIZE, "minibatch_size": GROUP_SIZE, "group_size": GROUP_SIZE}
    return replace(loop_config(prompt_sampling=prompt_sampling, **sizes, **rl), seed=seed)


def choice_of(prompt_sampling: str, seed: int = 0) -> PromptChoice:
    return PromptChoice(config_of(prompt_sampling, seed), PROMPTS)


def scores_with(deviations: Sequence[float]) -> torch.Tensor:
    """Scores of groups of four with these population standard deviations, around different means."""
    signs = torch.tensor([-1.0, 1.0, 1.0, -1.0])
    groups = [mean + deviation * signs for mean, deviation in enumerate(deviations)]
    return torch.cat(groups)


def drawn(choice: PromptChoice, steps: int) -> Counter[int]:
    return Counter(index for step in range(steps) for index in choice.indices(step))


def test_uniform_sampling_takes_prompts_in_turn_as_it_did_before() -> None:
    choice = choice_of("uniform", seed=5)
    for step in (0, 1, 7):
        assert choice.indices(step) == batch_indices(5, "prompts", step, 3, len(PROMPTS))
    assert set(drawn(choice, 8).values()) == {2}  # two passes over twelve prompts

    before = choice.indices(3)
    choice.observe(PROMPTS, scores_with([0.0] * 11 + [9.0]))
    assert choice.indices(3) == before
    assert choice.state() == {}


def test_without_groups_a_step_takes_as_many_prompts_as_responses() -> None:
    config = loop_config(batch_size=8, minibatch_size=4)
    assert PromptChoice(config, PROMPTS).indices(2) == batch_indices(config.seed, "prompts", 2, 8, len(PROMPTS))


def test_before_anything_is_known_all_prompts_are_equally_likely() -> None:
    times = drawn(choice_of("varied"), 2000)
    assert sum(times.values()) == 6000
    # 500 each, with a standard deviation of sqrt(2000 * 1/4 * 3/4) = 19
    assert all(abs(times[index] - 500) < 4 * 19.4 for index in range(12))


def test_a_step_takes_different_prompts_the_same_ones_each_time_and_others_by_seed_and_step() -> None:
    choice = choice_of("varied")
    for step in range(50):
        indices = choice.indices(step)
        assert len(set(indices)) == 3
        assert indices == choice_of("varied").indices(step) == sorted(indices)
    by_seed = [choice_of("varied", seed).indices(0) for seed in range(20)]
    by_step = [choice.indices(step) for step in range(20)]
    assert len(set(map(tuple, by_seed))) > 10
    assert len(set(map(tuple, by_step))) > 10


def test_the_draws_are_those_of_the_deviations() -> None:
    # The deviations have mean 2: 3 and 0.6 are taken as they are, 0 is raised to a tenth of the mean, and the prompts
    # that were not taken yet have the mean.
    choice = choice_of("varied", seed=3)
    choice.observe(PROMPTS[:4], scores_with([3.0, 0.6, 0.0, 4.4]))
    weights = np.array([3.0, 0.6, 0.2, 4.4, *[2.0] * 8])
    for step in range(200):
        assert choice.indices(step) == weighted_indices(3, "varied prompts", step, weights, 3)


def test_a_later_observation_replaces_the_earlier_one() -> None:
    choice = choice_of("varied")
    choice.observe(PROMPTS, scores_with([1.0] * 12))
    choice.observe([PROMPTS[7], PROMPTS[2]], scores_with([0.0, 5.0]))
    assert choice.state() == {prompt.id: 1.0 for prompt in PROMPTS} | {"prompt 7": 0.0, "prompt 2": 5.0}


def test_prompts_whose_responses_differ_are_taken_more_often_and_the_others_still() -> None:
    choice = choice_of("varied")
    choice.observe(PROMPTS, scores_with([1.0, 1.0, 1.0, *[0.0] * 9]))
    times = drawn(choice, 400)
    assert min(times[index] for index in range(3)) > 3 * max(times[index] for index in range(3, 12))
    assert min(times[index] for index in range(3, 12)) > 0


def test_groups_of_equal_scores_are_equally_likely() -> None:
    choice = choice_of("varied")
    choice.observe(PROMPTS, scores_with([0.0] * 12))
    even = choice_of("varied")
    assert [choice.indices(step) for step in range(20)] == [even.indices(step) for step in range(20)]

    # A prompt that was not taken yet is then more likely than those.
    choice = choice_of("varied")
    choice.observe(PROMPTS[:-1], scores_with([0.0] * 11))
    times = drawn(choice, 200)
    assert times[11] > 2 * max(times[index] for index in range(11))


def test_a_restored_choice_goes_on_as_the_stored_one() -> None:
    choice = choice_of("varied")
    choice.observe(PROMPTS, scores_with(list(range(12))))
    state = choice.state()
    restored = choice_of("varied")
    restored.restore(state)
    assert restored.state() == state
    steps = range(20)
    assert [restored.indices(step) for step in steps] == [choice.indices(step) for step in steps]
    assert [choice_of("varied").indices(step) for step in steps] != [choice.indices(step) for step in steps]

    # What is observed later changes neither the checkpoint nor the other choice.
    restored.observe(PROMPTS, scores_with([1.0] * 12))
    assert choice.state() == state
    choice.observe(PROMPTS, scores_with([2.0] * 12))
    assert state["prompt 11"] == 11.0


# The draws

WEIGHTS = np.array([8.0, 4.0, 2.0, 1.0, 1.0])
DRAWS = 8000


def shares_of(number: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    taken = np.zeros(len(WEIGHTS))
    for step in range(DRAWS):
        taken[weighted_indices(1, "test", step, WEIGHTS, number)] += 1
    return taken / DRAWS


def inclusion(number: int) -> list[float]:
    """The chance of each row to be among `number` that are drawn one after the other, by enumeration."""
    chances = [0.0] * len(WEIGHTS)

    def draw(rest: list[int], chance: float, left: int) -> None:
        if left == 0:
            return
        total = sum(WEIGHTS[row] for row in rest)
        for row in rest:
            chance_of_row = chance * WEIGHTS[row] / total
            chances[row] += chance_of_row
            draw([other for other in rest if other != row], chance_of_row, left - 1)

    draw(list(range(len(WEIGHTS))), 1.0, number)
    return chances


@pytest.mark.parametrize("number", [1, 2, 3])
def test_rows_are_drawn_one_after_the_other_in_proportion_to_their_weights(number: int) -> None:
    expected = np.array(inclusion(number))
    assert expected.sum() == pytest.approx(number)
    error = np.sqrt(expected * (1 - expected) / DRAWS)
    assert (np.abs(shares_of(number) - expected) < 4 * error).all()


def test_as_many_as_there_are_rows_are_all_rows_once() -> None:
    assert weighted_indices(0, "test", 0, WEIGHTS, 5) == [0, 1, 2, 3, 4]


def test_a_draw_follows_from_seed_stream_and_step_alone_and_a_scale_changes_nothing() -> None:
    def draws(seed: int, stream: str, weights: np.ndarray[tuple[int], np.dtype[np.float64]]) -> list[list[int]]:
        return [weighted_indices(seed, stream, step, weights, 2) for step in range(30)]

    first = draws(0, "one", WEIGHTS)
    assert draws(0, "one", WEIGHTS) == first
    assert draws(0, "one", 1000 * WEIGHTS) == first
    assert draws(1, "one", WEIGHTS) != first
    assert draws(0, "two", WEIGHTS) != first
    assert len(set(map(tuple, first))) > 3


# The loop


def only_one_prompt_varies(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
    """A reward that tells responses apart only if they answer the first row of the training prompts."""
    scores = share_of_e([prompt.text for prompt in prompts], responses)
    varies = torch.tensor([prompt.id == ROWS["train"][0].id for prompt in prompts])
    return torch.where(varies, 1 + scores, 0.0)


def loop(folder: Path, config: Config, make_policy: Make, reward: object) -> PromptChoice:
    """Train, and return the prompt choice at the end."""
    made: list[PromptChoice] = []

    class Recorded(PromptChoice):
        def __init__(self, config: Config, prompts: Sequence[Prompt]) -> None:
            super().__init__(config, prompts)
            made.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "PromptChoice", Recorded)
        train_module.train(run_of(make_policy("gpt2", "fresh"), folder, config, reward))
    return made[-1]


def varied_config(steps: int, clip: float = 10.0) -> Config:
    """A config under which scores are what the reward gives, but for responses without words."""
    config = config_of("varied", algorithm="rloo", steps=steps, validate_every=99)
    reward = replace(config.reward, normalise_on=0, missing_eos_penalty=0.0, empty_score=0.0, clip=clip)
    return replace(config, reward=reward)


@pytest.mark.parametrize("clip", [10.0, 0.0001])
def test_the_loop_notes_the_deviations_of_the_prompts_they_belong_to(
    clip: float, tmp_path: Path, make_policy: Make
) -> None:
    choice = loop(tmp_path, varied_config(steps=8, clip=clip), make_policy, only_one_prompt_varies)
    state = choice.state()
    only = ROWS["train"][0].id
    assert only in state
    assert len(state) > 9
    varied = {prompt for prompt, deviation in state.items() if deviation > 0.001}
    assert varied == ({only} if clip > 1 else set())  # scores as they are after shaping


def test_a_resumed_run_takes_the_prompts_that_the_unbroken_one_takes(tmp_path: Path, make_policy: Make) -> None:
    config = varied_config(steps=5)
    whole = loop(tmp_path / "whole", config, make_policy, reward_by_prompt)
    calls = 0

    def fails_once(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:  # the first validation, and steps 0 to 3
            raise ValueError("the reward fails")
        return reward_by_prompt(prompts, responses)

    with pytest.raises(ValueError, match="the reward fails"):
        loop(tmp_path / "broken", config, make_policy, fails_once)
    assert len(metrics_of(tmp_path / "broken")) == 3
    resumed = loop(tmp_path / "broken", config, make_policy, fails_once)
    assert resumed.state() == whole.state()
    timed = ("seconds", "tokens_per_second")
    for one, other in zip(metrics_of(tmp_path / "whole"), metrics_of(tmp_path / "broken"), strict=True):
        for name, value in one.items():
            assert name.startswith(timed) or value == other[name], name


def reward_by_prompt(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
    """A reward under which the responses to long prompts differ more, so that the deviations matter."""
    lengths = torch.tensor([float(len(prompt.text)) for prompt in prompts])
    return share_of_e([prompt.text for prompt in prompts], responses) * lengths.square()
