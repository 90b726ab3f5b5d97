"""Initial policies: old LoRA folders, whole models and checkpoints of trl. Pickles come only through `convert`."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import TARGETS, disturb, policy_config, prompted_rows
from detoxrl.commands.convert import convert
from detoxrl.config.schema import GenerationConfig
from detoxrl.data.rows import to_prompts
from detoxrl.errors import InputError
from detoxrl.models.loading import load_base
from detoxrl.models.lora import initial_adapter, load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.sampling import Draws
from detoxrl.rl.kl import k1
from detoxrl.training.rollout import collect_rollout
from small_runs import contents, detoxrl

ROWS = prompted_rows({"train": 12})["train"]
# Settings that peft 0.3.0, the version of the old notebooks, wrote beside the weights.
PEFT_0_3 = {
    "base_model_name_or_path": "google/flan-t5-base", "bias": "none", "enable_lora": None, "fan_in_fan_out": False,
    "inference_mode": True, "lora_alpha": 32, "lora_dropout": 0.05, "merge_weights": False, "modules_to_save": None,
    "peft_type": "LORA", "r": 4, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM",
}  # fmt: skip


def first_kl(policy: Policy) -> tuple[float, float]:
    """Return the largest KL to the reference and the largest log-ratio, before any update."""
    rollout = collect_rollout(policy, to_prompts(ROWS), GenerationConfig(max_new_tokens=8), Draws(0, "rollout"))
    responses = rollout.responses
    again = policy.logprobs(rollout.encoded, responses.ids, 1.0)[0]
    return (
        float(k1(responses.logprobs, rollout.ref_logprobs).abs().max()),
        float((again.detach() - responses.logprobs)[responses.response_mask].abs().max()),
    )


@pytest.fixture
def old_lora(bases: dict[str, Path], tmp_path: Path) -> Path:
    """A LoRA on q and v of encoder and decoder, as the old systems wrote it: adapter_model.bin."""
    trained = load_policy(str(bases["t5"]), None, policy_config("t5", encoder=True), seed=0)
    disturb(trained)
    folder = tmp_path / "old"
    trained.save(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_config.json").write_text(json.dumps(PEFT_0_3))
    return folder


def test_an_old_lora_folder_becomes_the_start_and_the_reference(
    bases: dict[str, Path], old_lora: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"holds no adapter_model\.safetensors; .*`detoxrl convert` makes"):
        load_policy(str(bases["t5"]), old_lora, policy_config("t5"), seed=0)
    assert convert(str(old_lora), tmp_path / "new") == "adapter_model.safetensors with 24 tensors"
    weights = torch.load(old_lora / "adapter_model.bin", weights_only=True)
    made = load_file(tmp_path / "new/adapter_model.safetensors")
    assert made.keys() == weights.keys()
    assert all(torch.equal(made[name], weights[name]) for name in made)
    # The config asks for another rank and other layers. The folder's own are used.
    config = replace(policy_config("t5"), lora_rank=16, lora_targets=("wo",), adapter=str(tmp_path / "new"))
    policy = load_policy(str(bases["t5"]), initial_adapter(config), config, seed=0)
    lora = policy.model.peft_config["default"]
    assert (lora.r, lora.lora_alpha, set(lora.target_modules)) == (4, 32, {"q", "v"})
    # Its encoder parts stay, frozen, so prompts are read as before.
    plain = load_policy(str(bases["t5"]), None, policy_config("t5"), seed=0)
    texts = [ROWS[0].prompt]
    assert not torch.allclose(policy.encode(texts).states, plain.encode(texts).states, atol=1e-3)
    kl, ratio = first_kl(policy)
    assert max(kl, ratio) < 3e-5  # The LoRA is scaled by 8, and so is rounding: 5e-6 to 1.2e-5, depending on kernels.


@pytest.mark.parametrize("full", [False, True])
def test_a_whole_fine_tuned_model_is_a_start(bases: dict[str, Path], tmp_path: Path, full: bool) -> None:
    tuned = load_policy(str(bases["t5"]), None, policy_config("t5", encoder=True, full=True), seed=0)
    disturb(tuned)
    tuned.save(tmp_path / "tuned")
    kl, ratio = first_kl(load_policy(str(tmp_path / "tuned"), None, policy_config("t5", full=full), seed=0))
    assert kl < 1e-5
    assert ratio < 1e-5


def _trl_whole(base: Path, folder: Path) -> None:
    """Write a model with a value head as trl 0.11 saves it: in one file, the head under `v_head.`."""
    model, tokenizer = load_base(str(base))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state |= {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def _pickled(base: Path, folder: Path, shards: int = 1, prefix: str = "") -> None:
    """Write the same as before safetensors: pytorch_model.bin, or its shards with their index."""
    shutil.copytree(base, folder)
    state = load_file(folder / "model.safetensors")
    state["encoder.embed_tokens.weight"] = state["shared.weight"]  # Tied: one tensor under two names.
    state = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    state |= {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.zeros(1)}
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    for shard in range(shards):
        part = {name: state[name] for name in names[shard::shards]}
        name = "pytorch_model.bin" if shards == 1 else f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save(part, folder / name)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text("{}")


def test_a_value_head_checkpoint_of_trl_is_a_start_without_its_value_head(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    _trl_whole(bases["t5"], tmp_path / "trl")
    assert "v_head.summary.weight" in load_file(tmp_path / "trl/model.safetensors")
    policy = load_policy(str(tmp_path / "trl"), None, policy_config("t5"), seed=0)
    kl, ratio = first_kl(policy)
    assert max(kl, ratio) < 1e-5
    assert policy.value_head is None
    assert float(policy.add_value_head().weight.detach().abs().max()) == 0.0


@pytest.mark.parametrize(("shards", "prefix"), [(1, ""), (2, ""), (1, "pretrained_model.")])
def test_pickled_checkpoints_of_trl_are_converted(
    bases: dict[str, Path], tmp_path: Path, shards: int, prefix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _pickled(bases["t5"], tmp_path / "old", shards, prefix)
    with pytest.raises(InputError, match=r"policy\.base"):
        load_base(str(tmp_path / "old"))
    assert detoxrl(["convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    output = capsys.readouterr().out
    assert "(2 of a value head left out)" in output
    assert f"next: use {tmp_path / 'new'} in place of {tmp_path / 'old'}" in output
    before = load_file(bases["t5"] / "model.safetensors")
    after = load_file(tmp_path / "new/model.safetensors")
    assert torch.equal(after.pop("encoder.embed_tokens.weight"), before["shared.weight"])
    assert {name: float(t.sum()) for name, t in before.items()} == {n: float(t.sum()) for n, t in after.items()}
    assert not list((tmp_path / "new").glob("*.bin*"))
    kl, ratio = first_kl(load_policy(str(tmp_path / "new"), None, policy_config("t5"), seed=0))
    assert max(kl, ratio) < 1e-5


def test_the_value_head_beside_a_lora_of_trl_is_not_converted(
    bases: dict[str, Path], old_lora: Path, tmp_path: Path
) -> None:
    torch.save({"v_head.summary.weight": torch.ones(1, 32)}, old_lora / "pytorch_model.bin")
    assert convert(str(old_lora), tmp_path / "new") == "adapter_model.safetensors with 24 tensors"
    assert not (tmp_path / "new/model.safetensors").exists()


class _Evil:
    def __reduce__(self) -> tuple[Callable[[str], object], tuple[str]]:
        return Path.touch, (Path("ran"),)  # type: ignore[return-value]


def test_code_in_a_pickle_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad").mkdir()
    torch.save({"weight": _Evil()}, "bad/pytorch_model.bin")
    before = contents(tmp_path)
    assert detoxrl(["convert", "bad", "out"]) == 2
    message = capfd.readouterr().err
    assert "FROM = 'bad/pytorch_model.bin': cannot be read as tensors alone" in message
    assert len(message.splitlines()) == 1
    assert contents(tmp_path) == before  # There is no file `ran`, and no partial result.


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["convert", "here"], "TO = '': is missing; run `detoxrl convert FROM TO`"),
        (["convert", "here", "here"], "TO = 'here': already exists; name a new folder"),
        (["convert", "here", "out"], "FROM = 'here': has no weights in adapter_model*.bin or pytorch_model*.bin"),
        (["convert", "text", "out"], "cannot be read as tensors alone"),
        (["convert", "list", "out"], "FROM = 'list/pytorch_model.bin': is not a dictionary of tensors"),
        (["convert", "odd", "out"], "FROM = 'odd/pytorch_model.bin': cannot be read as tensors alone"),
        (["convert", "keys", "out"], "FROM = 'keys/pytorch_model.bin': is not a dictionary of tensors"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("here", "text", "list", "odd", "keys"):
        Path(name).mkdir()
    Path("text/pytorch_model.bin").write_text("no weights")
    torch.save([torch.ones(2)], "list/pytorch_model.bin")
    torch.save({1: torch.ones(2)}, "keys/pytorch_model.bin")
    Path("odd/pytorch_model.bin").write_bytes(b"\x80\x02h\x05.")
    assert detoxrl(words) == 2
    error = capfd.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("name", TARGETS)
def test_a_base_in_bfloat16_starts_at_its_reference_and_trains_in_fp32(bases: dict[str, Path], name: str) -> None:
    policy = load_policy(str(bases[name]), None, replace(policy_config(name), bf16=True), seed=0)
    assert policy.model.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    assert policy.add_value_head().weight.dtype == torch.float32
    disturb(policy)
    rollout = collect_rollout(policy, to_prompts(ROWS), GenerationConfig(max_new_tokens=24), Draws(0, "rollout"))
    responses, mask = rollout.responses, rollout.responses.response_mask
    assert responses.logprobs.dtype == rollout.ref_logprobs.dtype == torch.float32
    with torch.no_grad():
        again, _, values = policy.logprobs(rollout.encoded, responses.ids, 1.0, mask=mask)
    # Old log-probs are those that the tokens were drawn from, so the first ratios are importance weights near 1.
    gap = (again - responses.logprobs)[mask].abs()
    assert float(gap.max()) < 0.1
    assert float(gap.mean()) < 0.02
    torch.testing.assert_close(values[mask], responses.values[mask], rtol=0.1, atol=0.1)


def test_scoring_few_rows_at_once_changes_no_log_prob(loaded: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    disturb(loaded)  # Away from the reference, so that it matters which weights score a response.
    prompts, generation = to_prompts(ROWS), GenerationConfig(max_new_tokens=8)
    whole = collect_rollout(loaded, prompts, generation, Draws(0, "rollout"))
    monkeypatch.setattr(loaded, "rows_at_once", lambda length: 3)
    few = collect_rollout(loaded, prompts, generation, Draws(0, "rollout"))
    assert torch.equal(few.responses.ids, whole.responses.ids)
    mask = whole.responses.response_mask
    torch.testing.assert_close(few.ref_logprobs[mask], whole.ref_logprobs[mask], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(whole.ref_logprobs[mask], whole.responses.logprobs[mask], atol=1e-2)
