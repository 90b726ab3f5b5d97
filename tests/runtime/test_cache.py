"""The key of a cached model covers the code that trained it."""

from __future__ import annotations

from detoxrl.runtime import cache


def test_every_source_that_the_key_covers_exists() -> None:
    for source in cache._SOURCES:
        path = cache._PACKAGE / source
        assert path.is_file() or any(path.rglob("*.py")), source


def test_the_key_covers_the_training_code_and_what_it_learns_from() -> None:
    names = {path.relative_to(cache._PACKAGE).as_posix() for path in cache._source_files()}
    assert names >= {
        "training/sft.py",
        "training/finetune.py",
        "rewards/fit.py",
        "runtime/randomness.py",
        "models/loading.py",
        "models/t5.py",
        "data/rows.py",
        "data/embedded/corpus.py",
        "data/embedded/phrases.json",
    }
