"""What has every file of a run to hold, so that what reads it can rely on it?

Only what is read is demanded; what else is there is left alone. Files of earlier versions lack some of it, so what
came later is optional.
"""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError


class _Record(BaseModel):
    """An object of which some entries are known."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Measures(_Record):
    policies: dict[str, str]
    texts: dict[str, str]
    names: dict[str, str]


class _Run(_Record):
    settings: dict[str, Any]
    machine: dict[str, Any]
    changes: list[dict[str, Any]]
    measures: _Measures


class _Rows(_Record):
    splits: dict[str, dict[str, int]]
    truncated: dict[str, int] = Field(default_factory=dict)


class _Validated(_Record):
    step: int = Field(ge=0)
    toxicity: float
    quality: float


class _Kept(_Record):
    kl: float


class _Checkpoint(_Record):
    kept_step: int = Field(ge=0)
    parted_step: int | None
    quality_by: str | None = None
    kept: _Kept


class _Step(_Record):
    step: int = Field(ge=0)


class _Sample(_Record):
    id: str
    text: str
    responses: dict[str, list[str]]
    toxicity: dict[str, Any]


class _Memory(_Record):
    microbatch_size: int = Field(ge=1)
    keep_cross: bool
    recompute: bool = False


class _Moments(_Record):
    mean: float
    std: float = Field(gt=0)


class _Toxicity(_Record):
    before: dict[str, float | None]
    after: dict[str, float | None]


class _Quality(_Record):
    before: float | None
    after: float | None


class _Evaluation(_Record):
    n_prompts: int = Field(ge=1)
    samples_per_prompt: int = Field(ge=1)
    primary_judge: str
    toxicity: dict[str, _Toxicity] = Field(min_length=1)
    quality: dict[str, _Quality]
    baselines: dict[str, dict[str, Any]]
    splits: dict[str, dict[str, Any]]


_SCHEMAS: dict[str, TypeAdapter[Any]] = {
    "run.json": TypeAdapter(_Run),
    "seconds.json": TypeAdapter(dict[str, float]),
    "seconds_before_stop.json": TypeAdapter(dict[str, float]),
    "rows.json": TypeAdapter(_Rows),
    "checkpoint.json": TypeAdapter(_Checkpoint),
    "memory.json": TypeAdapter(_Memory),
    # The first versions stored mean and std of their only term, without its name.
    "normaliser.json": TypeAdapter(dict[str, _Moments | float]),
    "eval.json": TypeAdapter(_Evaluation),
    "masked_words.json": TypeAdapter(list[str]),
}


_LINES: dict[str, TypeAdapter[Any]] = {
    "metrics.jsonl": TypeAdapter(list[_Step]),
    "validation.jsonl": TypeAdapter(Annotated[list[_Validated], Field(min_length=1)]),
    "samples.jsonl": TypeAdapter(Annotated[list[_Sample], Field(min_length=1)]),
}


def require_contents(name: str, value: Any) -> None:
    """Raise ValueError, in one line, unless a file of a run with this name may hold this value.

    The value of a file of JSON lines is the list of their objects.
    """
    schema = _SCHEMAS.get(name) or _LINES.get(name)
    if schema is None:
        return
    try:
        schema.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the whole file"
        raise ValueError(f"{place}: {first['msg'].lower()}") from None
