"""Random batches of token tensors in float64, with their masks, and how they are compared with a twin."""

from __future__ import annotations

import torch


def batch(seed: int, rows: int = 5, length: int = 7) -> tuple[torch.Generator, list[int], torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, length, *torch.randint(1, length + 1, (rows - 2,), generator=generator).tolist()]
    return generator, lengths, torch.arange(length)[None, :] < torch.tensor(lengths)[:, None]


def normal(generator: torch.Generator, mask: torch.Tensor) -> torch.Tensor:
    return torch.randn(mask.shape, generator=generator, dtype=torch.float64)


def close(ours: torch.Tensor, theirs: object) -> None:
    torch.testing.assert_close(ours, torch.tensor(theirs, dtype=torch.float64), rtol=1e-10, atol=1e-10)
