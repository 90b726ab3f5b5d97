"""How does labelled text become a classifier that rewards and judges take?"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedTokenizerBase

from detoxrl.commands.fit_check import (
    RESULT,
    SETTINGS,
    FitPlan,
    is_state_of,
    planned_fit,
    require_still_usable,
    resumed_fit,
    settings_to_json,
)
from detoxrl.config.edit import fit_config
from detoxrl.config.fit import FitConfig
from detoxrl.data.labelled import Example, LabelKind
from detoxrl.errors import InputError, require
from detoxrl.evaluation.fitted import (
    class_accuracy,
    group_tables,
    meaning,
    measure_labels,
    measure_pairs,
    to_probabilities,
)
from detoxrl.evaluation.statistics import Floats
from detoxrl.models.encoder import load_under_new_head, output_layer, save_classifier, with_lora
from detoxrl.models.reader import load_reader
from detoxrl.report.fit_card import fit_card
from detoxrl.report.plots import reliability_plot, standalone
from detoxrl.rewards.calibration import (
    ISOTONIC_FILE,
    Affine,
    Isotonic,
    fit_affine,
    fit_isotonic,
    fold_in,
    isotonic_to_json,
    to_log_odds,
)
from detoxrl.rewards.classifier import CIVIL_PROBE, TOXIC_PROBE
from detoxrl.rewards.fitting import (
    Encoded,
    Encoder,
    FitData,
    Model,
    Trained,
    fit_classifier,
    length_limit,
    predict,
    total_steps,
)
from detoxrl.runtime.console import progress, status
from detoxrl.runtime.files import remove_leftovers, remove_leftovers_of, remove_path, replace_folder, write_text
from detoxrl.runtime.hub import is_hub_id
from detoxrl.runtime.randomness import torch_seed
from detoxrl.runtime.world import current_world

_PROBLEMS = {
    "scores": "multi_label_classification",
    "classes": "single_label_classification",
    "pairs": "regression",
}
_LIBRARIES = ("torch", "transformers", "peft", "scipy")
# Texts by which a folder that was written is compared with the model in memory, and the largest difference of a logit,
# absolute and relative.
_COMPARED = 8
_TOLERANCE = 1e-3

Json = dict[str, Any]


@dataclass(frozen=True)
class _Rated:
    """Validation or test examples with the logits of the classifier before its calibration."""

    logits: Floats  # (N, L); of pairs the differences (N, 1) between chosen and rejected.
    targets: Floats  # (N, L)


def fit(
    source: Path | str, out: Path | str, settings: Mapping[str, object] | None = None, *, overwrite: bool = False
) -> Json:
    """Fit a classifier to the labelled texts of a file, folder or hub data set, and write it to the new folder `out`.

    `settings` are those that `detoxrl fit --help` lists: {"label_columns": "toxic", "lora_rank": 16}. Returns the
    content of the folder's fit.json. Raises InputError before anything is written if the settings or the texts do not
    fit, TrainingError when the loss is not finite.
    """
    config = fit_config({"source": source, **(settings or {})})
    return run_fit(planned_fit(config, Path(out), overwrite))


def resume_fit(out: Path | str) -> Json:
    """Finish the fit of `out` that was stopped, with the result of one that was not. Raises InputError as `fit`."""
    return run_fit(resumed_fit(Path(out)))


def run_fit(plan: FitPlan) -> Json:
    """Fit, calibrate and measure the classifier of a plan, write its folder, and return its fit.json."""
    with _locked(plan):
        model, encoder = _load(plan)  # Before an old state goes: an encoder that cannot be loaded costs nothing.
        if not is_state_of(plan):
            _discard_state(plan.work)
        write_text(plan.work / SETTINGS, settings_to_json(plan))

        result = _fitted(plan, model, encoder)
    remove_path(plan.work)
    return result


def _fitted(plan: FitPlan, model: Model, encoder: Encoder) -> Json:
    kind = plan.labelled.kind
    data, test = _encoded(plan, encoder)
    trained = _train(plan, model, data)

    with status("measuring"):
        validation = _rated(model, encoder, data.validation, kind)
        calibration = _calibration(plan.config, validation, kind)
        rated = _rated(model, encoder, test, kind)
        labels = _meaning(plan, model, encoder, calibration)
        if isinstance(calibration, Affine):
            layer = output_layer(model)
            assert layer is not None
            fold_in(calibration, layer)

        cut = data.training.cut + data.validation.cut + test.cut
        result = _result(plan, encoder, trained, cut) | {
            "calibration": _calibration_account(calibration),
            "test": _measured(plan, rated, calibration),
            "meaning": labels,
        }
        _write(plan, model, encoder, calibration, result)
    return result


# Load


@contextmanager
def _locked(plan: FitPlan) -> Iterator[None]:
    """Hold the folder with the state of a fit for this process; creates it, and leaves no empty one behind."""
    work = plan.work
    work.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(work / ".lock").acquire(timeout=0)
    except Timeout:
        raise InputError("--out", str(work), "is in use by another process", "wait for it, or name another") from None

    with lock:
        remove_leftovers(work)
        remove_leftovers_of(plan.target)
        try:
            yield
        finally:
            if not (work / SETTINGS).is_file():
                remove_path(work)


def _discard_state(work: Path) -> None:
    remove_path(work / SETTINGS)
    for name in ("checkpoints", "best"):
        remove_path(work / name)


def _load(plan: FitPlan) -> tuple[Model, Encoder]:
    """Return the classifier before its training, on the device, and what encodes texts for it."""
    config = plan.config
    labels, kind = plan.labelled.labels, plan.labelled.kind
    base = str(Path(config.encoder).resolve()) if Path(config.encoder).exists() else config.encoder

    with status(f"loading {config.encoder}"):
        seed = torch_seed(config.seed, "fit head")
        model: Model
        tokenizer: PreTrainedTokenizerBase
        model, tokenizer = load_under_new_head(config.encoder, "encoder", labels, seed, _PROBLEMS[kind])
        if config.lora_rank is not None:
            model = with_lora(model, config.lora_rank, base, torch_seed(config.seed, "fit lora"))

    can_fold = config.calibration != "temperature" or output_layer(model) is not None
    rule = "needs a bias in the last layer, and the head of this encoder has none"
    require(can_fold, "calibration", config.calibration, rule, "use --calibration isotonic or none")

    limit = length_limit(model, tokenizer, config)
    tokenizer.model_max_length = limit  # Whoever loads the classifier cuts texts as training did.
    device: Any = current_world().device
    return model.to(device), Encoder(tokenizer, limit)


def _encoded(plan: FitPlan, encoder: Encoder) -> tuple[FitData, Encoded]:
    division = plan.division
    with status("tokenizing"):
        training, validation, test = map(encoder.encode, (division.train, division.validation, division.test))
    return FitData(plan.labelled.kind, encoder, training, validation), test


# Train and calibrate


def _train(plan: FitPlan, model: Model, data: FitData) -> Trained:
    with progress("fit", total_steps(len(data.training), plan.config)) as reach:

        def on_step(done: int, loss: float) -> None:
            reach(done, f"loss {loss:.3f}")

        return fit_classifier(model, data, plan.config, plan.work, on_step)


def _rated(model: Model, encoder: Encoder, examples: Encoded, kind: LabelKind) -> _Rated:
    logits: Floats = predict(model, encoder, examples).double().numpy()
    if kind == "pairs":
        logits = logits[0::2] - logits[1::2]
    return _Rated(logits, examples.targets.double().numpy())


def _calibration(config: FitConfig, validation: _Rated, kind: LabelKind) -> Affine | Isotonic | None:
    if config.calibration == "temperature":
        return fit_affine(validation.logits, validation.targets, kind)
    if config.calibration == "isotonic":
        return fit_isotonic(to_log_odds(validation.logits, kind), validation.targets)
    return None


def _calibration_account(calibration: Affine | Isotonic | None) -> Json:
    if isinstance(calibration, Affine):
        temperature = (1 / calibration.scale).tolist()
        return {"method": "temperature", "temperature": temperature, "bias": calibration.bias.tolist()}
    if isinstance(calibration, Isotonic):
        return {"method": "isotonic", "knots": [len(knots) for knots in calibration.log_odds]}
    return {"method": "none"}


# Measure and write


def _measured(plan: FitPlan, rated: _Rated, calibration: Affine | Isotonic | None) -> Json:
    labels, kind, seed = plan.labelled.labels, plan.labelled.kind, plan.config.seed
    if kind == "pairs":
        calibrated = rated.logits if not isinstance(calibration, Affine) else calibration(rated.logits)
        return {"pairs": measure_pairs(calibrated[:, 0], rated.logits[:, 0], seed)}

    probabilities = to_probabilities(rated.logits, kind, calibration)
    uncalibrated = to_probabilities(rated.logits, kind, None)
    result: Json = {"labels": measure_labels(labels, probabilities, uncalibrated, rated.targets, seed)}
    if kind == "classes":
        result["accuracy"] = class_accuracy(probabilities, rated.targets, seed)
    if plan.config.group_column is not None:
        groups = [example.group for example in plan.division.test]
        result["groups"] = group_tables(labels, probabilities, rated.targets, groups)
    return result


def _meaning(plan: FitPlan, model: Model, encoder: Encoder, calibration: Affine | Isotonic | None) -> Json:
    """Return by which labels a reward reads the classifier. The model is not calibrated yet."""
    labels, kind = plan.labelled.labels, plan.labelled.kind
    if kind == "pairs":
        return {"toxic_label": None, "good_label": labels[0]}

    targets = (0.0,) * len(labels)
    sentences = [Example((text,), targets, None, "probe", row) for row, text in enumerate((CIVIL_PROBE, TOXIC_PROBE))]
    logits = _rated(model, encoder, encoder.encode(sentences), kind).logits
    civil, toxic = to_probabilities(logits, kind, calibration)
    return meaning(labels, kind, civil, toxic)


def _result(plan: FitPlan, encoder: Encoder, trained: Trained, cut: int) -> Json:
    """Return what fit.json says beside the measurement; it names no path of this machine."""
    config, division = plan.config, plan.division
    encoder_name = config.encoder if is_hub_id(config.encoder) else Path(config.encoder).name
    settings = asdict(config) | {"source": config.source_name, "encoder": encoder_name, "lr": config.peak_lr}
    return {
        "kind": plan.labelled.kind,
        "labels": list(plan.labelled.labels),
        "settings": settings,
        "max_length": encoder.limit,
        "examples": {
            "train": len(division.train),
            "validation": len(division.validation),
            "test": len(division.test),
            "left_out": plan.labelled.left_out,
            "leaks": division.leaks,
            "in_unused_splits": division.unused,
            "conflicting_texts": division.conflicts,
            "cut_texts": cut,
        },
        "training": asdict(trained),
        "versions": {name: version(name) for name in _LIBRARIES},
    }


def _write(plan: FitPlan, model: Model, encoder: Encoder, calibration: Affine | Isotonic | None, result: Json) -> None:
    """Write the classifier's folder, once what was written has been read again and gives the same logits.

    Raises InputError, and leaves the fit's state, if its place was taken meanwhile.
    """
    labels = plan.labelled.labels
    with replace_folder(plan.target) as folder:
        save_classifier(model, encoder.tokenizer, folder)
        if isinstance(calibration, Isotonic):
            write_text(folder / ISOTONIC_FILE, isotonic_to_json(calibration, labels))

        plot = reliability_plot(_reliability(result["test"]))
        write_text(folder / "reliability.svg", standalone(plot.svg))
        write_text(folder / "README.md", fit_card(result, plan.target.resolve().name, plot.note))
        write_text(folder / RESULT, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
        _require_same_logits(folder, plan, model, encoder)
        require_still_usable(plan)


def _reliability(test: Json) -> dict[str, list[Json]]:
    if "pairs" in test:
        return {"the higher score is the chosen text's": test["pairs"]["reliability"]}
    return {label: result["reliability"] for label, result in test["labels"].items()}


def _require_same_logits(folder: Path, plan: FitPlan, model: Model, encoder: Encoder) -> None:
    """Raise RuntimeError if the folder gives other logits than the model in memory: an error of this program."""
    examples = encoder.encode(plan.division.test[:_COMPARED])
    read, _ = load_reader(str(folder), "--out", "report this", torch.device("cpu"))
    expected = predict(model, encoder, examples)
    given = predict(read, encoder, examples)
    if not torch.allclose(given, expected, rtol=_TOLERANCE, atol=_TOLERANCE):
        difference = float((given - expected).abs().max())
        raise RuntimeError(f"{folder} gives other logits than the model that was fitted, by up to {difference:.3g}")
