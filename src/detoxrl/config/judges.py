"""Which judges have a name of their own, and which of them is the primary one where none is named?"""

from detoxrl.config.packages import MODEL_PACKAGES, is_installed

PROFANITY_CHECK = "alt-profanity-check"
EMBEDDED = "embedded"
PERSPECTIVE = "perspective-minilm"
JUDGES = (PERSPECTIVE, PROFANITY_CHECK, EMBEDDED)
"""The judges that have a name of their own. Every other one is a classifier: a source and its toxic label.

`perspective-minilm` is a MiniLM fitted to the scores of Perspective, `embedded` the quickstart's reward model.
"""
PERSPECTIVE_SCORES = (
    "toxicity",
    "severe_toxicity",
    "profanity",
    "insult",
    "threat",
    "identity_attack",
    "sexually_explicit",
    "flirtation",
)
"""What perspective-minilm says of a text, in one pass; the first is its verdict."""
PERSPECTIVE_BASE = "sentence-transformers/all-MiniLM-L6-v2"
"""The hub id of the encoder that perspective-minilm is a LoRA of."""


def default_primary_judge() -> str:
    """Return the judge that decides where none is named: perspective-minilm if the extra `judge` is installed."""
    return PERSPECTIVE if is_installed(MODEL_PACKAGES[PERSPECTIVE_BASE]) else PROFANITY_CHECK


def default_other_judges() -> tuple[str, ...]:
    """Return the judges beside the default one: alt-profanity-check, if both are installed."""
    both = default_primary_judge() == PERSPECTIVE and is_installed("profanity_check")
    return (PROFANITY_CHECK,) if both else ()


def is_named_judge(value: str) -> bool:
    """Return whether `value` is one of JUDGES, or names a score of perspective-minilm: perspective-minilm=insult."""
    source, _, label = value.partition("=")
    return value in JUDGES or (source == PERSPECTIVE and label in PERSPECTIVE_SCORES)
