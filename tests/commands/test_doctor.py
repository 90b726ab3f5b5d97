"""The doctor: memory from shapes, time from measured steps, and the checks it makes before a run."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, PreTrainedModel, RobertaConfig, RobertaForSequenceClassification

from conftest import TARGETS, policy_config
from detoxrl.commands import doctor as doctor_module
from detoxrl.commands import forecast, timing
from detoxrl.commands.forecast import Meter, bare_policy, stage_memory
from detoxrl.commands.prepare import Prepared, precision_notice, prepare_rows
from detoxrl.commands.timing import Timed
from detoxrl.commands.workload import StepSeconds, stage_seconds
from detoxrl.config.recipes import recipe
from detoxrl.data.rows import Row
from detoxrl.evaluation.judges import memoized
from detoxrl.models.kernels import PUBLIC, Kernels, using_kernels
from detoxrl.models.llama import LlamaNetwork, LlamaSteps
from detoxrl.models.loading import load_base, load_tokenizer
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.t5 import T5Network, T5Steps
from detoxrl.runs import Run
from learning import run_of
from small_runs import SMALL, contents, detoxrl, own

STEP = StepSeconds(sample=0.5, reference=0.125, score=0.25, update=4.0, judges=[2.0, 8.0], finetune=0.75)


def doctor(*words: str) -> int:
    return detoxrl(["doctor", *own(*words)[1:]])


def base_flags(bases: dict[str, Path], name: str) -> list[str]:
    return ["--policy.base", str(bases[name]), "--policy.lora-targets", *TARGETS[name]]


@pytest.fixture
def prepared() -> Prepared:
    return prepare_rows(recipe("quickstart", {"data.limit": 128}))


# Memory


def test_the_meter_counts_the_bytes_that_are_held_at_once() -> None:
    a = torch.empty(100, 200, device="meta")
    b = torch.empty(200, 300, device="meta")
    with Meter() as meter:
        product = a @ b  # 120,000 bytes
        released = product * 2
        del released
        total = product.t() + 1  # A view has no bytes of its own.

    assert meter.peak == 2 * 120_000
    assert meter.held == 2 * 120_000
    assert total.shape == (300, 100)
    with Meter():
        assert int(product.sum()) == 1


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", TARGETS)
def test_the_policy_from_shapes_is_that_which_is_loaded(bases: dict[str, Path], name: str, full: bool) -> None:
    config = recipe("own", {"policy.base": str(bases[name]), "policy.lora_rank": 4})
    config = replace(config, policy=replace(policy_config(name, full=full), base=str(bases[name])))
    bare = bare_policy(config, load_tokenizer(str(bases[name])))
    loaded = load_policy(str(bases[name]), None, config.policy, seed=0)
    assert [p.shape for p in bare.parameters()] == [p.shape for p in loaded.parameters()]
    assert {p.device.type for p in bare.model.parameters()} == {"meta"}


@pytest.mark.parametrize(("name", "kind"), [("t5", "loaded"), ("t5", "loaded with encoder"), ("gpt2", "loaded")])
def test_the_initial_adapter_from_shapes_is_that_which_is_loaded(
    bases: dict[str, Path], starts: dict[tuple[str, str], Path], name: str, kind: str
) -> None:
    config = recipe("own", {"policy.base": str(bases[name]), "policy.adapter": str(starts[name, kind]),
                            "policy.lora_rank": 16, "policy.lora_targets": ("wo",)})  # fmt: skip
    bare = bare_policy(config, load_tokenizer(str(bases[name])))
    loaded = load_policy(str(bases[name]), starts[name, kind], config.policy, seed=0)
    assert [p.shape for p in bare.parameters()] == [p.shape for p in loaded.parameters()]


def test_memory_of_a_warm_start_is_counted_in_fp32_and_only_if_there_is_one(
    bases: dict[str, Path], prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(forecast.psutil, "Process", lambda: process)

    def sft(**settings: Any) -> float:
        config = recipe("own", {"policy.base": str(bases["t5"]), "policy.bf16": True, "rl.batch_size": 64, **settings})
        return stage_memory(config, prepared, [])["sft"]

    assert sft() == 0
    whole = sft(**{"sft.steps": 5, "sft.full_weights": True})
    lora = sft(**{"sft.steps": 5, "sft.full_weights": False})
    fp32_bytes = 4 * sum(p.numel() for p in load_base(str(bases["t5"]))[0].parameters())
    assert whole - lora > 3 * fp32_bytes
    assert whole == sft(**{"sft.steps": 5, "sft.full_weights": True, "policy.bf16": False})


@pytest.mark.parametrize("name", ["t5", "gpt2"])
def test_memory_falls_where_activations_are_recomputed(bases: dict[str, Path], prepared: Prepared, name: str) -> None:
    def update_and_finetuning(checkpointing: bool) -> tuple[float, float]:
        config = recipe("own", {"policy.base": str(bases[name]), "policy.lora_targets": TARGETS[name],
                                "policy.checkpointing": checkpointing, "sft.steps": 5})  # fmt: skip
        policy = bare_policy(config, load_tokenizer(str(bases[name])))
        _, _, update = forecast._policy_peaks(policy, config, prepared)
        return update, forecast._finetuning_peak(policy, config, prepared)

    for recomputing, keeping in zip(update_and_finetuning(True), update_and_finetuning(False), strict=True):
        assert recomputing < 0.9 * keeping


def test_the_update_of_a_group_holds_its_prompt_once(bases: dict[str, Path], prepared: Prepared) -> None:
    def update(group_size: int) -> float:
        settings = {"policy.base": str(bases["gpt2"]), "policy.lora_targets": TARGETS["gpt2"],
                    "rl.algorithm": "ppo", "rl.group_size": group_size, "rl.microbatch_size": 8,
                    "generation.max_new_tokens": 8}  # fmt: skip
        config = recipe("own", settings)
        policy = bare_policy(config, load_tokenizer(str(bases["gpt2"])))
        return forecast._policy_peaks(policy, config, prepared)[2]

    assert update(4) < 0.7 * update(1)
    assert update(16) == update(8)  # A microbatch of 8 is half of a group of 16.


def test_weights_in_bfloat16_are_computed_in_float32_only_with_a_notice() -> None:
    cpu = torch.device("cpu")
    both = recipe("quickstart", {"policy.base": "it", "policy.bf16": True, "reward.bf16": True})
    reward = recipe("quickstart", {"reward.bf16": True})
    with using_kernels(PUBLIC):
        assert precision_notice(both, cpu) == (
            "policy.bf16 and reward.bf16: this processor multiplies float32 faster, so their weights are stored in "
            "bfloat16 and multiplied in float32"
        )
        assert precision_notice(reward, cpu).startswith("reward.bf16: this processor multiplies float32 faster, so its")
        assert precision_notice(recipe("quickstart"), cpu) == ""
        assert precision_notice(both, torch.device("cuda")) == ""
    with using_kernels(Kernels(onednn=False, packed=False, bf16=True)):
        assert precision_notice(both, cpu) == ""


def test_memory_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe("quickstart", {"data.limit": 128, "rl.validation_prompts": 20, "evaluation.prompts": 10})
    monkeypatch.setattr(forecast, "_policy_peaks", lambda *_: (7.0, 9.0, 8.0))
    monkeypatch.setattr(forecast, "_judging_peak", lambda *_: 3.0)
    monkeypatch.setattr(forecast, "_packed_bytes", lambda _: 5)
    monkeypatch.setattr(forecast, "_peak", lambda _: 4.0)
    monkeypatch.setattr(forecast, "bf16_capable", lambda _: False)
    prepared = prepare_rows(config)
    peaks = stage_memory(config, prepared, [])

    # Held are this process, the weights, and of what trains gradient and moments. The largest pass comes on top.
    policy = bare_policy(config, prepared.tokenizer)
    whole = forecast.weight_bytes(policy.model)
    trained = forecast.weight_bytes(policy)
    assert peaks["sft"] - 4.0 - 4 * whole > 2**28
    assert peaks["sft"] - peaks["train"] == (4 * whole + 4.0) - (whole + 5 + 4 * trained + 9.0)
    assert peaks["train"] - peaks["evaluate"] == (4 * trained + 9.0) - (4 * trained + 7.0)


def test_memory_of_a_baseline_on_own_samples_is_that_of_sampling_or_of_an_update(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prepared = prepare_rows(recipe("quickstart", {"data.limit": 128, "evaluation.prompts": 10}))

    def sft(baseline_steps: int, *peaks: float) -> float:
        monkeypatch.setattr(forecast, "_policy_peaks", lambda *_: peaks)
        config = recipe("quickstart", {"data.limit": 128, "sft.baseline_steps": baseline_steps})
        return stage_memory(config, prepared, [])["sft"]

    small = sft(0, 2.0**40, 0.0, 2.0**40)
    assert small < 2**35
    assert sft(100, 0.0, 2.0**40, 0.0) == pytest.approx(small, rel=0.01)  # The reference reads nothing here.
    assert sft(100, 2.0**40, 0.0, 0.0) > 2**40
    assert sft(100, 0.0, 0.0, 2.0**40) > 2**40


@pytest.mark.parametrize(("name", "kv_numbers"), [("t5", 2 * 2 * 32), ("llama", 2 * 2 * 16), ("gpt2", 2 * 2 * 32)])
def test_a_longer_response_holds_its_keys_and_values_too(
    bases: dict[str, Path], prepared: Prepared, name: str, kv_numbers: int
) -> None:
    rows = {"train": [replace(row, prompt="Hello.") for row in prepared.rows["train"][:8]]}
    prepared = replace(prepared, rows=rows)

    def sampling(tokens: int) -> float:
        config = recipe("own", {"policy.base": str(bases[name]), "policy.lora_targets": TARGETS[name],
                                "generation.max_new_tokens": tokens})  # fmt: skip
        policy = bare_policy(config, load_tokenizer(str(bases[name])))
        return forecast._policy_peaks(policy, config, prepared)[0]

    # 2 layers have keys and values in 4 bytes a number, for 20 more tokens of 8 responses.
    more = sampling(40) - sampling(20)
    assert 20 * 8 * 4 * kv_numbers <= more < 1.5 * 20 * 8 * 4 * kv_numbers


@pytest.mark.parametrize("name", ["t5", "llama", "gpt2"])
@pytest.mark.parametrize("has_kernel", [True, False])
def test_packed_copies_of_the_weights_count_where_sampling_makes_them(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, has_kernel: bool
) -> None:
    config = recipe("own", {"policy.base": str(bases[name]), "policy.lora_targets": TARGETS[name]})
    policy = bare_policy(config, load_tokenizer(str(bases[name])))
    monkeypatch.setattr(forecast, "packed_dtype_on_cpu", lambda stored: stored if has_kernel else None)
    model = policy.weights.active
    head = model.get_output_embeddings().weight.nbytes
    if name == "gpt2" or not has_kernel:
        assert forecast._packed_bytes(policy) == 0
    else:
        part = model.decoder if name == "t5" else model.model
        layers = sum(weight.nbytes for key, weight in part.named_parameters() if "layer" in key and weight.dim() == 2)
        assert forecast._packed_bytes(policy) == pytest.approx(head + layers, rel=0.05)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_memory_of_sampling_from_a_causal_model_bounds_that_of_sampling_token_by_token(
    bases: dict[str, Path], name: str
) -> None:
    config = recipe("own", {"policy.base": str(bases[name]), "policy.lora_targets": TARGETS[name]})
    policy = bare_policy(config, load_tokenizer(str(bases[name])))
    texts = ["Thank you.", "Thank you, that is very kind of you."] * 4
    uniforms = torch.ones(8, 30, device="meta")
    with torch.no_grad():
        estimate = forecast._sampling_peak(policy, texts, 30, 1.0)
        sampled = forecast._peak(lambda: policy.sample(policy.encode(texts), uniforms, 1.0))
    assert sampled <= estimate < 1.5 * sampled


def test_a_causal_model_is_read_few_times_on_shapes_however_long_its_responses_are(
    bases: dict[str, Path], prepared: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = counted(monkeypatch, LlamaForCausalLM, "forward")
    own = counted(monkeypatch, LlamaNetwork, "logprobs", "read_prompts")
    settings = {"policy.base": str(bases["llama"]), "policy.lora_targets": TARGETS["llama"], "sft.steps": 5}
    stage_memory(recipe("own", {**settings, "generation.max_new_tokens": 200}), prepared, [])
    assert 0 < len(forward) + len(own) <= 6
    assert len(own) > 0


def test_memory_grows_with_the_length_of_responses(place: Path) -> None:
    def train(**settings: Any) -> float:
        config = recipe("own", {"policy.base": "model", "data.source": "mine.jsonl", "rl.batch_size": 8,
                                "rl.minibatch_size": 4, "rl.microbatch_size": 2, **settings})  # fmt: skip
        roberta = RobertaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
        with torch.device("meta"):
            classifiers = [RobertaForSequenceClassification(roberta)]
        return stage_memory(config, prepare_rows(config), classifiers)["train"]

    assert train(**{"generation.max_new_tokens": 4000}) > train()


# Time


def test_time_is_what_was_measured_times_how_often_a_run_does_it() -> None:
    config = recipe("quickstart", {"data.limit": 128, "rl.validation_prompts": 20, "evaluation.prompts": 10})
    prepared = prepare_rows(config)
    seconds = stage_seconds(config, prepared.rows, STEP)

    # 40 steps of 128 responses, 5 validations of 20, and a normaliser of 128; 2 epochs; 2,000 + 2 x 100 sft steps,
    # and 100 of DPO on 32 responses. All 128 training prompts are sampled 4 times before. For each test prompt there
    # are 4 samples of 6 policies, and 16 more of the start.
    trained = 40 * 128
    validated = 5 * 20
    train = (0.5 + 0.25) * (trained + validated + 128) + 0.125 * (trained + validated)
    train += 4.0 * 2 * trained + 2.0 * validated
    assert seconds["train"] == train
    assert seconds["evaluate"] == 10 * (6 * 4 + 16) * (0.5 + 0.25 + 2.0 + 8.0)
    of_own_samples = 4 * 128 * (0.5 + 0.25) + 100 * 32 * 4.0
    assert seconds["sft"] == (2000 + 200) * 0.75 + of_own_samples

    bare = {split: [replace(row, civil_references=()) for row in rows] for split, rows in prepared.rows.items()}
    without = stage_seconds(config, bare, STEP)
    assert without["evaluate"] == 10 * (5 * 4 + 16) * (0.5 + 0.25 + 2.0 + 8.0)
    assert without["sft"] == (2000 + 100) * 0.75 + of_own_samples


def test_time_grows_with_the_work_of_a_run(place: Path) -> None:
    def seconds(**settings: Any) -> dict[str, float]:
        config = recipe("own", {"policy.base": "model", "data.source": "mine.jsonl", "rl.batch_size": 8,
                                "rl.minibatch_size": 4, "rl.microbatch_size": 2, **settings})  # fmt: skip
        return stage_seconds(config, prepare_rows(config).rows, STEP)

    plain = seconds()
    assert plain["sft"] == 0
    assert 1.9 < seconds(**{"rl.steps": 200})["train"] / plain["train"] < 2.1
    assert seconds(**{"rl.epochs": 4})["train"] > plain["train"]
    assert seconds(**{"sft.steps": 5})["sft"] > 0
    # A baseline on the start's own responses needs no summary.
    assert seconds(**{"data.reference_column": None, "sft.baseline_steps": 5})["sft"] > 0


def test_seconds_are_linear_in_tokens() -> None:
    few, more = Timed(seconds=3.0, tokens=2), Timed(seconds=10.0, tokens=16)
    assert timing.seconds_at(few, more, 56) == 3.0 + 0.5 * 54
    assert timing.seconds_at(few, more, 16) == 10.0
    # Nothing is taken off where the longer responses were quicker, nor is noise multiplied where all ended early.
    assert timing.seconds_at(Timed(10.0, 2), Timed(3.0, 16), 56) == 3.0
    assert timing.seconds_at(Timed(3.0, 2), Timed(4.0, 2), 56) == 4.0


@pytest.mark.parametrize(
    ("name", "largest", "seconds_per_row", "sizes"),
    [
        ("quick", 20, 0.01, [1, 4, 16, 20]),
        ("slow", 20, 1.0, [1, 4]),
        ("very slow", 20, 60.0, [1]),
        ("few rows", 256, 0.01, [1, 4, 16, 24]),
    ],
)
def test_a_batch_grows_until_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, name: str, largest: int, seconds_per_row: float, sizes: list[int]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    batches: list[list[Row]] = []

    def step(rows: list[Row]) -> int:
        batches.append(rows)
        clock[0] += seconds_per_row * len(rows)
        return len(rows)

    rows = [Row(id=str(i), text="", prompt="word " * (100 - i)) for i in range(24)]
    assert timing.growing_batch(step, rows, largest) == sizes[-1]
    warm_up, *timed = batches
    assert [len(row.prompt) for row in warm_up] == [64]
    assert [len(batch) for batch in timed] == sizes
    # The lengths of a batch are those of all rows: a single row has the median, and several are spread evenly.
    assert timed[0] == [rows[11]]
    assert all(len({row.id for row in batch}) == len(batch) for batch in timed)


@pytest.mark.parametrize("group_size", [1, 2])
@pytest.mark.parametrize(("name", "prompt_tokens"), [("t5", 0), ("gpt2", 50)])
def test_what_a_step_takes_follows_from_the_measurements(
    bases: dict[str, Path],
    prepared: Prepared,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    prompt_tokens: int,
    group_size: int,
) -> None:
    responses = 4 * group_size
    settings = {"policy.base": str(bases[name]), "policy.lora_targets": TARGETS[name], "rl.batch_size": responses,
                "rl.minibatch_size": responses, "rl.algorithm": "ppo", "rl.group_size": group_size,
                "generation.max_new_tokens": 40}  # fmt: skip
    config = recipe("own", settings)
    policy = load_policy(str(bases[name]), None, config.policy, seed=0)
    account = {**prepared.account, "reference_tokens": {"p95": 30}}
    encoded = SimpleNamespace(mask=torch.ones(4, 50))
    monkeypatch.setattr(timing, "_timed_reading", lambda *_: (3.0, encoded))
    monkeypatch.setattr(timing, "_timed_sampling", lambda *given: Timed(5.0 + given[-1], given[-1]))
    monkeypatch.setattr(timing, "_timed_rollout", lambda *_: (29.0, None))
    monkeypatch.setattr(timing, "_timed_scoring", lambda *_: 6.0)
    monkeypatch.setattr(timing, "_timed_update", lambda *_: 16.0)
    monkeypatch.setattr(timing, "_timed_judging", lambda *_: [2.0, 4.0])

    run = run_of(policy, Path("unused"), config, rows=prepared.rows)
    step = timing.policy_seconds(run, replace(prepared, account=account))
    # A token takes 1 second for all responses. The reference took 29 - 21 seconds. Both it and the update read the
    # prompts of a causal model again, once a group.
    scale = (prompt_tokens / group_size + 30) / (prompt_tokens / group_size + 16)
    assert step.sample == (3.0 + 5.0 + 30) / responses
    assert step.reference == pytest.approx(8.0 * scale / responses)
    assert step.update == pytest.approx(16.0 * scale / responses)
    assert step.score == 6.0 / 4
    assert step.judges == [0.5, 1.0]


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_measuring_leaves_the_policy_as_it_is_and_has_every_text_judged_anew(
    bases: dict[str, Path], place: Path, name: str
) -> None:
    config = recipe("own", {"policy.base": str(bases[name]), "policy.lora_targets": TARGETS[name], "rl.batch_size": 8,
                            "data.source": "mine.jsonl", "rl.minibatch_size": 4})  # fmt: skip
    policy = load_policy(str(bases[name]), None, config.policy, seed=0)
    before = [weight.detach().clone() for weight in policy.model.parameters()]
    judged: list[str] = []

    def judge(texts: Sequence[str]) -> np.ndarray[Any, Any]:
        judged.extend(texts)
        return np.zeros(len(texts))

    sizes: list[int] = []

    def reward(prompts: Sequence[str], responses: Sequence[str]) -> torch.Tensor:
        assert len(prompts) == len(responses)
        sizes.append(len(responses))
        return torch.zeros(len(responses))

    rows = prepare_rows(config)
    step = timing.policy_seconds(run_of(policy, place, config, reward, memoized(judge), rows.rows), rows)
    assert min(step.sample, step.score, step.update, *step.judges) > 0
    assert step.reference >= 0
    after = list(policy.model.parameters())
    assert all(torch.equal(weight, other) for weight, other in zip(before, after, strict=True))
    assert sizes[:2] == [1, 1]  # The first is the warm-up.
    assert len(judged) >= sum(sizes) - 1  # Two of its batches have one row, which may have the same text.


def counted(monkeypatch: pytest.MonkeyPatch, owner: Any, *names: str) -> list[str]:
    """Return a list that grows with every call of the methods."""
    calls: list[str] = []

    def count(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return method(*args, **kwargs)

        return called

    for name in names:
        monkeypatch.setattr(owner, name, count(name, getattr(owner, name)))
    return calls


@pytest.mark.parametrize("name", ["t5", "llama"])
def test_the_doctor_makes_few_passes_however_long_responses_are(
    place: Path,
    bases: dict[str, Path],
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if name == "t5":
        counters = [counted(monkeypatch, T5Steps, "next"), counted(monkeypatch, T5Network, "read", "logprobs")]
    else:
        counters = [
            counted(monkeypatch, LlamaSteps, "next"),
            counted(monkeypatch, LlamaNetwork, "logprobs", "read_prompts"),
        ]
    # Tokens that end a response are removed, so that none is shorter than it may be.
    initial_policy = Run.initial_policy

    def endless(run: Run) -> Policy:
        policy = initial_policy(run)
        policy.eos_token_ids = [-1]
        return policy

    monkeypatch.setattr(Run, "initial_policy", endless)
    words = ["--generation.max-new-tokens", "100", "--data.max-prompt-tokens", "100", "--sft.steps", "3"]
    assert doctor(*base_flags(bases, name), *words) == 0
    # A step samples 2 + 16 + 16 tokens, in at most 4 batches of 1 to 8 rows. One of 100 tokens each would take 400.
    assert 34 < sum(map(len, counters)) < 240
    output = capsys.readouterr().out
    for stage in ("sft", "train", "evaluate"):
        assert re.search(rf"{stage} +\d+\.\d GiB", output), stage
        assert re.search(rf"{stage} +\d+\.\d min", output), stage


# The whole command


def test_the_doctor_prints_what_a_run_takes_and_that_it_will_work_and_writes_nothing(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(place)
    assert doctor("--sft.steps", "3", "--sft.no-full-weights") == 0
    output = capsys.readouterr().out
    assert contents(place) == before
    # Memory and disk come before weights are fetched, time after the parts were tried.
    order = ["duplicate", "prompt tokens: median", f"device: cpu ({torch.get_num_threads()} threads)", "peak memory",
             " parameters train", "disk: up to ", "reward.classifier: 2 labels, one softmax", "labels: right",
             "KL to the reference at step 0", "estimated time", "from one step of each stage", "total: about",
             "ready: detoxrl run own"]  # fmt: skip
    places = [output.find(text) for text in order]
    assert -1 not in places, order[places.index(-1)]
    assert places == sorted(places)
    for stage in ("sft", "train", "evaluate"):
        assert re.search(rf"{stage} +\d\.\d GiB", output), stage
        assert re.search(rf"{stage} +\d+\.\d min", output), stage
    assert abs(float(re.search(r"KL to the reference at step 0: (\S+) nats", output)[1])) < 1e-5  # type: ignore[index]
    assert float(re.search(r"first ratios: within (\S+) of 1", output)[1]) < 1e-5  # type: ignore[index]


def test_a_scratch_base_and_a_function_are_examined_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data.source", "mine.jsonl", "--reward.function", "rewards.py:brevity"]
    assert detoxrl(["doctor", "quickstart", *words, *SMALL]) == 0
    output = capsys.readouterr().out
    assert "ready: detoxrl run quickstart" in output
    assert "not included" not in output


def test_a_reward_that_the_run_trains_is_named_as_not_included(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert detoxrl(["doctor", "quickstart", *SMALL, "--data.limit", "64"]) == 0
    assert "not included: training the embedded reward model, and its scores" in capsys.readouterr().out


def test_prompts_without_references_are_timed_with_texts_of_the_length_of_responses(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert doctor("--data.reference-column", "None", "--sft.baseline-steps", "2", "--rl.validation-prompts", "5") == 0
    assert "estimated time" in capsys.readouterr().out


def _wrong_labels(place: Path) -> list[str]:
    return ["--reward.good-label", "kind"]


def _no_weights_but_a_wrong_judge_label(place: Path) -> list[str]:
    (place / "classifier/model.safetensors").unlink()  # Labels are read before any weights.
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
    error = capfd.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_too_little_memory_or_disk_is_an_error_before_weights_are_read(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_, **__: pytest.fail("weights are read"))
    psutil_memory = psutil.virtual_memory
    memory = psutil.virtual_memory()._replace(available=2**20)
    monkeypatch.setattr(doctor_module.psutil, "virtual_memory", lambda: memory)
    assert doctor() == 2
    error = capfd.readouterr().err
    rule = r"is free, but the run needs about \d\.\d GiB; try --policy\.bf16"
    assert re.search(rf"memory = '[\d.]+ GiB': {rule}", error)

    monkeypatch.setattr(doctor_module.psutil, "virtual_memory", psutil_memory)
    disk = psutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(doctor_module.psutil, "disk_usage", lambda _: disk)
    assert doctor() == 2
    error = capfd.readouterr().err
    rule = r"is free, but the run writes up to \d+ MiB and fetches 0 MiB; free some space"
    assert re.search(rf"disk = '0 MiB': {rule}", error)


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
    assert "must be 0: the KL in nats to its reference before training" in capfd.readouterr().err


def test_several_processes_are_refused(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "PartialState", lambda: SimpleNamespace(num_processes=2))
    assert doctor() == 2
    message = "processes = 2: the doctor runs in one process; start it without a launcher"
    assert message in capfd.readouterr().err


def test_a_fallback_variable_is_named(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTORCH_ENABLE_MPS_FALLBACK", "1")
    assert doctor() == 0
    assert "PYTORCH_ENABLE_MPS_FALLBACK is set: unset it" in capsys.readouterr().out


class _Doubles(TorchDispatchMode):
    """Collects the operations that make a float64 tensor: Apple's MPS has none."""

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
                             "aten.detach.default", "aten.select.int"}, doubles.found  # fmt: skip
    assert json.loads((place / "runs/own/eval.json").read_text())["n_prompts"] == 8
