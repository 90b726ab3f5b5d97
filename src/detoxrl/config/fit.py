"""What can be set when a classifier is fitted to labelled texts, and which values are allowed?

As in `schema`, the docstring below a field is its help text.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass

from detoxrl.config.schema import PYDANTIC, NonEmptyText
from detoxrl.errors import require

Names = Annotated[tuple[NonEmptyText, ...], Field(min_length=1)]
Share = Annotated[float, Field(gt=0, lt=1)]

# With a LoRA few weights train, from zero; a whole encoder is moved carefully.
_LORA_LR = 1e-3
_WHOLE_LR = 1e-4


@dataclass(frozen=True, kw_only=True, config=PYDANTIC)
class FitConfig:
    """Where labelled texts come from, and how a classifier is fitted to them."""

    source: NonEmptyText
    """File (.csv, .json, .jsonl, .jsonl.gz, .parquet), folder of such files, or hub id of the labelled texts."""

    text_column: Names = ("text",)
    """Columns of the texts. A dot leads into a nested column: prompt.text. Several columns give a row several texts,
    each with labels of its own."""

    label_columns: Names = ("label",)
    """Columns of the labels. A label is looked up beside its text first (with the text prompt.text, toxicity is
    prompt.toxicity), then in the row. Numbers in [0, 1], thumbs (👍, 👎, up, down) and true or false become one output
    per column; other values of a single column are the names of classes."""

    labels: Names | None = None
    """Names of the outputs. With several names for one column: the classes, of which a value is the name, or the number
    from 0 on. None: the names of the label columns, or the classes in alphabetical order."""

    chosen_column: str | None = None
    """Column of the better text of a pair; with rejected_column, a Bradley-Terry scorer is fitted instead. None: texts
    have labels."""

    rejected_column: str | None = None
    """Column of the worse text of a pair."""

    group_column: str | None = None
    """Column that groups the texts in a table of results, such as the identity that a text mentions; looked up as a
    label is. None: no such table."""

    encoder: NonEmptyText = "sentence-transformers/all-MiniLM-L6-v2"
    """Folder or hub id of the pretrained model that is fitted."""

    lora_rank: Annotated[int, Field(gt=0, le=1024)] | None = None
    """Rank of a LoRA on every linear layer; the head trains too. None: all weights train."""

    lr: PositiveFloat | None = None
    """Maximum learning rate; it rises linearly over the first tenth of the steps, then decays linearly to 0. None: 1e-3
    with a LoRA, else 1e-4."""

    epochs: PositiveInt = 3
    """Number of passes over the training texts."""

    batch_size: PositiveInt = 32
    """Number of texts, or pairs, per optimizer step."""

    max_length: Annotated[int, Field(ge=3)] = 256
    """Maximum length of a text, in tokens, at most as many as the encoder reads; longer ones lose their end. The
    classifier keeps this limit."""

    balance: bool = False
    """Weigh texts so that the two sides of each label, or all classes, have the same weight in the loss. Calibration
    then makes the probabilities fit the data as it is."""

    validate_every: PositiveInt | None = None
    """Number of steps between validations; the last step is always validated. None: once an epoch."""

    patience: PositiveInt | None = None
    """Training stops after this many validations without a lower loss. None: it never stops early. In either case the
    weights with the lowest validation loss are kept."""

    calibration: Literal["temperature", "isotonic", "none"] = "temperature"
    """How probabilities are made right on the validation texts: `temperature` divides logits by a temperature and adds
    a bias, and becomes part of the weights; `isotonic` maps logits by a monotonic step function in calibration.json,
    which only detoxrl reads."""

    held_out: Share = 0.2
    """Fraction of the rows that do not train where the source has no such splits: one half for validation, the other
    for the test."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of the splits, the new head, the order of the texts, and dropout."""

    def __post_init__(self) -> None:
        both = (self.chosen_column is None) == (self.rejected_column is None)
        missing = "chosen_column" if self.chosen_column is None else "rejected_column"
        require(both, missing, None, "is missing beside the other text of a pair", "name both columns")

        fits = not (self.is_pairs and self.calibration == "isotonic")
        rule = "needs labels, and pairs have none"
        require(fits, "calibration", self.calibration, rule, "use temperature or none")

        usable = not (self.is_pairs and self.balance)
        require(usable, "balance", True, "needs labels, and pairs have none", "leave it out")

        one_name = not (self.is_pairs and self.labels is not None and len(self.labels) > 1)
        require(one_name, "labels", self.labels, "names several outputs, and a scorer has one", "give one name")

        self._require_different("text_column", self.text_column)
        self._require_different("label_columns", self.label_columns)
        self._require_different("labels", self.labels or ())

    def _require_different(self, field: str, names: tuple[str, ...]) -> None:
        different = len({name.lower() for name in names}) == len(names)
        require(different, field, names, "repeats a name", "name each once; case is ignored")

    @property
    def is_pairs(self) -> bool:
        """Whether pairs of texts are compared, so that texts have no labels."""
        return self.chosen_column is not None

    @property
    def peak_lr(self) -> float:
        """The maximum learning rate."""
        if self.lr is not None:
            return self.lr
        return _WHOLE_LR if self.lora_rank is None else _LORA_LR

    @property
    def source_name(self) -> str:
        """How files that may be shared call the source: the hub id, or the name of the file or folder."""
        return Path(self.source).name if Path(self.source).exists() else self.source
