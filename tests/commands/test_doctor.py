"""The doctor: forecasts by shapes alone, and what it finds before hours are spent."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import RobertaConfig, RobertaForSequenceClassification

from conftest import TARGETS, policy_config
from detoxrl.commands import doctor as doctor_module
from detoxrl.commands import forecast
from detoxrl.commands.forecast import Cost, Meter, Speed, bare_policy, stage_costs
from detoxrl.commands.prepare import prepare_rows
from detoxrl.config.recipes import recipe
from detoxrl.models.loading import load_base, load_tokenizer
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from small_runs import SMALL, contents, detoxrl, own

UNIT = Speed(fp32=1e9, bf16=4e9, weights=5e8, moved=1e9, calls=1e3)


def doctor(*words: str) -> int:
    return detoxrl(["doctor", *own(*words)[1:]])


def test_the_meter_counts_products_bytes_calls_and_what_is_held() -> None:
    a, b = torch.empty(100, 200, device="meta"), torch.empty(200, 300, device="meta")
    with Meter(UNIT) as meter:
        kept = a @ b  # 2 x 100 x 200 x 300 operations; 120,000 bytes are made
        freed = kept * 2
        del freed
        second = kept.t() + 1  # a view, and a sum
    assert meter.calls == 4
    assert meter.peak == 3 * 120_000 - 120_000
    assert meter.held == 2 * 120_000
    product = 2 * 100 * 200 * 300 / 1e9
    sums = 2 * (2 * 120_000) / 1e9
    assert meter.seconds == pytest.approx(product + sums + 4 / 1e3)
    assert second.shape == (300, 100)
    with Meter(UNIT):
        assert int(kept.sum()) == 1
    half = torch.empty(100, 200, device="meta", dtype=torch.bfloat16)
    with Meter(UNIT) as meter:
        half @ half.t()
    assert meter.seconds == pytest.approx(2 * 100 * 200 * 100 / 4e9 + 2 / 1e3, rel=1e-3)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_shapes_alone_give_the_policy_that_is_loaded(bases: dict[str, Path], name: str, full: bool) -> None:
    config = recipe("own", {"policy.base": str(bases[name]), "policy.lora_rank": 4})
    config = replace(config, policy=replace(policy_config(name, full=full), base=str(bases[name])))
    bare = bare_policy(config, load_tokenizer(str(bases[name])))
    loaded = load_policy(str(bases[name]), None, config.policy, seed=0)
    assert [p.shape for p in bare.parameters()] == [p.shape for p in loaded.parameters()]
    assert {p.device.type for p in bare.model.parameters()} == {"meta"}


@pytest.mark.parametrize(("name", "kind"), [("t5", "loaded"), ("t5", "loaded with encoder"), ("gpt2", "loaded")])
def test_shapes_alone_give_the_adapter_to_start_from(
    bases: dict[str, Path], starts: dict[tuple[str, str], Path], name: str, kind: str
) -> None:
    config = recipe("own", {"policy.base": str(bases[name]), "policy.adapter": str(starts[name, kind]),
                            "policy.lora_rank": 16, "policy.lora_targets": ("wo",)})  # fmt: skip
    bare = bare_policy(config, load_tokenizer(str(bases[name])))
    loaded = load_policy(str(bases[name]), starts[name, kind], config.policy, seed=0)
    assert [p.shape for p in bare.parameters()] == [p.shape for p in loaded.parameters()]


def test_the_forecast_of_a_warm_start_is_there_only_where_there_is_one_and_counts_fp32(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(forecast.psutil, "Process", lambda: nothing)

    def sft(**settings: Any) -> Cost:
        config = recipe("own", {"policy.base": str(bases["t5"]), "policy.bf16": True, "rl.batch_size": 64} | settings)
        return stage_costs(config, prepared, [], UNIT)["sft"]

    prepared = prepare_rows(recipe("quickstart", {"data.limit": 128}))
    assert sft() == Cost()
    whole, lora = (sft(**{"sft.steps": 5, "sft.full_weights": full}) for full in (True, False))
    weights = 4 * sum(p.numel() for p in load_base(str(bases["t5"]))[0].parameters())  # bytes in fp32
    assert whole.peak - lora.peak > 3 * weights
    assert whole == sft(**{"sft.steps": 5, "sft.full_weights": True, "policy.bf16": False})


def test_the_forecast_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe("quickstart", {"data.limit": 128, "rl.validation_prompts": 20, "evaluation.prompts": 10})
    passes = (Cost(seconds=0.5, peak=7.0), Cost(seconds=0.125, peak=9.0), Cost(seconds=0.25, peak=8.0))
    monkeypatch.setattr(forecast, "_passes", lambda *_: passes)
    monkeypatch.setattr(forecast, "_judging", lambda *_: Cost(seconds=2.0, peak=3.0))
    monkeypatch.setattr(forecast, "_cost", lambda *_: Cost(seconds=0.75, peak=4.0))
    monkeypatch.setattr(forecast, "bf16_capable", lambda _: False)
    prepared = prepare_rows(config)
    found = stage_costs(config, prepared, [], UNIT)
    # 60 steps of 128, 13 validations of 20, a normaliser of 128; 2 epochs; 2,000 + 2 x 150 sft steps; for each prompt
    # 4 samples by 4 policies, and 16 more of the start.
    made, validated = 60 * 128, 13 * 20
    train = 0.5 * (made + validated + 128) + 0.25 * 2 * made + (0.125 + 2.0) * (made + validated)
    assert found["train"].seconds == train
    assert found["evaluate"].seconds == 10 * (4 * 4 + 16) * 2.5
    assert found["sft"].seconds == (2000 + 300) * 0.75
    bare = {split: [replace(row, civil_reference=None) for row in rows] for split, rows in prepared.rows.items()}
    without = stage_costs(config, replace(prepared, rows=bare), [], UNIT)
    assert without["evaluate"].seconds == 10 * (3 * 4 + 16) * 2.5
    # What is held: this process, the weights, what trains with gradient and moments; the largest pass on top.
    policy = bare_policy(config, prepared.tokenizer)
    whole, trained = (forecast.weight_bytes(weights) for weights in (policy.model, policy))
    assert found["sft"].peak - 4.0 - 4 * whole > 2**28
    assert found["sft"].peak - found["train"].peak == (4 * whole + 4.0) - (whole + 4 * trained + 9.0)
    assert found["train"].peak - found["evaluate"].peak == (4 * trained + 9.0) - (3 * trained + 7.0)


def test_a_longer_response_holds_more_and_takes_longer(bases: dict[str, Path]) -> None:
    def respond(tokens: int, summary: int) -> Cost:
        config = recipe("own", {"policy.base": str(bases["t5"]), "generation.max_new_tokens": tokens})
        rows = prepare_rows(recipe("quickstart", {"data.limit": 128}))
        short = {"train": [replace(row, prompt="Hello.") for row in rows.rows["train"][:8]]}
        prepared = replace(rows, rows=short, account=rows.account | {"summary_tokens": {"p95": summary}})
        policy = bare_policy(config, load_tokenizer(str(bases["t5"])))
        return forecast._passes(policy, config, prepared, UNIT)[0]

    short, long = respond(20, 9), respond(40, 9)
    # Keys and values of 20 more tokens: 2 layers, 8 responses, 32 numbers of 4 bytes each.
    assert long.peak - short.peak >= 20 * 2 * 2 * 8 * 32 * 4
    assert long.seconds == short.seconds  # by time it is the references that count
    assert respond(40, 30).seconds > 2 * long.seconds


def test_memory_and_time_grow_with_what_is_asked_for(place: Path) -> None:
    def cost(**settings: Any) -> dict[str, Cost]:
        config = recipe("own", {"policy.base": "model", "data.source": "mine.jsonl", "rl.batch_size": 8,
                                "rl.minibatch_size": 4, "rl.microbatch_size": 2, **settings})  # fmt: skip
        roberta = RobertaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        with torch.device("meta"):
            classifiers = [RobertaForSequenceClassification(roberta)]
        return stage_costs(config, prepare_rows(config), classifiers, UNIT)

    plain, twice = cost(), cost(**{"rl.steps": 200})
    assert plain["sft"].seconds == 0
    assert 1.9 < twice["train"].seconds / plain["train"].seconds < 2.1
    assert cost(**{"generation.max_new_tokens": 4000})["train"].peak > plain["train"].peak
    assert cost(**{"rl.epochs": 4})["train"].seconds > plain["train"].seconds
    assert cost(**{"sft.steps": 5})["sft"].seconds > 0
    # A baseline on the start's own responses needs no summary.
    assert cost(**{"data.summary_column": None, "sft.baseline_steps": 5})["sft"].seconds > 0


def test_the_doctor_says_what_a_run_takes_and_that_it_would_work_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place)
    assert doctor("--sft.steps", "3", "--sft.no-full-weights") == 0
    shown = capsys.readouterr().out
    assert contents(place) == before
    for words in ("duplicate", "reward.classifier: 2 labels, one softmax",
                  "prompt tokens: median", f"device: cpu ({torch.get_num_threads()} threads)", "in all: about",
                  " parameters train, of ", "disk: up to ", "ready: detoxrl run own"):  # fmt: skip
        assert words in shown, words
    for stage in ("sft", "train", "evaluate"):
        assert re.search(rf"{stage} +\d+\.\d min +\d\.\d GiB", shown), stage
    assert abs(float(re.search(r"KL to the reference at step 0: (\S+) nats", shown)[1])) < 1e-5  # type: ignore[index]
    assert float(re.search(r"first ratios: within (\S+) of 1", shown)[1]) < 1e-5  # type: ignore[index]


def test_a_scratch_base_and_a_function_are_examined_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.source", "mine.jsonl", "--reward.function", "rewards.py:brevity"]
    assert detoxrl(["doctor", "quickstart", *words, *SMALL]) == 0
    assert "ready: detoxrl run quickstart" in capsys.readouterr().out


def _wrong_labels(place: Path) -> list[str]:
    return ["--reward.good-label", "kind"]


def _no_weights_but_a_wrong_judge_label(place: Path) -> list[str]:
    (place / "classifier/model.safetensors").unlink()  # labels are read before any weight
    return ["--reward.toxic-label", "rude"]


@pytest.mark.parametrize(
    ("arrange", "message"),
    [
        (_wrong_labels, "reward.good_label = 'kind': is not a label of the classifier; use one of nothate, hate"),
        (_no_weights_but_a_wrong_judge_label, "reward.toxic_label = 'rude': is not a label of the classifier"),
    ],
)
def test_the_doctor_finds_wrong_labels(
    place: Path, capfd: pytest.CaptureFixture[str], arrange: Any, message: str
) -> None:
    assert doctor(*arrange(place)) == 2
    told = capfd.readouterr().err
    assert message in told
    assert "Traceback" not in told


def test_too_little_memory_or_disk_is_said_before_weights_are_read(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "model/model.safetensors").unlink()
    memory = psutil.virtual_memory()._replace(available=2**20)
    monkeypatch.setattr(doctor_module.psutil, "virtual_memory", lambda: memory)
    assert doctor() == 2
    told = capfd.readouterr().err
    assert re.search(r"memory = '[\d.]+ GiB': is free, and the run wants about \d\.\d GiB; try --policy\.bf16", told)
    monkeypatch.undo()
    monkeypatch.chdir(place)
    disk = psutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(doctor_module.psutil, "disk_usage", lambda _: disk)
    assert doctor() == 2
    told = capfd.readouterr().err
    assert re.search(r"disk = '0 MiB': is free, and the run writes up to \d+ MiB and fetches 0 MiB; make room", told)


def test_a_policy_that_does_not_start_at_its_reference_is_refused(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = doctor_module.checked_policy

    def moved(*args: Any) -> Policy:
        policy = real(*args)
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.5)
        return policy

    monkeypatch.setattr(doctor_module, "checked_policy", moved)
    assert doctor() == 2
    assert "is the KL to its own start in nats, not 0" in capfd.readouterr().err


def test_a_fallback_variable_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    assert doctor() == 0
    assert "PYTORCH_ENABLE_MPS_FALLBACK is set: unset it" in capsys.readouterr().out


class _Doubles(TorchDispatchMode):
    """Collects what makes a float64 tensor: Apple's MPS has none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float64 for value in tree_leaves(out)):
            self.found.add(str(func))
        return out


def test_training_and_scoring_make_no_float64(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with _Doubles() as doubles:
        assert detoxrl(own("--rl.steps", "1")) == 0
    # numpy's uniforms become float32 before they go to the device; judges' numbers become numpy's on the CPU.
    assert doubles.found <= {"aten.alias.default", "aten._to_copy.default", "aten.lift_fresh.default",
                             "aten.detach.default"}, doubles.found  # fmt: skip
    assert json.loads((place / "runs/own/eval.json").read_text())["n_prompts"] == 8
