"""In which rows are the responses to a prompt, and how are they split into passes?

The k responses to a prompt are its group: rows p * k to p * k + k - 1 for prompt p.
"""

from collections.abc import Iterator

import torch


def response_rows(prompts: torch.Tensor, group_size: int) -> torch.Tensor:
    """Return the rows (n * group_size,) of the responses to prompts (n,), long."""
    samples = torch.arange(group_size, device=prompts.device)
    return (prompts[:, None] * group_size + samples).flatten()


def split_into_passes(prompts: torch.Tensor, group_size: int, most: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield prompts (n,) and the rows of their responses (m,), long, in parts of at most `most` responses.

    A part has as many responses to each of its prompts, in consecutive rows: all of whole groups or, if a group is
    larger than `most`, some of one.
    """
    at_once = min(group_size, most)
    for part in prompts.split(max(1, most // group_size)):
        rows = response_rows(part, group_size).view(len(part), group_size)
        for some in rows.split(at_once, 1):
            yield part, some.flatten()


def closed_up(places: torch.Tensor, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the places (n,) of rows once prompts without rows are gone, and the prompts (m,) that stay, all long.

    `places` (n,) are the rows' places so far, `group_size` to a prompt. A group keeps its empty places, because all
    groups need the same size.
    """
    prompts, numbers = (places // group_size).unique(return_inverse=True)
    return numbers * group_size + places % group_size, prompts
