"""Does the benchmark of networks time each of them on the same work, and does the gate notice what becomes slower?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import network_speed
import speed_gate
from detoxrl.models.llama import LlamaNetwork, LlamaSteps
from detoxrl.models.plain import PlainNetwork, PlainSteps
from detoxrl.models.t5 import T5Network, T5Steps
from network_speed import LLAMA, T5, Case, Measured, parts

LLAMA_CASE = Case(LLAMA, prompts=4, prompt=6, group_size=8, response=5, shortest=5)
T5_CASE = Case(T5, prompts=3, prompt=6, group_size=2, response=5, shortest=2)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often each network was called in a benchmark of two tiny cases."""
    counts: dict[str, int] = {}
    for owner, method in (
        (LlamaNetwork, "logprobs"), (T5Network, "logprobs"), (PlainNetwork, "logprobs"),
        (LlamaSteps, "next"), (T5Steps, "next"), (PlainSteps, "next"),
    ):  # fmt: skip
        name = f"{owner.__name__}.{method}"
        function = getattr(owner, method)

        def counting(*arguments: object, name: str = name, function: object = function) -> object:
            counts[name] = counts.get(name, 0) + 1
            return function(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(owner, method, counting)
    monkeypatch.setattr(network_speed, "CASES", (LLAMA_CASE, T5_CASE))
    return counts


def test_both_networks_do_each_part_once_a_round(
    calls: dict[str, int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["network_speed.py", "--size", "tiny", "--rounds", "2"])
    network_speed.main()

    # In each of two rounds: a pass under the reference, and with gradients two of two groups of the Llama, one of T5's.
    assert calls["PlainNetwork.logprobs"] == 2 * (1 + 2) + 2 * (1 + 1)
    # And one of fine-tuning, which calls the model itself elsewhere.
    assert calls["LlamaNetwork.logprobs"] == 2 * (1 + 2 + 1)
    assert calls["T5Network.logprobs"] == 2 * (1 + 1)
    assert calls["LlamaSteps.next"] == calls["T5Steps.next"] == 2 * 5
    assert calls["PlainSteps.next"] == 2 * 2 * 5

    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| SmolLM2-135M, 4")]
    assert [row[1] for row in rows] == ["sample", "reference", "update", "fine-tune", "all but fine-tuning"]
    assert rows[0][0] == "| SmolLM2-135M, 4 x 8, 6 -> 5"


def test_responses_have_the_lengths_of_the_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = network_speed.make_policy(tmp_path, T5, is_tiny=True, bf16=False)
    masks: list[torch.Tensor] = []
    logprobs = policy.logprobs

    def noted(*arguments: object) -> object:
        masks.append(arguments[4])  # type: ignore[arg-type]
        return logprobs(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(policy, "logprobs", noted)
    parts(policy, T5_CASE)["reference"]()
    assert sorted(masks[0].sum(1).tolist()) == [2, 3, 3, 4, 4, 5]
    assert T5_CASE.label == "FLAN-T5-base, 3 x 2, 6 -> 2 to 5"


# The gate


@pytest.fixture
def ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The ratios that the next measurements find, one for each; nothing is stored yet."""
    found: list[float] = []

    def cases(is_tiny: bool, bf16: bool, rounds: int) -> list[Measured]:
        assert not bf16
        return [Measured(T5_CASE, "sample", plain=[found.pop(0)] * rounds, own=[1.0] * rounds)]

    monkeypatch.setattr(speed_gate, "measure_cases", cases)
    monkeypatch.setattr(speed_gate, "STORED", tmp_path / "ratios.json")
    return found


def gate(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr("sys.argv", ["speed_gate.py", *words])
    with pytest.raises(SystemExit) as ended:
        speed_gate.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    ("found", "code"), [([1.5], 0), ([1.36], 0), ([1.34, 1.4], 0), ([1.34, 1.2], 1), ([3.0], 0)], ids=str
)
def test_a_ratio_may_fall_by_a_tenth(
    ratios: list[float], found: list[float], code: int, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    ratios.append(1.5)
    monkeypatch.setattr("sys.argv", ["speed_gate.py", "--keep"])
    speed_gate.main()
    ratios += found
    assert gate(monkeypatch) == code
    assert ratios == []
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == (f"{T5_CASE.label}: sample: 1.50 has become 1.34" if code else "nothing has become slower")


def test_another_kind_of_processor_has_no_ratios_yet(
    ratios: list[float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ratios.append(1.5)
    monkeypatch.setattr("sys.argv", ["speed_gate.py", "--keep"])
    speed_gate.main()
    monkeypatch.setattr(speed_gate, "kind_of_processor", lambda: "of another kind")
    assert gate(monkeypatch) == 1
    assert "nothing is stored for of another kind: run it with --keep" in capsys.readouterr().out
    ratios.append(1.2)
    monkeypatch.setattr("sys.argv", ["speed_gate.py", "--keep"])
    speed_gate.main()
    stored = json.loads(speed_gate.STORED.read_text())
    assert sorted(of_kind["ratios"][f"{T5_CASE.label}: sample"] for of_kind in stored.values()) == [1.2, 1.5]


def test_a_case_that_is_gone_counts_as_fallen() -> None:
    assert speed_gate.fallen({"it": 1.0}, {}) == ["it"]
