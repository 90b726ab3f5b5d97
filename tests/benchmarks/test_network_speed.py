"""Does the benchmark of networks time each of them on the same work?"""

from __future__ import annotations

import pytest

import network_speed
from detoxrl.models.llama import LlamaNetwork, LlamaSteps
from detoxrl.models.plain import PlainNetwork, PlainSteps
from network_speed import Case


def test_both_networks_do_each_part_once_a_round(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: dict[str, int] = {}
    for owner, method in (
        (LlamaNetwork, "logprobs"), (PlainNetwork, "logprobs"), (LlamaSteps, "next"), (PlainSteps, "next"),
    ):  # fmt: skip
        name = f"{owner.__name__}.{method}"
        function = getattr(owner, method)

        def counting(*arguments: object, name: str = name, function: object = function) -> object:
            calls[name] = calls.get(name, 0) + 1
            return function(*arguments)  # type: ignore[operator]

        monkeypatch.setattr(owner, method, counting)

    monkeypatch.setattr(network_speed, "CASES", (Case(prompts=4, prompt=6, group_size=8, response=5),))
    monkeypatch.setattr("sys.argv", ["network_speed.py", "--size", "tiny", "--rounds", "2"])
    network_speed.main()

    # A pass under the reference, and two of two groups with gradients, in each of two rounds.
    assert calls["PlainNetwork.logprobs"] == 2 * (1 + 2)
    # And one of fine-tuning, which calls the model itself elsewhere.
    assert calls["LlamaNetwork.logprobs"] == 2 * (1 + 2 + 1)
    assert 2 <= calls["LlamaSteps.next"] == calls["PlainSteps.next"] <= 2 * 5
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| 4 x 8, 6 -> 5")]
    assert [row.split(" | ")[1] for row in rows] == ["sample", "reference", "update", "fine-tune"]
