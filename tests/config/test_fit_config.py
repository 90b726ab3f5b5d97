"""Settings of a fit that no machine could carry out, or that would leave nothing of a text, are refused by name."""

import pytest

from detoxrl.config.edit import fit_config
from detoxrl.errors import InputError


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_length", 2), ("seed", 2**63), ("seed", -1), ("lora_rank", 0), ("lora_rank", 100_000), ("epochs", 0)],
)
def test_a_bound_is_held(setting: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"{setting} = {value}: must "):
        fit_config({"source": "texts.csv", setting: value})
