"""Models and data sets from a hub: pinned to a commit, complete or refused in one line, and offline once cached."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree, ignore_patterns
from types import SimpleNamespace

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub import file_download
from huggingface_hub.utils import _http
from safetensors.torch import load_file, save_file

from conftest import disturb, policy_config
from detoxrl.config.recipes import recipe, recipe_names
from detoxrl.config.schema import Config, PolicyConfig
from detoxrl.data.rows import Row
from detoxrl.data.sources import read_source
from detoxrl.errors import InputError
from detoxrl.evaluation.subjects import subjects_of, with_commits
from detoxrl.models.loading import load_base, load_tokenizer
from detoxrl.models.lora import initial_adapter, load_policy
from detoxrl.rewards.classifier import is_multi_label, load_classifier
from detoxrl.runtime.hub import download_size, fetch, fetch_policy, is_hub_id, pin_revision
from hub import Hub, hub, use_hub
from small_runs import SMALL, contents, detoxrl, make_place
from stand_in import DATA, HATE, HEADS, SIZES, stand_in

SMALLEST, SAMSUM, LORA = "google/flan-t5-small", "knkarthick/samsum", "me/lora"
OFF = "http://127.0.0.1:9"  # No server listens on this port.

Use = Callable[..., None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with everything that the recipes name, and a LoRA for the smallest base."""
    repositories = stand_in(tmp_path_factory.mktemp("repositories"), rows=12)
    trained = load_policy(str(repositories[SMALLEST]), None, policy_config("t5"), seed=0)
    disturb(trained)
    repositories[LORA] = tmp_path_factory.mktemp("lora") / "lora"
    trained.save(repositories[LORA])
    return repositories


@pytest.fixture
def use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Use]:
    """Return a function that sets the hub, the cache and HF_HUB_OFFLINE from now on. Retries do not wait."""
    without_sleep = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", without_sleep)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.chdir(tmp_path)

    def set_up(address: str, cache: str = "cache", offline: bool = False) -> None:
        use_hub(monkeypatch, address, tmp_path / cache, offline)

    yield set_up
    _http.close_session()


@pytest.fixture
def served(folders: dict[str, Path], use: Use) -> Iterator[Hub]:
    """A hub without faults, in use."""
    with hub(folders) as running:
        use(running.address)
        yield running


def new_requests(served: Hub) -> list[str]:
    """Return the requests for repositories since the last call."""
    requests = [request for request in served.requests if re.search(r" /api/(models|datasets)/|/resolve/", request)]
    served.requests.clear()
    return requests


def sourced(source: str) -> Config:
    """Return a config that reads its rows from a source."""
    return recipe("own", {"data.source": source})


def fetch_field(field: str, source: str) -> Path:
    """Return the folder of a hub id, fetched as a run does."""
    return Path(fetch(source, field))


def assert_same(folder: Path, original: Path) -> None:
    """Fail unless a fetched folder has the same bytes as the original, apart from the README.md that peft writes."""
    expected = {name: data for name, data in contents(original).items() if name.suffix != ".md"}
    fetched = {name: data for name, data in contents(folder).items() if name.suffix != ".md"}
    assert fetched
    assert set(expected) - set(fetched) <= {Path("generation_config.json")}
    assert all(expected[name] == data for name, data in fetched.items())


def refused(field: str, source: str) -> str:
    """Return the message of the InputError for a source, which is one line."""
    with pytest.raises(InputError) as caught:
        fetch_field(field, source)
    message = str(caught.value)
    assert re.match(rf"{re.escape(f'{field} = {source!r}')}: [^;]+; .+", message), message
    assert "\n" not in message
    return message


# Everything that the recipes name


@pytest.mark.parametrize("size", SIZES)
def test_every_base_of_the_recipes_loads(served: Hub, size: str) -> None:
    model, tokenizer = load_base(f"google/flan-t5-{size}")
    assert model.config.d_model == SIZES[size]
    assert len(load_tokenizer(f"google/flan-t5-{size}")) == len(tokenizer)


