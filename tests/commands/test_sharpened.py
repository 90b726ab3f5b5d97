"""The control for sharpening through the command line, where the measured policy is a sharpened initial one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detoxrl.commands import responses
from detoxrl.config.recipes import recipe
from detoxrl.models.loading import load_base, save_base
from detoxrl.models.sampling import Likelihood, Sample
from small_runs import detoxrl, own
from test_data import dialogue
from test_processes import alike, shared_run

# The temperature at which the initial policy is the measured one.
COLD = 0.6
COMMAND = ["evaluate", *own("--policy.base", "sure", "--data.source", "many.jsonl")[1:]]


def scaled(base: Path, folder: Path, factor: float) -> None:
    """Write a T5 whose logits are `factor` times those of another one, after any text."""
    model, tokenizer = load_base(str(base))
    state: Any = model.state_dict()
    state["decoder.final_layer_norm.weight"].mul_(factor)  # has no bias, and nothing but the head follows
    save_base(model, tokenizer, folder)


@pytest.fixture
def models(place: Path, bases: dict[str, Path]) -> Path:
    """A place with `sure`, a model that prefers some tokens, and `cold`, which is that one at temperature 0.6."""
    scaled(bases["t5"], place / "sure", 2)
    scaled(bases["t5"], place / "cold", 2 / COLD)
    rows = [{"dialogue": dialogue(number), "summary": f"They talk about {number}."} for number in range(300)]
    (place / "many.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def evaluate(policy: str, folder: str, *words: str) -> dict[str, Any]:
    """Measure a policy beside `sure` and return eval.json."""
    assert detoxrl([*COMMAND, "--evaluation.prompts", "48", "--policy", policy, "--run-dir", folder, *words]) == 0
    found: dict[str, Any] = json.loads(Path(folder, "eval.json").read_text())
    return found


def test_the_control_is_the_policy_itself_where_that_is_the_sharpened_initial_one(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    found = evaluate("cold", "runs/m")
    assert found["sharpening"]["left_out"] is None
    assert found["sharpening"]["temperature"] == pytest.approx(COLD, abs=0.06)
    control = found["baselines"]["sharpened"]["quality"]
    entropy = found["quality"]["entropy"]
    assert entropy["after"] < 0.8 * entropy["before"]
    assert control["entropy"]["after"] == pytest.approx(entropy["after"], rel=0.1)
    # Both are rated by the initial policy at its own temperature.
    assert control["nll"]["after"] == pytest.approx(found["quality"]["nll"]["after"], rel=0.1)
    assert control["nll"]["after"] > control["entropy"]["after"]
    assert [*found["baselines"]] == ["word_filter", "best_of_4", "best_of_16", "sharpened"]

    temperature = f"{found['sharpening']['temperature']:.2f}"
    assert f"Initial policy at temperature {temperature}" in capsys.readouterr().out
    page = Path("runs/m/report.html").read_text()
    assert f"At temperature {temperature} the initial policy has about the entropy of cold." in page
    samples = [json.loads(line)["responses"] for line in Path("runs/m/samples.jsonl").read_bytes().splitlines()]
    same = sum(one["sharpened"] == one["after"] for one in samples)
    assert same > len(samples) / 3  # the same draws


class _Linear:
    """A sampler of an initial policy whose entropy is twice the temperature, in nats per token."""

    rows = 100
    order = tuple(range(rows))

    def batches(self, rows: Sequence[int], samples: int) -> list[list[int]]:
        assert samples == 1
        return [list(rows)]

    def sample(self, sampling: responses.Sampling, batch: list[int]) -> dict[int, list[Sample]]:
        return {row: [surprise(2 * sampling.temperature)] for row in batch}


def surprise(nats: float) -> Sample:
    """Return a response of 10 tokens of so many nats each."""
    return Sample("x", Likelihood(10, -10 * nats, -10 * nats))


def test_the_fall_of_entropy_is_that_of_all_responses_even_if_the_searched_ones_show_a_rise() -> None:
    settings = {"evaluation.samples_per_prompt": 1, "generation.temperature": 1.0}
    run: Any = SimpleNamespace(config=recipe("own", settings))
    sampler: Any = _Linear()
    before = [[surprise(2.0)] for _ in range(100)]
    # Every second prompt is searched. There the trained policy is less sure by chance; over all it is surer by 0.4.
    after = [[surprise(2.2 if row % 2 == 0 else 1.0)] for row in range(100)]
    found = responses._sharpening(run, sampler, {"before": before, "after": after}, None)
    assert found.temperature == pytest.approx(0.8, abs=0.02)


def test_there_is_none_for_a_policy_that_is_less_sure_or_where_it_is_turned_off(
    models: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    scaled(bases["t5"], models / "warm", 1.5)
    found = evaluate("warm", "runs/w")
    assert "sharpened" not in found["baselines"]
    assert found["sharpening"]["temperature"] is None
    assert found["sharpening"]["left_out"].startswith("the entropy did not fall (")
    assert "There is no control for sharpening: the entropy did not fall (" in Path("runs/w/report.html").read_text()

    found = evaluate("cold", "runs/off", "--evaluation.no-sharpened")
    assert "sharpened" not in found["baselines"]
    assert found["sharpening"] == {"temperature": None, "left_out": "evaluation.sharpened is off"}
    capsys.readouterr()


def test_two_processes_find_the_same_temperature_and_sample_the_same(
    models: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*COMMAND, "--evaluation.prompts", "21", "--generation.batch-size", "8", "--policy", "cold", "--run-dir"]
    assert detoxrl([*words, "one"]) == 0
    code, told = shared_run(2, [*words, "two"], models)
    assert code == 0, told
    one, two = (json.loads((models / folder / "eval.json").read_text()) for folder in ("one", "two"))
    assert one["sharpening"]["temperature"] is not None
    for part in ("sharpening", "toxicity", "quality", "perplexity", "baselines"):
        alike(one[part], two[part])
    capsys.readouterr()


class _Stopped:
    """Lets sampling stop at one of its calls."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.stop_at = 0
        sample = responses.sample_with_likelihoods

        def stopping(*given: Any) -> Any:
            self.calls += 1
            if self.calls == self.stop_at:
                raise KeyboardInterrupt
            return sample(*given)

        patch.setattr(responses, "sample_with_likelihoods", stopping)


