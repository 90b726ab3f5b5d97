"""Processes that hold a base together, each a part of it, make the run that one process makes."""

from __future__ import annotations

import gc
import json
import os
import signal
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import NoReturn

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

import small_runs
from conftest import Make
from detoxrl import cli, helping, memory, processes
from detoxrl.config import PolicyConfig
from detoxrl.errors import InputError
from detoxrl.policy.adapters import frozen_policy, load_policy
from detoxrl.policy.plain import PlainNetwork
from detoxrl.policy.policy import Policy
from detoxrl.policy.sharded import StandIn
from small_runs import make_place, own
from test_fast import lora_folder, plainly
from test_helping import forked
from test_invariants import PROMPTS, TEXTS, loop_config, rollout_of, run_update
from test_processes import alike, same_run

WORDS = ["--reward.function", "rewards.py:brevity", "--sft.baseline-steps", "0", "--rl.epochs", "2", "--rl.steps", "2"]


@pytest.fixture(scope="module")
def shared_place(tmp_path_factory: pytest.TempPathFactory, bases: dict[str, Path], reward_folder: Path) -> Path:
    return make_place(tmp_path_factory.mktemp("sharded"), bases, reward_folder)


@pytest.fixture
def place(shared_place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(shared_place)
    return shared_place


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `accelerate launch --use_fsdp --fsdp_version 2` sets."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")


def together(words: list[str], number: int = 2) -> str:
    """Run a command in several processes that shard the base, and return how the main one ended."""
    return forked(partial(cli._dispatch, words), number)[0]


@pytest.mark.parametrize(
    ("name", "number", "words"),
    [
        ("t5", 2, ["--rl.minibatch-size", "2"]),  # in its second epoch they have other numbers of rows
        ("t5", 3, ["--policy.train-encoder", "--rl.steps", "1"]),  # two rows for one of them, one for the others
        ("gpt2", 2, ["--rl.minibatch-size", "1", "--policy.lora-targets", "c_attn", "--data.max-prompt-tokens", "200"]),
    ],
)
def test_processes_that_share_the_base_make_the_run_of_one(
    place: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, number: int, words: list[str]
) -> None:
    monkeypatch.setattr("detoxrl.policy.policy._READ", 300)  # so that an encoder reads a prompt at a time
    words = own(*WORDS, "--policy.base", str(bases[name]), *words)
    one, several = (f"{name}{number}-{which}" for which in ("one", "several"))
    assert small_runs.detoxrl(["prepare", *words[1:], "--run-dir", one]) == 0
    copytree(one, several)
    for stage in ("sft", "train"):
        assert small_runs.detoxrl([stage, one]) == 0
    assert small_runs.detoxrl(["sft", several]) == 0
    assert together(["train", several], number) == "None"
    same_run(place / one, place / several, measured=False)
    assert json.loads(Path(several, "run.json").read_text())["machine"]["sharded"] is True