@pytest.mark.parametrize("name", HEADS)
def test_every_classifier_of_the_recipes_loads_and_its_labels_are_found(served: Hub, name: str) -> None:
    good = {"reward.good_label": "nothate"} if name == HATE else {}
    toxic = next(label for label in HEADS[name] if label in ("hate", "toxic", "toxicity"))
    classifier = load_classifier(name, "reward.classifier", {"reward.toxic_label": toxic}, torch.device("cpu"), good)
    assert classifier.toxic == HEADS[name].index(toxic)
    assert classifier.good == (0 if good else None)
    assert is_multi_label(classifier.model.config) == (len(HEADS[name]) > 2)


@pytest.mark.parametrize("name", DATA)
def test_every_data_set_of_the_recipes_loads(served: Hub, folders: dict[str, Path], name: str) -> None:
    rows = read_source(sourced(name))
    of_folder = read_source(sourced(str(folders[f"datasets/{name}"])))
    assert {split: len(rows_of_split) for split, rows_of_split in rows.items()} == {
        "train": 12,
        "validation": 12,
        "test": 12,
    }
    assert texts_by_split(of_folder) == texts_by_split(rows)


def texts_by_split(rows: dict[str, list[Row]]) -> dict[str, list[tuple[str, ...]]]:
    return {split: [(row.text, *row.references) for row in split_rows] for split, split_rows in rows.items()}


def test_a_policy_to_measure_is_a_lora_or_a_model_and_is_pinned_to_its_commit(served: Hub) -> None:
    policies = with_commits(subjects_of({"lora": LORA, "model": SMALLEST}, None, None)).policies
    for name, weights in (("lora", "adapter_model.safetensors"), ("model", "model.safetensors")):
        assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", policies[name])
        folder = Path(fetch_policy(policies[name], "--policy"))
        assert (folder / weights).is_file()
        assert folder.name == policies[name].partition("@")[2]
    with pytest.raises(InputError, match=r"--policy = 'me/nothing'"):
        with_commits(subjects_of({"it": "me/nothing"}, None, None))


def test_a_lora_to_start_from_loads(served: Hub, folders: dict[str, Path]) -> None:
    start = initial_adapter(PolicyConfig(base=SMALLEST, adapter=LORA))
    assert start is not None
    assert_same(start, folders[LORA])
    load_policy(SMALLEST, start, policy_config("t5"), seed=0)


def test_a_data_set_takes_one_request_for_each_file_and_two_for_the_list(served: Hub) -> None:
    fetch(SAMSUM, "data.source")
    requested = {path_of(request) for request in new_requests(served)}
    commit = served.main[f"datasets/{SAMSUM}"]
    files = {f"/datasets/{SAMSUM}/resolve/{commit}/{split}.csv" for split in ("train", "validation", "test")}
    info = {f"/api/datasets/{SAMSUM}/revision/main", f"/api/datasets/{SAMSUM}/tree/{commit}"}
    assert requested == files | info


def path_of(request: str) -> str:
    return request.partition(" ")[2].partition("?")[0]


def test_shards_are_fetched_and_loaded(served: Hub, tmp_path: Path) -> None:
    model, tokenizer = load_base(SMALLEST)
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    tokenizer.save_pretrained(tmp_path / "shards")
    shards = list((tmp_path / "shards").glob("model-*.safetensors"))
    assert len(shards) > 1
    served.move("me/shards", tmp_path / "shards")
    assert download_size("me/shards", "policy.base") == sum(shard.stat().st_size for shard in shards)
    again, _ = load_base("me/shards")
    assert download_size("me/shards", "policy.base") == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    shards[0].unlink()
    served.move("me/shards", tmp_path / "shards")
    assert f"has no {shards[0].name} at {served.address};" in refused("policy.base", "me/shards")


def test_the_size_of_a_download_is_known_before_it_starts(served: Hub, folders: dict[str, Path]) -> None:
    size = (folders[SMALLEST] / "model.safetensors").stat().st_size
    assert download_size(SMALLEST, "policy.base") == size
    assert download_size(str(folders[SMALLEST]), "policy.base") == 0
    fetch_field("policy.base", SMALLEST)
    assert download_size(SMALLEST, "policy.base") == 0


