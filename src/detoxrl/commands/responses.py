"""What do the measured policies answer to the held-out prompts?"""

from collections.abc import Mapping, Sequence
from typing import Any

from detoxrl.data.rows import to_prompts
from detoxrl.errors import require
from detoxrl.evaluation.baselines import Texts
from detoxrl.evaluation.policies import MeasuredPolicies
from detoxrl.evaluation.subjects import TRAINED
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, Likelihood, Sample, batches_by_length, sample_with_likelihoods
from detoxrl.runs import Run
from detoxrl.runtime.console import progress
from detoxrl.runtime.world import together

Samples = Sequence[Sequence[Sample]]
"""N prompts with k responses each."""
RESPONSES = "responses.jsonl"
"""The file of the run folder that keeps samples until all policies are measured."""


def without_likelihoods(texts: Texts) -> list[list[Sample]]:
    """Return samples of texts that no policy of the run wrote."""
    return [[Sample(text, None) for text in of_prompt] for of_prompt in texts]


def sampled_responses(run: Run, given: Mapping[str, str]) -> dict[str, Samples]:
    """Sample every policy on the same prompts with the same uniforms; batches in responses.jsonl are not repeated.

    There is no "after" where training kept the initial policy.
    """
    folder = run.folder
    run.require_warm_start()
    has_after = "after" in given or (folder / TRAINED["after"]).is_dir()
    require(has_after, "run folder", str(folder.root), "has no adapter", "train it first")
    sampler = run.world.build(ResponseSampler, run, dict(given))

    sampled: dict[str, dict[int, list[Sample]]] = {name: {} for name in sampler.names}
    for line in folder.read_lines(RESPONSES):
        if line["policy"] in sampled:
            sampled[line["policy"]].update(_as_samples(line["responses"]))

    rows = len(run.rows("test"))
    counts = {name: sampler.samples_per_prompt(name) for name in sampler.names}
    with progress("sample", rows * sum(counts.values())) as report:
        for name in sampler.names:
            for batch in sampler.batches(skip=len(sampled[name])):
                samples = sampler.sample(name, batch)
                folder.append(RESPONSES, {"policy": name, "responses": list(samples.items())})
                sampled[name].update(samples)
                report(sum(len(sampled[name]) * count for name, count in counts.items()), name)
    return {name: [by_row[row] for row in range(rows)] for name, by_row in sampled.items()}


def _as_samples(responses: Sequence[tuple[int, list[Any]]]) -> dict[int, list[Sample]]:
    """Return samples by row, as a line of responses.jsonl holds them."""
    samples = {}
    for row, of_prompt in responses:
        samples[row] = [Sample(text, Likelihood(*numbers) if numbers else None) for text, numbers in of_prompt]
    return samples


class ResponseSampler:
    """Samples responses of the policies that are measured; all processes of the run share each batch."""

    def __init__(self, run: Run, given: Mapping[str, str]) -> None:
        self.world = run.world
        self._config = run.config
        self._prompts = to_prompts(run.rows("test"))
        self._draws = Draws(run.config.seed, "evaluation")
        trained = {name: run.folder / part for name, part in TRAINED.items() if (run.folder / part).is_dir()}
        self._policies = MeasuredPolicies(run.base, run.adapter, trained, given, run.config)
        # The initial policy rates the responses of the others, so it is always on the device.
        self._on_device: Policy = self._policies.initial.policy.to(self.world.device)
        self.names = list(self._policies.names)
        if run.folder.kept_initial_policy():
            self.names.remove("after")

    def batches(self, skip: int) -> list[list[int]]:
        """Return the rows of each batch, in order of length, without the first `skip` rows of that order."""
        size = self._config.generation.batch_size * self.world.size
        (order,) = batches_by_length(self._prompts, len(self._prompts))
        left = order[skip:]
        return [left[start : start + size] for start in range(0, len(left), size)]

    def samples_per_prompt(self, name: str) -> int:
        """Return how many responses a policy gives to a prompt; the initial one more, from which best-of-n picks."""
        settings = self._config.evaluation
        extra = max(settings.best_of, default=0) if name == "before" else 0
        return settings.samples_per_prompt + extra

    @together
    def sample(self, name: str, batch: list[int]) -> dict[int, list[Sample]]:
        """Return the responses of one policy to some rows, by row."""
        source = self._policies.get(name)
        initial = self._policies.initial
        if source.policy not in (self._on_device, initial.policy):
            self._on_device = source.policy.to(self.world.device)

        mine = self.world.share(batch)
        samples = sample_with_likelihoods(
            source,
            initial if self._policies.has_initial_tokens(source.policy) else None,
            [self._prompts[row] for row in mine],
            self._draws,
            self.samples_per_prompt(name),
            self._config.generation.max_new_tokens,
        )
        responses: dict[int, list[Sample]] = {}
        for part in self.world.gather(dict(zip(mine, samples, strict=True))):
            responses.update(part)
        return responses
