"""What does the initial policy answer to training prompts, and how good is it by the reward?

Two baselines learn from it: one from the best sample of each prompt, the other from the best and the worst.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from detoxrl.config.schema import SftConfig
from detoxrl.data.rows import to_prompts
from detoxrl.models.sampling import Draws, Response, sample_all
from detoxrl.models.types import Prompt
from detoxrl.rewards.shaping import fit_normaliser, is_wordless, overall
from detoxrl.runs import Run
from detoxrl.runtime.console import status
from detoxrl.runtime.files import explain_corruption
from detoxrl.runtime.randomness import permutation

SAMPLES = 4
"""The number of samples of each prompt."""


class ScoredResponse(NamedTuple):
    """A response of the initial policy, and its raw score by the reward."""

    response: Response
    score: float

    @property
    def rank(self) -> float:
        """The score; a response without words is below all others, because it is not civil."""
        return -math.inf if bool(is_wordless([self.response.text])) else self.score


class OwnSamples(NamedTuple):
    """The samples of one prompt."""

    prompt: str
    samples: list[ScoredResponse]

    @property
    def best(self) -> ScoredResponse:
        """The sample with the highest score; of equal ones the first."""
        return max(self.samples, key=lambda sample: sample.rank)

    @property
    def worst(self) -> ScoredResponse:
        """The sample with the lowest score, or one without words; of equal ones the first."""
        return min(self.samples, key=lambda sample: sample.rank)


def sampled_prompts(sft: SftConfig, rows: int) -> int:
    """Return how many of the training rows are sampled: a baseline reads as many targets as there are samples."""
    if sft.baseline_steps == 0:
        return 0
    return min(rows, max(1, sft.baseline_steps * sft.batch_size // SAMPLES))


def own_samples(run: Run, name: str) -> list[OwnSamples]:
    """Return the initial policy's samples of some training prompts.

    They are drawn once and kept in the file `name` of the run folder, so that every baseline has the same ones, also
    after a stop. Raises StorageError when the file is corrupted.
    """
    path = run.folder / name
    if not path.is_file():
        run.folder.write(name, json.dumps(_drawn(run), ensure_ascii=False, allow_nan=False))

    with explain_corruption(path, "remove it, and --resume draws the samples again"):
        stored = json.loads(path.read_text(encoding="utf-8"))
    return [
        OwnSamples(prompt, [ScoredResponse(Response(*response), score) for response, score in samples])
        for prompt, samples in stored
    ]


def _drawn(run: Run) -> list[OwnSamples]:
    config = run.config
    run.load_reward()
    rows = run.rows("train")
    order = permutation(config.seed, "expert rows", 0, len(rows))
    prompts = to_prompts([rows[index] for index in order[: sampled_prompts(config.sft, len(rows))]])

    policy = run.initial_policy().to(run.world.device)
    draws = Draws(config.seed, "expert", samples=range(SAMPLES))
    with status(f"sampling {SAMPLES} responses to each of {len(prompts)} prompts"):
        drawn = sample_all(policy, prompts, config.generation, draws, policy.reference)

    texts = [[response.text for response in responses] for responses in drawn]
    scores = iter(_scores(run, prompts, texts).tolist())
    return [
        OwnSamples(prompt.text, [ScoredResponse(response, next(scores)) for response in responses])
        for prompt, responses in zip(prompts, drawn, strict=True)
    ]


def _scores(run: Run, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]]) -> torch.Tensor:
    """Return the scores (N * SAMPLES,) of the samples of N prompts; several terms are normalised on these samples."""
    compared: list[Prompt] = []
    responses: list[str] = []
    for prompt, samples in zip(prompts, texts, strict=True):
        compared.extend(replace(prompt, initial_response=other) for other in (*samples[1:], samples[0]))
        responses.extend(samples)

    raw = run.reward(compared, responses)
    terms = run.reward.terms
    return overall(raw, terms, fit_normaliser(raw, terms), run.config.reward.clip)