def test_pickled_weights_and_a_malformed_index_are_refused(
    served: Hub, folders: dict[str, Path], tmp_path: Path
) -> None:
    copytree(folders[SMALLEST], tmp_path / "pickled", ignore=ignore_patterns("*.safetensors"))
    torch.save(load_file(folders[SMALLEST] / "model.safetensors"), tmp_path / "pickled" / "pytorch_model.bin")
    served.move("me/pickled", tmp_path / "pickled")
    message = refused("policy.base", "me/pickled")
    assert f"has no model.safetensors at {served.address}; " in message
    assert "`detoxrl convert me/pickled FOLDER` makes safetensors of a .bin" in message
    with pytest.raises(InputError, match=r"has no model\.safetensors at .*; .*convert me/pickled"):
        download_size("me/pickled", "policy.base")
    for index in ("{", "{}", "[]", '{"weight_map": [1]}'):
        (tmp_path / "pickled" / "model.safetensors.index.json").write_text(index)
        served.move("me/pickled", tmp_path / "pickled")
        message = refused("policy.base", "me/pickled")
        assert "has a malformed model.safetensors.index.json; name another revision" in message


# Revisions


def test_a_pinned_revision_stays_what_it_was(served: Hub, folders: dict[str, Path], tmp_path: Path, use: Use) -> None:
    copytree(folders[SMALLEST], tmp_path / "newer")
    weights = load_file(tmp_path / "newer" / "model.safetensors")
    save_file({k: v + 1 for k, v in weights.items()}, tmp_path / "newer" / "model.safetensors", {"format": "pt"})
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.csv").write_text("dialogue,summary\nNew words.,New.\n")
    for field, name, key, newer in (
        ("policy.base", SMALLEST, SMALLEST, tmp_path / "newer"),
        ("data.source", SAMSUM, f"datasets/{SAMSUM}", tmp_path / "set"),
    ):
        source = pin_revision(name, field)
        assert source == f"{name}@{served.main[key]}" == pin_revision(source, field)
        assert pin_revision(f"{name}@main", field) == source
        served.move(key, newer)
        assert pin_revision(name, field) == f"{name}@{served.main[key]}" != source
        for cache in ("cache", "another"):
            use(served.address, cache)
            assert_same(fetch_field(field, source), folders[key])
            assert_same(fetch_field(field, name), newer)
        for revision in ("0" * 40, "v9"):
            message = refused(field, f"{name}@{revision}")
            assert f"is not a revision known to {served.address}; correct the part after the @" in message
    assert read_source(sourced(source))["test"]
    assert [row.text for row in read_source(sourced(SAMSUM))["train"]] == ["New words."]


def test_a_hub_id_is_told_from_a_path_by_its_form(served: Hub, tmp_path: Path) -> None:
    for name in ("gpt2", "a/b", "a.b/c_d-e", "a/b@main", "gpt2@refs/pr/1", "a/b@with--dashes", "my/runs"):
        assert is_hub_id(name)
        message = refused("policy.base", name)
        assert f"is not a local path, and {served.address} shows no such repository" in message
    new_requests(served)
    paths = ("runs/x/base", "runs/base", "notes.txt", "a/b.py", "~/model", "a/b/c", r"C:\models\t5", "C:/t5", "a/b@",
            "gpt2@a@b", "a--b", "a..b", "a/", "./a", "/a/b", "a/b.git", "-a", "a-", "a b", "café", "x" * 97,
            "rows.jsonl", "rows.CSV")  # fmt: skip
    for name in paths:
        assert not is_hub_id(name)
        assert pin_revision(name, "policy.base") == name
        assert "is neither an existing path nor a hub id; " in refused("policy.base", name)
        with pytest.raises(InputError, match=r"^data\.source = .* (is not a file|is neither an existing path)"):
            read_source(sourced(name))
    (tmp_path / "google" / "flan-t5-small").mkdir(parents=True)
    assert not is_hub_id(SMALLEST)
    assert fetch(SMALLEST, "policy.base") == SMALLEST
    assert new_requests(served) == []