def test_a_base_in_bfloat16_gives_the_bits_that_it_gives_two_processes_that_hold_it_each(
    place: Path, bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = own(*WORDS, "--policy.base", str(bases["llama"]), "--policy.bf16", "--policy.lora-targets", "q_proj")
    words += ["--data.max-prompt-tokens", "200", "--rl.minibatch-size", "8", "--rl.microbatch-size", "3"]
    assert together([*words, "--run-dir", "pieces"]) == "None"
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert together([*words, "--run-dir", "wholes"]) == "None"
    for name in ("adapter/adapter_model.safetensors", "samples.jsonl"):
        assert Path("pieces", name).read_bytes() == Path("wholes", name).read_bytes()
    assert json.loads(Path("pieces/checkpoint.json").read_text())["kept_step"] > 0


def test_a_run_that_one_process_made_is_measured_by_two_beside_a_whole_model(
    place: Path, bases: dict[str, Path]
) -> None:
    assert small_runs.detoxrl(own(*WORDS, "--run-dir", "measured", "--rl.steps", "1")) == 0
    words = ["evaluate", "measured", "--policy", f"other={bases['t5']}"]
    assert small_runs.detoxrl(words) == 0
    alone = json.loads(Path("measured/eval.json").read_text())
    Path("measured/eval.json").unlink()
    assert together(words) == "None"
    several = json.loads(Path("measured/eval.json").read_text())
    for found in (alone, several):
        del found["seconds"], found["changed_on_its_way"]
    assert "other" in json.dumps(alone)
    alike(alone, several)


def test_each_process_holds_its_part_of_the_blocks_and_nothing_of_the_rest_of_them(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    def held(policy: Policy) -> dict[str, int]:
        found = {"in pieces": 0, "whole": 0}
        for weight in policy.model.parameters():
            pieces = isinstance(weight, DTensor)
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            found["in pieces" if pieces else "whole"] += local.untyped_storage().nbytes()
        return found

    def command() -> str:
        policy = load_policy(str(bases["t5"]), None, PolicyConfig(base="t5"), 0)
        policy.save(tmp_path / "before")
        before = {id(block): block for block in policy.model.modules() if type(block).__name__ == "T5Block"}
        old = {id(w): weakref.ref(w) for b in before.values() for n, w in b.named_parameters() if "lora_" not in n}
        of_blocks = sum(ref().nbytes for ref in old.values())  # type: ignore[union-attr]
        of_all = sum(weight.nbytes for weight in policy.model.parameters())
        policy.to(torch.device("cpu"))
        assert all(isinstance(block, FSDPModule) for block in before.values())
        assert [ref() for ref in old.values() if ref() is not None] == []
        policy.save(tmp_path / "after")
        assert held(policy)["whole"] == of_all - of_blocks
        assert all(not isinstance(weight, DTensor) for weight in policy.parameters())
        return f"{held(policy)['in pieces'] / of_blocks:.2f}"

    main, helper = forked(command)
    assert (main, helper) == ("0.50", "done")
    saved = "adapter_model.safetensors"
    assert (tmp_path / "before" / saved).read_bytes() == (tmp_path / "after" / saved).read_bytes()


def sharded_beside(command: Callable[[Policy], object], make: Callable[[], Policy]) -> str:
    """Return what a command makes of a sharded policy while the other process does nothing but wait."""
    kept = list[Policy]()

    def begin() -> None:
        kept.append(make().to(torch.device("cpu")))

    def main() -> object:
        processes.tell("measure")
        begin()
        return command(kept[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(helping._ALWAYS, "measure", begin)
        return forked(main)[0]


@pytest.mark.parametrize("train_encoder", [False, True])
def test_the_main_process_passes_alone_while_others_wait_and_counts_what_it_will_take(
    bases: dict[str, Path], train_encoder: bool
) -> None:
    config = loop_config()
    config = replace(config, policy=replace(config.policy, train_encoder=train_encoder))

    def make() -> Policy:
        return load_policy(str(bases["t5"]), None, config.policy, 0)

    def bytes_of(policy: Policy) -> str:
        return str(memory._bytes_per_response(policy, PROMPTS[3], config))

    policy = make()
    with plainly(policy):
        expected = bytes_of(policy)
    assert sharded_beside(bytes_of, make) == expected
    assert sum(weight.nbytes for weight in policy.parameters()) < int(expected.strip("()").split(", ")[1])


def test_an_update_that_finds_no_memory_ends(make_policy: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, config = make_policy("t5", "fresh"), loop_config(minibatch_size=4)
    rollout = rollout_of(policy)

    def full(*given: object) -> NoReturn:
        tried.append(given)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    tried = list[object]()
    monkeypatch.setattr("detoxrl.train._losses", full)
    monkeypatch.setattr(processes, "sharding", lambda: object())
    with pytest.raises(RuntimeError, match="can't allocate"):
        run_update(policy, config, rollout)
    assert len(tried) == 1


def test_a_process_that_goes_amid_a_pass_and_one_that_fails_there_are_one_line(
    bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def make() -> Policy:
        return load_policy(str(bases["t5"]), None, PolicyConfig(base="t5"), 0)

    def read(policy: Policy) -> object:
        return policy.encode(TEXTS)

    def fail(*_: object) -> NoReturn:
        raise ValueError("sizes do not match")

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(StandIn, "stand_in", fail)
        ended = sharded_beside(read, make)
        assert ended == "ProcessError in _connected: process 1 of this run failed: ValueError: sizes do not match"
    monkeypatch.setattr(StandIn, "stand_in", die)
    assert sharded_beside(read, make).startswith("ProcessError in _connected: a process of this run was lost: ")


@pytest.mark.parametrize("base", ["t5", "gpt2"])
def test_a_stand_in_passes_where_the_others_do_and_leaves_no_trace(make_policy: Make, base: str) -> None:
    policy = make_policy(base, "fresh", encoder=base == "t5")
    stand = StandIn(policy.weights, policy.device)
    kinds = ["read", "read to learn"] if policy.has_encoder else []
    for kind in (*kinds, "decode", "decode to learn", "back"):
        stand.stand_in(kind)
    gradients = [weight.grad for weight in policy.parameters()]
    assert gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)


def test_a_policy_is_loaded_beside_a_sharded_one(bases: dict[str, Path], tmp_path: Path) -> None:
    config = PolicyConfig(base="t5")
    trained = load_policy(str(bases["t5"]), None, config, 1)
    torch.nn.init.normal_(next(weight for name, weight in trained.model.named_parameters() if "lora_B" in name))
    trained.save(tmp_path / "other")

    def command() -> str:
        policy = load_policy(str(bases["t5"]), None, config, 0).to(torch.device("cpu"))
        policy.add("other", tmp_path / "other")
        assert policy._network is not PlainNetwork
        policy.to(torch.device("cpu"))
        encoded = policy.encode(TEXTS)
        found = [policy.logprobs(encoded, torch.full((4, 3), 5), 1.0, name)[0].sum().item() for name in (None, "other")]
        return " ".join(f"{number:.4f}" for number in processes.everyone(found)[0])

    def waiting() -> None:
        command()

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(helping._ALWAYS, "measure", waiting)

        def main() -> str:
            processes.tell("measure")
            return command()

        ended, _ = forked(main)
    trained.add("other", tmp_path / "other")
    with torch.no_grad():
        encoded = trained.encode(TEXTS)
        expected = [trained.logprobs(encoded, torch.full((4, 3), 5), 1.0, name)[0].sum() for name in (None, "other")]
    assert [float(number) for number in ended.split()] == pytest.approx([float(x) for x in expected], abs=2e-3)
    assert abs(expected[0] - expected[1]) > 0.1


def test_what_was_sharded_is_gone_when_the_next_is(bases: dict[str, Path]) -> None:
    def made() -> weakref.ref[torch.nn.Module]:
        policy = load_policy(str(bases["t5"]), None, PolicyConfig(base="t5"), 0).to(torch.device("cpu"))
        return weakref.ref(next(one for one in policy.model.modules() if isinstance(one, FSDPModule)))

    def command() -> str:
        gc.disable()
        first = made()
        made()
        return str(first())

    assert forked(command)[0] == "None"


def test_an_adapter_that_is_more_than_a_plain_lora_trains_and_is_measured(place: Path, bases: dict[str, Path]) -> None:
    lora_folder(bases["t5"], place / "more", use_dora=True, modules_to_save=["layer_norm"])
    words = own(*WORDS, "--policy.base", str(bases["t5"]), "--policy.adapter", "more", "--rl.steps", "1")
    assert together([*words, "--run-dir", "with-more"]) == "None"
    assert json.loads(Path("with-more/eval.json").read_text())["n_prompts"] == 8


def test_blocks_within_blocks_are_sharded_from_within(bases: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "T5Block,T5Attention")

    def make() -> Policy:
        return load_policy(str(bases["t5"]), None, PolicyConfig(base="t5"), 0)

    def read(policy: Policy) -> str:
        with torch.no_grad():
            return str(float(policy.encode(TEXTS).states.abs().sum()))

    assert float(sharded_beside(read, make)) == pytest.approx(float(read(make())), rel=1e-5)


def test_a_frozen_model_is_there_once(bases: dict[str, Path]) -> None:
    policy = frozen_policy(str(bases["t5"]))
    assert len({id(model) for model in policy.weights.models.values()}) == 1


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--policy.full-weights"], "policy.full_weights = True: does not go with FSDP: only a frozen base is sharded"),
        (["--sft.baseline-steps", "3"], "sft.baseline_steps = 3: needs the whole base in one process, so not FSDP; g"),
        (["--sft.steps", "4"], "sft.steps = 4: needs the whole base in one process, so not FSDP; give 0, or run"),
    ],
)
def test_what_wants_a_whole_base_is_refused_before_anything_is_written(
    place: Path, words: list[str], told: str
) -> None:
    assert f": {told}" in together(own(*WORDS, *words, "--run-dir", "refused"))
    assert not Path("refused").exists()


def test_unknown_blocks_and_other_ways_to_shard_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(InputError, match=r"fsdp_version = '1': is not known here; say --fsdp_version 2"):
        processes.join()
    monkeypatch.setenv("FSDP_VERSION", "2")
    with monkeypatch.context() as patch:
        patch.setattr(processes, "_here", processes._Here())
        for name, value in (("activation_checkpointing", "true"), ("offload_params", "true"),
                            ("reshard_after_forward", "false")):  # fmt: skip
            with monkeypatch.context() as one:
                one.setenv(f"FSDP_{name.upper()}", value)
                with pytest.raises(InputError, match=f"fsdp_{name} = '{value}': is not known here; leave it out"):
                    processes.join()
        patch.setenv("FSDP_AUTO_WRAP_POLICY", "BY_MAGIC")
        with pytest.raises(InputError, match=r"accelerate = 'FSDP': Invalid auto wrap policy: BY_MAGIC"):
            processes.join()
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "Nothing")
    told = together(own(*WORDS, "--run-dir", "unknown"))
    assert "fsdp_transformer_cls_to_wrap = 'Nothing': names no block of a T5ForConditionalGeneration; name the" in told


def test_neither_sft_nor_doctor_nor_a_sweep_begins_with_a_base_in_pieces(place: Path) -> None:
    tuned = own(*WORDS, "--sft.baseline-steps", "3")
    assert small_runs.detoxrl(["prepare", *tuned[1:], "--run-dir", "untuned"]) == 0
    assert "sft.baseline_steps = 3: needs the whole base" in together(["sft", "untuned"])
    assert "accelerate = 'FSDP': is not for the doctor" in together(["doctor", *own()[1:]])
    swept = ["sweep", *tuned[1:], "--seeds", "0,1", "--run-dir", "swept"]
    assert "sft.baseline_steps = 3: needs the whole base" in together(swept)
    assert not Path("swept").exists()