@pytest.fixture
def sampling(monkeypatch: pytest.MonkeyPatch) -> _Stopped:
    return _Stopped(monkeypatch)


def test_a_measurement_that_stops_anywhere_ends_as_if_it_had_not(
    models: Path, sampling: _Stopped, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--generation.batch-size", "16", "--evaluation.prompts", "20", "--evaluation.best-of", "4"]
    command = [*COMMAND, *words, "--policy", "cold", "--run-dir"]
    assert detoxrl([*command, "whole"]) == 0
    calls = sampling.calls
    sampled = 10 + 3 + 3  # 16 responses at once: 6 to a prompt before, 2 after and in the control
    assert sampled < calls <= sampled + 5 * 2
    for stop_at in (1, 2, 10, 11, 13, 14, calls - 2, calls - 1, calls):
        folder = f"broken{stop_at}"
        sampling.calls, sampling.stop_at = 0, stop_at
        assert detoxrl([*command, folder]) == 130
        lines = Path(folder, "responses.jsonl")
        if lines.is_file():
            lines.write_bytes(lines.read_bytes() + b'{"policy": "sharpened", "tempera')  # as a kill may leave it
        made = len(lines.read_bytes().splitlines()) - 1 if lines.is_file() else 0
        sampling.calls, sampling.stop_at = 0, 0
        assert detoxrl(["run", "--resume", "--run-dir", folder]) == 0
        assert sampling.calls <= calls - made
        assert stop_at < calls or sampling.calls == 1  # the temperature is not searched again
        require_same_results(Path("whole"), Path(folder))
    capsys.readouterr()


def require_same_results(one: Path, other: Path) -> None:
    """Fail unless two measurements hold the same, timings aside."""
    for name in ("samples.jsonl", "masked_words.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    results = [json.loads((run / "eval.json").read_text()) for run in (one, other)]
    assert {**results[0], "seconds": 0} == {**results[1], "seconds": 0}