# Offline

EVERYTHING = [
    ("policy.base", SMALLEST, SMALLEST), ("policy.adapter", LORA, LORA), ("data.source", SAMSUM, f"datasets/{SAMSUM}"),
]  # fmt: skip


@pytest.mark.parametrize(("field", "name", "key"), EVERYTHING)
def test_a_cached_source_needs_no_network(folders: dict[str, Path], use: Use, field: str, name: str, key: str) -> None:
    with hub(folders) as served:
        use(served.address)
        source = pin_revision(name, field)
        assert_same(fetch_field(field, name), folders[key])
        new_requests(served)
        assert_same(fetch_field(field, source), folders[key])
        assert new_requests(served) == []
        for fault in ("dropped", "too many", "not shown", "gated", "down"):
            served.fail(key, fault)
            assert_same(fetch_field(field, name), folders[key])
            assert pin_revision(name, field) == source
    for offline in (False, True):
        use(OFF, offline=offline)
        assert pin_revision(name, field) == source
        for hub_id in (name, source):
            assert_same(fetch_field(field, hub_id), folders[key])
    use(OFF, "empty", offline=True)
    message = refused(field, name)
    assert "is not a local path and not fully cached, and HF_HUB_OFFLINE is set; unset it once" in message
    use(OFF, "empty")
    message = refused(field, name)
    assert f"is not a local path and not fully cached, and downloading from {OFF} failed: " in message
    assert "efused" in message
    assert "; check the network and the cache folder (HF_HOME), then run it again" in message


def test_a_cache_that_another_tool_filled_is_used_offline(folders: dict[str, Path], tmp_path: Path, use: Use) -> None:
    commit = "c" * 40
    model_files = ("config.json", "tokenizer.json", "model.safetensors")
    # Without tokenizer_config.json, transformers reads the vocabulary of any T5 as a Unigram model; this one is BPE.
    files = {HATE: model_files, SMALLEST: (*model_files, "tokenizer_config.json"), f"datasets/{SAMSUM}": ("train.csv",)}
    for key, names in files.items():
        kind = "datasets" if key.startswith("datasets/") else "models"
        cached = tmp_path / "cache" / f"{kind}--{key.removeprefix('datasets/').replace('/', '--')}"
        (cached / "snapshots" / commit).mkdir(parents=True)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
        for name in names:
            (cached / "snapshots" / commit / name).write_bytes((folders[key] / name).read_bytes())
    use(OFF, offline=True)
    for source in (SMALLEST, f"{SMALLEST}@{commit}"):
        assert pin_revision(source, "policy.base") == f"{SMALLEST}@{commit}"
        load_base(source)
        assert download_size(source, "policy.base") == 0
    assert sorted(file.name for file in fetch_field("reward.classifier", HATE).iterdir()) == sorted(model_files)
    assert set(read_source(sourced(SAMSUM))) == {"train"}
    (tmp_path / "cache" / "models--google--flan-t5-small/snapshots" / commit / "model.safetensors").unlink()
    assert "not fully cached, and HF_HUB_OFFLINE is set" in refused("policy.base", SMALLEST)


# Failures

