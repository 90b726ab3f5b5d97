"""What would Perspective have said of a text?

Perspective is an interface that closes; its scores of the texts of RealToxicityPrompts are frozen. perspective-minilm
is a LoRA of MiniLM fitted to them, and comes with the package. docs/judges.md says how well it agrees with them.
"""

from collections.abc import Callable, Sequence
from hashlib import file_digest

import numpy as np

from detoxrl.config.judges import PERSPECTIVE, PERSPECTIVE_BASE, PERSPECTIVE_SCORES
from detoxrl.errors import require
from detoxrl.evaluation.judges import memoized
from detoxrl.evaluation.perspective_encoder import PERSPECTIVE_REMEDY, perspective_encoder
from detoxrl.evaluation.statistics import Floats
from detoxrl.rewards.classifier import load_classifier
from detoxrl.runtime.shipped import manifest, shipped_folder
from detoxrl.runtime.world import current_world

Scores = Callable[[Sequence[str]], Floats]  # scores in [0, 1] of N texts, (N, 8), in the order of PERSPECTIVE_SCORES
_FOLDER = "perspective"


_loaded: dict[str, Scores] = {}
"""The judge by the device that it is on: all who ask for it share its memory of texts."""


def perspective_scores(field: str) -> Scores:
    """Return what rates texts by all scores of perspective-minilm at once, each distinct text in one pass.

    It is loaded once, and remembers its texts. Raises InputError, naming `field`, when its encoder is neither installed
    nor available from the hub, or is another one, StorageError when the package's files are corrupted.
    """
    device = str(current_world().device)
    if device not in _loaded:
        _loaded[device] = _load(field)
    return _loaded[device]


def _load(field: str) -> Scores:
    folder, entry = shipped_folder(_FOLDER)
    _require_base(field, entry["made"]["base_sha256"])
    classifier = load_classifier(str(folder), field, {field: PERSPECTIVE_SCORES[0]}, current_world().device)

    def rate(texts: Sequence[str]) -> Floats:
        probabilities: Floats = classifier.probabilities(texts).double().numpy()
        return probabilities

    remembered = memoized(rate)
    return lambda texts: remembered(texts) if texts else np.zeros((0, len(PERSPECTIVE_SCORES)))


def perspective_version() -> int:
    """Return the version of the packaged judge; scores of different versions are not compared."""
    version: int = manifest()[_FOLDER]["made"]["version"]
    return version


def _require_base(field: str, expected: str) -> None:
    """Raise InputError unless the encoder is there, and is the one that the LoRA was fitted on."""
    folder = perspective_encoder(field)
    with (folder / "model.safetensors").open("rb") as weights:
        digest = file_digest(weights, "sha256").hexdigest()
    rule = f"was fitted on other weights than those of {PERSPECTIVE_BASE} in {folder}"
    require(digest == expected, field, PERSPECTIVE, rule, PERSPECTIVE_REMEDY)
