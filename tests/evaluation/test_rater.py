"""Perplexity by a named model: that of its own forward pass, whatever the batch."""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree

import numpy as np
import pytest
import torch

from detoxrl.errors import InputError
from detoxrl.evaluation import rater
from detoxrl.evaluation.rater import load_rater
from detoxrl.models.loading import load_base
from small_runs import detoxrl, own

CPU = torch.device("cpu")
PAIRS = [
    ("Ann: You lost my parcel.", "I am sorry."),
    ("Ann: Hi.\n", "Hello, you!"),
    ("", "They quarrel about the soup and the lamp and the garden."),
    ("Ann: Where is it?", ""),
    ("Ann: Where is it?", "There."),
]


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_nats_and_tokens_are_those_of_the_models_own_forward_pass(
    bases: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rater, "_BATCH", 3)
    rated = load_rater(str(bases[name]), CPU)(PAIRS)
    model, tokenizer = load_base(str(bases[name]))
    for (text, response), (nats, tokens) in zip(PAIRS, rated, strict=True):
        context = tokenizer(text).input_ids or [tokenizer.eos_token_id]
        spaced = response if text.endswith("\n") else f" {response}"
        ids = tokenizer(spaced, add_special_tokens=False).input_ids if response else []
        assert tokens == len(ids)
        expected = 0.0
        with torch.no_grad():
            for position in range(len(ids)):  # One token at a time, in float64.
                logits = model(input_ids=torch.tensor([context + ids[:position]])).logits[0, -1].double()
                expected -= float(logits.log_softmax(-1)[ids[position]])
        assert nats == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert rated[3].tolist() == [0.0, 0.0]


def test_a_text_longer_than_the_positions_loses_its_beginning(bases: dict[str, Path]) -> None:
    model, tokenizer = load_base(str(bases["gpt2"]))
    positions = model.config.max_position_embeddings
    rate = load_rater(str(bases["gpt2"]), CPU)
    long = "Ann: You lost my parcel. " * positions
    nats, tokens = rate([(long, "I am sorry.")])[0]
    assert np.isfinite(nats)
    kept = tokenizer.decode(tokenizer(long).input_ids[-(positions - int(tokens)) :])
    assert len(tokenizer(kept).input_ids) <= positions


def test_an_encoder_decoder_is_refused(bases: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"evaluation\.perplexity = '.*': is an encoder-decoder; give a causal model"):
        load_rater(str(bases["t5"]), CPU)


def test_a_run_shows_the_perplexity_of_every_system_by_the_named_model(
    place: Path, bases: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    copytree(bases["gpt2"], place / "other")
    assert detoxrl(own("--evaluation.perplexity", "nowhere/")) == 2
    assert "evaluation.perplexity = 'nowhere/'" in capsys.readouterr().err
    assert detoxrl(own("--evaluation.perplexity", "other", "--rl.steps", "1")) == 0
    evaluation = json.loads((place / "runs/own/eval.json").read_text())
    assert evaluation["quality"]["nll_by_model"]["before"] > 0
    assert evaluation["baselines"]["word_filter"]["quality"]["nll_by_model"]["after"] > 0
    assert "Perplexity by another model" in (place / "runs/own/report.html").read_text()