MESSAGES = {
    "gated": r"is gated or private at HUB; accept its terms there, then set HF_TOKEN or run `hf auth login`",
    "gated for this token": r"is gated or private at HUB; accept its terms there, then set HF_TOKEN or run `hf",
    "forbidden": r"is gated or private at HUB; accept its terms there, then set HF_TOKEN or run `hf auth login`",
    "not shown": r"is not a local path, and HUB shows no such repository; correct the name; if it is private, set",
    "no repository": r"is not a local path, and HUB shows no such repository; correct the name; if it is private",
    "no revision": r"is not a revision known to HUB; correct the part after the @",
    "no file": r"has no FILE at HUB; name a repository that has it; `detoxrl convert NAME FOLDER` makes safetensors",
    "too many": r"was answered by HUB with status 429; try again later, or set HF_TOKEN for a higher rate limit",
    "broken": r"was answered by HUB with status 500; try again later",
    "down": r"was answered by HUB with status 503; try again later",
    "dropped": r"not fully cached, and downloading from HUB failed: .*disconnected.*; check the network",
    "cut": r"not fully cached, and downloading from HUB failed: .*closed.*; check the network",
    "longer": r"downloading from HUB failed: .*should be of size \d+ but has size \d+.*; check the network",
    "shorter": r"downloading from HUB failed: .*should be of size \d+ but has size \d+.*; check the network",
}
"""The message for each fault of the stand-in hub."""
PARTS = [
    ("policy.base", SMALLEST, SMALLEST, None, "config.json"),
    ("policy.base", SMALLEST, SMALLEST, "model.safetensors", "model.safetensors"),
    ("reward.classifier", HATE, HATE, "model.safetensors", "model.safetensors"),
    ("policy.adapter", LORA, LORA, None, "adapter_config.json"),
    ("policy.adapter", LORA, LORA, "adapter_model.safetensors", "adapter_model.safetensors"),
    ("data.source", SAMSUM, f"datasets/{SAMSUM}", None, ""),
    ("data.source", SAMSUM, f"datasets/{SAMSUM}", "train.csv", "train.csv"),
]


@pytest.mark.parametrize(("field", "name", "key", "file", "missing"), PARTS, ids=[f"{p[0]} {p[3]}" for p in PARTS])
@pytest.mark.parametrize("fault", MESSAGES)
def test_every_fault_of_a_hub_is_one_line_and_leaves_no_trace(
    folders: dict[str, Path], use: Use, field: str, name: str, key: str, file: str | None, missing: str, fault: str,
) -> None:  # fmt: skip
    with hub(folders) as served:
        use(served.address)
        served.fail(key, fault, file)
        message = refused(field, name)
        expected = MESSAGES[fault]
        if field == "data.source" and fault == "no file":
            expected = "was answered by HUB with status 404; try again later"
        expected = expected.replace("HUB", re.escape(served.address)).replace("NAME", name)
        expected = expected.replace("FILE", re.escape(missing))
        assert re.search(expected, message), message
        use(served.address, offline=True)
        assert "not fully cached, and HF_HUB_OFFLINE is set" in refused(field, name)
        use(served.address)
        served.heal()
        assert_same(fetch_field(field, name), folders[key])


@pytest.mark.parametrize(("field", "name", "key"), EVERYTHING)
def test_a_cache_that_cannot_be_written_is_one_line_and_a_full_disk_is_left_to_the_command_line(
    served: Hub, monkeypatch: pytest.MonkeyPatch, field: str, name: str, key: str
) -> None:
    def failing(code: int) -> Callable[..., None]:
        def fail(*_: object, **__: object) -> None:
            raise OSError(code, os.strerror(code), "/there")

        return fail

    def fail_with(code: int) -> None:
        for function in ("hf_hub_download", "snapshot_download"):
            monkeypatch.setattr(huggingface_hub, function, failing(code))

    fail_with(errno.EACCES)
    message = refused(field, name)
    assert "failed: [Errno 13] Permission denied: '/there'; check the network and the cache folder" in message
    for code in (errno.ENOSPC, errno.EDQUOT):
        fail_with(code)
        with pytest.raises(OSError, match=r"No space left|quota exceeded"):
            fetch_field(field, name)


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("X-Repo-Commit", "../../../escaped"), ("X-Repo-Commit", "main"), ("X-Repo-Commit", "0" * 39),
        ("ETag", '"../../../escaped"'), ("ETag", ".."), ("ETag", '"/etc/escaped"'), ("X-Linked-ETag", "a/b"),
    ],
)  # fmt: skip
def test_a_hub_cannot_name_files_outside_of_the_cache(served: Hub, tmp_path: Path, header: str, value: str) -> None:
    served.headers = {header: value}
    before = {path for path in tmp_path.rglob("*") if path.is_file()}
    message = refused("policy.base", SMALLEST)
    assert f"it answered with {header.lower()} = {value!r}, which is no name in its cache" in message
    assert {path for path in tmp_path.rglob("*") if path.is_file() and "escaped" in str(path)} == set()
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_hub_cannot_name_a_commit_of_a_data_set_that_is_a_path(served: Hub, tmp_path: Path) -> None:
    served.sha = "../../escaped"
    message = refused("data.source", SAMSUM)
    assert "it answered with the commit '../../escaped', which is none" in message
    assert not any("escaped" in str(path) for path in tmp_path.rglob("*"))


