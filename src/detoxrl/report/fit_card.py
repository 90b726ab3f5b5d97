"""What does the model card of a fitted classifier say?"""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from detoxrl.report import fit_words
from detoxrl.report.words import number
from detoxrl.runtime.hub import is_hub_id

_TEMPLATE = Path(__file__).with_name("fit_card.md.j2")


def fit_card(result: dict[str, Any], name: str, plot_note: str) -> str:
    """Return the model card of a fitted classifier, in Markdown. `result` is the content of fit.json.

    The card contains no example texts, no local paths and no licence.
    """
    settings = result["settings"]
    encoder, source = settings["encoder"], settings["source"]
    is_adapter = settings["lora_rank"] is not None
    data_set = _hub_name(source)
    metadata = ModelCardData(
        base_model=_hub_name(encoder),
        datasets=[data_set] if data_set else None,
        library_name="peft" if is_adapter else "transformers",
        model_name=name,
        pipeline_tag="text-classification",
        tags=["detoxrl", *(["lora"] if is_adapter else [])],
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        name=name,
        result=result,
        settings=settings,
        is_adapter=is_adapter,
        base=encoder.partition("@")[0],
        revision=encoder.partition("@")[2],
        plot_note=plot_note,
        number=number,
        words=fit_words,
    )
    return f"{card}\n"


def _hub_name(source: str) -> str | None:
    """Return a hub id without its revision; None for the name of a local file or folder."""
    return source.partition("@")[0] if is_hub_id(source) and "/" in source else None
