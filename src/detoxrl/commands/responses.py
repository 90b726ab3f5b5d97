"""What do the measured policies answer to the held-out prompts?"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from detoxrl.data.rows import to_prompts
from detoxrl.errors import require
from detoxrl.evaluation.baselines import Texts
from detoxrl.evaluation.identity_sentences import identity_rows
from detoxrl.evaluation.likelihood import mean_entropy
from detoxrl.evaluation.policies import MeasuredPolicies, prompts_for
from detoxrl.evaluation.sharpening import SHARPENED, Sharpening, matching_temperature
from detoxrl.evaluation.subjects import TRAINED, WITH_TOP_P
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws, Likelihood, Sample, batches_by_length, sample_with_likelihoods
from detoxrl.runs import Run
from detoxrl.runtime.console import progress
from detoxrl.runtime.run_folder import RunFolder
from detoxrl.runtime.world import together

Samples = Sequence[Sequence[Sample]]
"""N prompts with k responses each."""
RESPONSES = "responses.jsonl"
"""The file of the run folder that keeps samples until all policies are measured."""
# The most prompts on which the temperature of the control for sharpening is searched.
_SEARCH_PROMPTS = 64


def without_likelihoods(texts: Texts) -> list[list[Sample]]:
    """Return samples of texts that no policy of the run wrote."""
    return [[Sample(text, None) for text in of_prompt] for of_prompt in texts]


class Sampling(NamedTuple):
    """Which policy gives how many responses to a prompt, at which temperature, from which share of probability."""

    policy: str
    samples: int
    temperature: float
    top_p: float = 1.0


class Sampled(NamedTuple):
    """The samples of each policy by name, and what the control for sharpening is."""

    samples: dict[str, Samples]
    sharpening: Sharpening
    identity_texts: dict[str, dict[str, list[str]]]  # By policy: the responses to each sentence's prompt.


def sampled_responses(run: Run, given: Mapping[str, str]) -> Sampled:
    """Sample every policy on the same prompts with the same uniforms; batches in responses.jsonl are not repeated.

    There is no "after" where training kept the initial policy.
    """
    run.require_warm_start()
    has_after = "after" in given or (run.folder / TRAINED["after"]).is_dir()
    require(has_after, "run folder", str(run.folder.root), "has no adapter", "train it first")
    sampler = run.world.build(ResponseSampler, run, dict(given))

    samplings = sampler.samplings()
    settings = run.config.evaluation
    identity_samplings = sampler.identity_samplings()
    planned = sum(sampling.samples for sampling in samplings.values()) * sampler.rows
    planned += settings.samples_per_prompt * sampler.rows if settings.sharpened else 0
    planned += sum(sampling.samples for sampling in identity_samplings.values()) * len(sampler.identity_order)
    with progress("sample", planned) as report:
        collection = _Collection(run.folder, sampler, report)
        samples = {name: collection.complete(name, sampling) for name, sampling in samplings.items()}
        sharpening = _sharpening(run, sampler, samples, collection.temperature)
        if sharpening.temperature is not None:
            sampling = Sampling("before", settings.samples_per_prompt, sharpening.temperature)
            samples[SHARPENED] = collection.complete(SHARPENED, sampling)

        identity_texts = {}
        for name, sampling in identity_samplings.items():
            answered = collection.complete(name, sampling, sampler.identity_order)
            texts = [[sample.text for sample in of_prompt] for of_prompt in answered]
            identity_texts[name] = dict(zip(sampler.identity_sentences, texts, strict=True))
    return Sampled(samples, sharpening, identity_texts)


class _Collection:
    """The samples that a run folder holds, and those that are added to it."""

    def __init__(self, folder: RunFolder, sampler: "ResponseSampler", report: Callable[[int, str], None]) -> None:
        self.temperature: float | None = None  # That of the control for sharpening, once it was found.
        self._folder = folder
        self._sampler = sampler
        self._report = report
        self._done = 0  # Responses, those that the folder holds included.
        self._by_row: dict[str, dict[int, list[Sample]]] = {}
        for line in folder.read_lines(RESPONSES):
            self._by_row.setdefault(line["policy"], {}).update(_as_samples(line["responses"]))
            if line["policy"] == SHARPENED:
                self.temperature = line["temperature"]

    def complete(self, name: str, sampling: Sampling, order: Sequence[int] | None = None) -> Samples:
        """Return the samples of a policy on the rows in `order`, by row; None: on all held-out rows.

        The batches that the folder lacks are sampled now, in that order.
        """
        order = self._sampler.order if order is None else order
        by_row = self._by_row.setdefault(name, {})
        missing = [row for row in order if row not in by_row]
        self._done += (len(order) - len(missing)) * sampling.samples
        for batch in self._sampler.batches(missing, sampling.samples):
            sampled = self._sampler.sample(sampling, batch)
            record = {"policy": name, "temperature": sampling.temperature, "responses": list(sampled.items())}
            self._folder.append(RESPONSES, record)
            by_row.update(sampled)
            self._done += len(batch) * sampling.samples
            self._report(self._done, name)
        return [by_row[row] for row in sorted(order)]


def _as_samples(responses: Sequence[tuple[int, list[Any]]]) -> dict[int, list[Sample]]:
    """Return samples by row, as a line of responses.jsonl holds them."""
    samples = {}
    for row, of_prompt in responses:
        samples[row] = [Sample(text, Likelihood(*numbers) if numbers else None) for text, numbers in of_prompt]
    return samples


def _sharpening(
    run: Run, sampler: "ResponseSampler", samples: Mapping[str, Samples], found_before: float | None
) -> Sharpening:
    """Return the temperature of the control for sharpening, or why there is no control.

    It follows from the samples and the seed, so a search that was interrupted is made again with the same result.
    """
    settings = run.config.evaluation
    if not settings.sharpened:
        return Sharpening(None, "evaluation.sharpened is off")
    if "after" not in samples:
        return Sharpening(None, "training kept the initial policy")

    initial = mean_entropy([of_prompt[: settings.samples_per_prompt] for of_prompt in samples["before"]])
    trained = mean_entropy(samples["after"])
    if initial is None or trained is None:
        return Sharpening(None, "the two policies have different tokens")
    if trained >= initial:
        return Sharpening(None, f"the entropy did not fall ({initial:.3f} to {trained:.3f} nats per token)")
    return Sharpening(found_before or _search(run, sampler, samples["before"], trained / initial), None)


def _search(run: Run, sampler: "ResponseSampler", before: Samples, share: float) -> float:
    """Return the temperature at which the initial policy keeps this share of its entropy per token, in (0, 1).

    It is searched on the first sample of each of some prompts, with the draws of "before". The share comes from all
    responses: on a few dozen of them the entropy of "after" may lie above that of "before" by chance.
    """
    rows = sampler.order[:: -(-sampler.rows // _SEARCH_PROMPTS)]

    def first_entropy(samples: Mapping[int, Sequence[Sample]] | Samples) -> float:
        entropy = mean_entropy([samples[row][:1] for row in rows])
        assert entropy is not None  # All these samples have likelihoods.
        return entropy

    def entropy_at(temperature: float) -> float:
        sampled: dict[int, list[Sample]] = {}
        for batch in sampler.batches(rows, samples=1):
            sampled.update(sampler.sample(Sampling("before", 1, temperature), batch))
        return first_entropy(sampled)

    start = run.config.generation.temperature
    start_entropy = first_entropy(before)
    return matching_temperature(entropy_at, start, start_entropy, share * start_entropy)


class ResponseSampler:
    """Samples responses of the policies that are measured; all processes of the run share each batch."""

    def __init__(self, run: Run, given: Mapping[str, str]) -> None:
        self.world = run.world
        self._config = run.config
        trained = {name: run.folder / part for name, part in TRAINED.items() if (run.folder / part).is_dir()}
        self._policies = MeasuredPolicies(run.base, run.adapter, trained, given, run.config)
        # The initial policy rates the responses of the others, so it is always on the device.
        self._on_device: Policy = self._policies.initial.policy.to(self.world.device)
        self._names = list(self._policies.names)
        if run.folder.kept_initial_policy():
            self._names.remove("after")

        held_out = run.rows("test")
        self.rows = len(held_out)
        self._rows = held_out
        self._prompts = to_prompts(held_out)
        (self.order,) = batches_by_length(self._prompts, self.rows)
        self.identity_sentences: list[str] = []
        self.identity_order: list[int] = []  # The rows behind the held-out ones.
        if run.config.evaluation.identity_prompts > 0:
            self._add_identity_rows()

    def _add_identity_rows(self) -> None:
        """Add the generated prompts of the audit, in the template that the initial policy reads."""
        rows = identity_rows(self._config.data.task, self._config.evaluation.identity_prompts)
        self.identity_sentences = list(rows)
        base = self._config.policy.base
        prompts = prompts_for(self._policies.initial.policy, list(rows.values()), self._config, base)
        (order,) = batches_by_length(prompts, len(prompts))
        self.identity_order = [self.rows + index for index in order]
        self._rows = [*self._rows, *rows.values()]
        self._prompts = [*self._prompts, *prompts]

    def samplings(self) -> dict[str, Sampling]:
        """Return how each policy is sampled, by name. The initial one gives more, from which best-of-n picks."""
        settings = self._config.evaluation
        temperature = self._config.generation.temperature
        samplings = {name: Sampling(name, settings.samples_per_prompt, temperature) for name in self._names}
        pool = max(settings.best_of, default=0) * settings.best_of_samples
        samplings["before"] = Sampling("before", settings.samples_per_prompt + pool, temperature)
        if settings.top_p is not None:
            for name in ("before", "after"):
                if name in self._names:
                    sampling = Sampling(name, settings.samples_per_prompt, temperature, settings.top_p)
                    samplings[WITH_TOP_P[name]] = sampling
        return samplings

    def identity_samplings(self) -> dict[str, Sampling]:
        """Return how the prompts of the audit are sampled: by the initial and the trained policy, if at all."""
        settings = self._config.evaluation
        temperature = self._config.generation.temperature
        names = [name for name in ("before", "after") if name in self._names and self.identity_order]
        return {name: Sampling(name, settings.samples_per_prompt, temperature) for name in names}

    def batches(self, rows: Sequence[int], samples: int) -> list[list[int]]:
        """Return rows in batches that all processes share, so small that each has one pass of so many samples a row.

        A stop loses no more than a batch.
        """
        prompts = max(1, self._config.generation.batch_size // samples)
        size = prompts * self.world.size
        return [list(rows[start : start + size]) for start in range(0, len(rows), size)]

    @together
    def sample(self, sampling: Sampling, batch: list[int]) -> dict[int, list[Sample]]:
        """Return the responses of one policy to some rows, by row."""
        distribution = self._policies.get(sampling.policy)._replace(
            temperature=sampling.temperature, top_p=sampling.top_p
        )
        policy = distribution.policy
        initial = self._policies.initial
        if policy not in (self._on_device, initial.policy):
            self._on_device = policy.to(self.world.device)

        mine = self.world.share(batch)
        prompts = [self._prompts[row] for row in mine]
        rates = self._policies.has_initial_tokens(policy)
        if self._policies.reads_another_template(policy):
            # The initial policy would read a template that is not its own, so it says nothing of these responses.
            prompts = prompts_for(policy, [self._rows[row] for row in mine], self._config, sampling.policy)
            rates = False
        samples = sample_with_likelihoods(
            distribution,
            initial if rates else None,
            prompts,
            Draws(self._config.seed, "evaluation", samples=range(sampling.samples)),
            self._config.generation,
        )
        responses: dict[int, list[Sample]] = {}
        for part in self.world.gather(dict(zip(mine, samples, strict=True))):
            responses.update(part)
        return responses