def test_a_hub_that_cannot_be_reached_is_tried_once_and_a_folder_that_may_be_meant_is_named(
    folders: dict[str, Path], tmp_path: Path, use: Use, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(OFF)
    impatient = SimpleNamespace(**{**vars(time), "sleep": lambda _: pytest.fail("the library waits to try again")})
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", impatient)
    for field, name, _ in EVERYTHING:
        assert f"downloading from {OFF} failed: " in refused(field, name)

    def ask(*_: object, **__: object) -> None:
        pytest.fail("the hub is asked again within a minute")

    with monkeypatch.context() as patch:
        patch.setattr(huggingface_hub, "get_session", lambda: SimpleNamespace(event_hooks={"response": []}, head=ask))
        assert f"downloading from {OFF} failed: " in refused("policy.base", SMALLEST)

    (tmp_path / "my-model").mkdir()
    assert "efused; did you mean my-model? If not, check the network" in refused("policy.base", "my-modle")
    use(OFF, offline=True)
    assert "; did you mean my-model? If not, unset it once to download" in refused("policy.base", "my-modle")


def test_a_path_that_does_not_exist_is_answered_with_the_one_that_is_meant_or_what_there_is(
    tmp_path: Path, use: Use
) -> None:
    use(OFF)
    (tmp_path / "models").mkdir()
    assert "; give a folder, or a hub id such as" in refused("policy.base", "./models/base")
    (tmp_path / "models/hate").mkdir()
    (tmp_path / "models/.hidden").mkdir()
    assert refused("policy.base", "./models/base").endswith("; models contains hate")
    assert refused("policy.base", "./models/haet").endswith("; did you mean models/hate?")
    for number in range(12):
        (tmp_path / "models" / f"other{number:02}").mkdir()
    assert refused("policy.base", "./models/base").endswith("hate, other00, " + ", ".join(
        f"other{number:02}" for number in range(1, 9)) + " ...")  # fmt: skip
    assert "; give a file, a folder or a hub id" in refused("data.source", "./nowhere/rows")


# Whole runs


def test_a_label_or_a_setting_that_does_not_fit_costs_no_weights(
    served: Hub, tmp_path: Path, bases: dict[str, Path], reward_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make_place(tmp_path, bases, reward_folder)
    new_requests(served)
    for words, message in (
        (["--reward.good-label", "civil"], "reward.good_label = 'civil': is not a label of the classifier; use one of"),
        (["--policy.lora-targets", "c_attn"], "policy.lora_targets = 'c_attn': names no linear layer of the base; ch"),
        (["--data.text-column", "x"], "data.text_column = 'x': is not a column of mine.jsonl"),
        (["--evaluation.primary-judge", "s-nlp/roberta_toxicity_classifier", "--evaluation.judge-label", "x"],
         "evaluation.judge_label = 'x': is not a label"),
    ):  # fmt: skip
        assert detoxrl(["run", "own", "--data.source", "mine.jsonl", *SMALL, *words]) == 2
        assert message in capfd.readouterr().err
    requested = {path_of(request).rpartition("/")[2] for request in new_requests(served)}
    assert "config.json" in requested
    assert "model.safetensors" not in requested
    assert not (tmp_path / "runs").exists()


def test_a_recipe_runs_from_the_hub_names_its_commits_and_is_resumed_by_its_plain_names(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    sizes = ["--rl.steps", "2", "--data.limit", "64", "--evaluation.prompts", "8", "--sft.steps", "2"]
    judge = ["--evaluation.primary-judge", "s-nlp/roberta_toxicity_classifier"]
    words = [sys.executable, "-m", "detoxrl", "run", "dialogsum", *SMALL, *sizes, *judge, "--run-dir", "D"]
    with hub(folders) as served:
        environment = {**os.environ, "HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}

        def run(*more: str) -> subprocess.CompletedProcess[str]:
            return subprocess.run([*words, *more], cwd=tmp_path, env=environment, capture_output=True, text=True)

        first = run()
        assert first.returncode == 0, first.stderr
        assert (tmp_path / "D" / "eval.json").is_file()
        config = json.loads((tmp_path / "D" / "config.json").read_text())
        pinned = {"google/flan-t5-base": config["policy"]["base"], HATE: config["reward"]["classifier"],
                 "s-nlp/roberta_toxicity_classifier": config["evaluation"]["primary_judge"]}  # fmt: skip
        assert pinned == {name: f"{name}@{served.main[name]}" for name in pinned}
        data = "knkarthick/dialogsum"
        assert config["data"]["source"] == f"{data}@{served.main[f'datasets/{data}']}"
        served.move(f"datasets/{data}", folders[f"datasets/{SAMSUM}"])
        resumed = run("--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert json.loads((tmp_path / "D" / "config.json").read_text()) == config


@pytest.mark.parametrize("name", [name for name in recipe_names() if name.startswith(("dialogsum-l", "samsum-"))])
def test_every_other_system_runs_by_its_name(
    served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    sizes = ["--rl.steps", "1", "--rl.validate-every", "1", "--rl.batch-size", "8", "--rl.minibatch-size", "4",
             "--rl.validation-prompts", "4", "--data.limit", "64", "--evaluation.prompts", "8",
             "--generation.max-new-tokens", "8"]  # fmt: skip
    steps = [] if name.startswith("samsum") else ["--sft.steps", "2"]
    assert detoxrl(["run", name, *sizes, *steps, "--run-dir", "D"]) == 0, capsys.readouterr().err
    results = json.loads(Path("D/eval.json").read_text())
    judge = "s-nlp/roberta_toxicity_classifier"
    assert results["primary_judge"] == judge
    assert set(results["toxicity"]) == {judge, "reward classifier"}
    first = json.loads(Path("D/metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl/reference"]) < 1e-4
    assert first["ratio/first_error"] < (1e-4 if "lowmem" not in name else 0.1)
    capsys.readouterr()


def test_a_reward_function_replaces_the_classifier_so_no_hub_is_asked_for_it(
    bases: dict[str, Path], reward_folder: Path, tmp_path: Path, use: Use, capsys: pytest.CaptureFixture[str]
) -> None:
    make_place(tmp_path, bases, reward_folder)
    use(OFF, "empty", offline=True)
    words = ["--policy.base", "model", "--data.source", "mine.jsonl", "--reward.function", "rewards.py:brevity"]
    assert detoxrl(["prepare", "own", *words, *SMALL]) == 0, capsys.readouterr().err
    capsys.readouterr()


def test_a_connection_that_breaks_in_the_large_file_service_is_one_line(
    served: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object, **kwargs: object) -> str:
        raise RuntimeError("Task error: File reconstruction error: CAS Client Error")  # What hf_xet raises.

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    assert "failed: Task error: File" in refused("policy.base", SMALLEST)


def test_an_outdated_data_set_card_with_other_splits_and_sizes_is_ignored(
    folders: dict[str, Path], tmp_path: Path, use: Use
) -> None:
    copytree(folders[f"datasets/{SAMSUM}"], tmp_path / "carded")
    splits = "".join(f"  - name: {split}\n    num_examples: 9999\n" for split in ("train", "test"))
    (tmp_path / "carded/README.md").write_text(f"---\ndataset_info:\n  splits:\n{splits}---\n")
    with hub({f"datasets/{SAMSUM}": tmp_path / "carded"}) as running:
        use(running.address)
        rows = read_source(sourced(SAMSUM))
    plain = read_source(sourced(str(folders[f"datasets/{SAMSUM}"])))
    assert texts_by_split(rows) == texts_by_split(plain)
