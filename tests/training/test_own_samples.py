"""The samples that two baselines learn from: drawn once, ranked by the reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from conftest import Make, prompted_rows, small_config
from detoxrl.data.rows import to_prompts
from detoxrl.errors import StorageError
from detoxrl.models.sampling import Draws, Response, sample_all
from detoxrl.models.types import Prompt
from detoxrl.runtime.randomness import permutation
from detoxrl.training import own_samples as own_samples_module
from detoxrl.training.own_samples import OwnSamples, ScoredResponse, own_samples, sampled_prompts
from detoxrl.training.preferences import preference_pairs
from learning import run_of

ROWS = prompted_rows({"train": 12, "validation": 4})


def own(*scored: tuple[str, float]) -> OwnSamples:
    """Samples of one prompt with these texts and scores."""
    return OwnSamples("prompt", [ScoredResponse(Response(text, [1, 2], -1.0), score) for text, score in scored])


def length(prompts: Sequence[Prompt], responses: Sequence[str]) -> torch.Tensor:
    return torch.tensor([len(prompt.text) + len(text) / 7 for prompt, text in zip(prompts, responses, strict=True)])


def test_best_and_worst_are_by_the_score() -> None:
    samples = own(("b", 2.0), ("a", 1.0), ("d", 4.0), ("c", 3.0))
    assert (samples.best.response.text, samples.worst.response.text) == ("d", "a")
    ((prompt, best, worst),) = preference_pairs([samples])
    assert (prompt, best.text, worst.text) == ("prompt", "d", "a")


def test_a_response_without_words_is_never_the_best_and_always_the_worst() -> None:
    samples = own(("!?", 9.0), ("a", 1.0), ("b", 2.0), ("c", 3.0))
    assert (samples.best.response.text, samples.worst.response.text) == ("c", "!?")


@pytest.mark.parametrize(
    "alike",
    [
        own(("a", 1.0), ("b", 1.0), ("c", 1.0), ("d", 1.0)),
        own(("a", 1.0), ("a", 2.0), ("a", 1.5), ("a", 1.5)),  # A reward may be noisy.
        own(("", 1.0), ("...", 2.0), ("!", 3.0), (" ", 4.0)),
    ],
    ids=["score", "text", "no words"],
)
def test_samples_that_are_alike_make_no_pair(alike: OwnSamples) -> None:
    differing = own(("a", 1.0), ("b", 2.0), ("c", 1.0), ("d", 1.0))
    assert preference_pairs([alike]) == []
    assert len(preference_pairs([alike, differing])) == 1


def test_as_many_samples_are_drawn_as_a_baseline_reads_targets() -> None:
    sft = replace(small_config().sft, baseline_steps=100, batch_size=32)
    assert sampled_prompts(sft, rows=2000) == 800
    assert sampled_prompts(sft, rows=300) == 300
    assert sampled_prompts(replace(sft, baseline_steps=1, batch_size=1), rows=300) == 1
    assert sampled_prompts(replace(sft, baseline_steps=0), rows=300) == 0


@pytest.mark.parametrize("batch_size", [256, 3])
@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_they_are_drawn_once_with_their_tokens_and_scored_with_their_prompt(
    make_policy: Make, name: str, batch_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = small_config()
    config = replace(
        small,
        sft=replace(small.sft, baseline_steps=2, batch_size=16),
        generation=replace(small.generation, batch_size=batch_size),
    )
    policy = make_policy(name, "loaded")
    run = run_of(policy, tmp_path, config, length, rows=ROWS)
    first = own_samples(run, "samples.json")

    order = permutation(config.seed, "expert rows", 0, len(ROWS["train"]))[:8]
    prompts = to_prompts([ROWS["train"][index] for index in order])
    draws = Draws(config.seed, "expert", samples=range(4))
    assert [samples.prompt for samples in first] == [prompt.text for prompt in prompts]
    for prompt, samples in zip(prompts, first, strict=True):
        (alone,) = sample_all(policy, [prompt], config.generation, draws, policy.reference)
        assert [scored.response.ids for scored in samples.samples] == [response.ids for response in alone]
        for response, score in samples.samples:
            assert response.text == policy.tokenizer.decode(response.ids, skip_special_tokens=True).strip()
            ends = [token in policy.eos_token_ids for token in response.ids]
            assert not any(ends[:-1])
            assert ends[-1] or len(ends) == config.generation.max_new_tokens
            assert score == pytest.approx(len(prompt.text) + len(response.text) / 7)

    monkeypatch.setattr(own_samples_module, "sample_all", None)
    assert own_samples(run, "samples.json") == first


def test_a_corrupted_file_names_the_remedy(make_policy: Make, tmp_path: Path) -> None:
    run = run_of(make_policy("t5", "fresh"), tmp_path, small_config(), length, rows=ROWS)
    (tmp_path / "samples.json").write_text("[[")
    with pytest.raises(StorageError, match="remove it, and --resume draws the samples again"):
        own_samples(run, "samples.json")
