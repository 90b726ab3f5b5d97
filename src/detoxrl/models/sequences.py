"""Which row of a matrix is which token of a batch of sequences?

All tokens of a pass are the rows of one matrix, so that no product has a row for padding. Only attention sees them as
padded sequences.
"""

import torch


class Sequences:
    """Where the tokens of S sequences of up to L tokens stand: as the rows of a matrix, or padded on the right."""

    def __init__(self, mask: torch.Tensor) -> None:
        self.mask = mask  # (S, L) bool: True first, then False.
        self.is_full = bool(mask.all())
        self._index = torch.arange(mask.numel(), device=mask.device)
        if not self.is_full:
            self._index = self._index[mask.flatten()]

    def __len__(self) -> int:
        return len(self._index)

    @property
    def positions(self) -> torch.Tensor:
        """The place of each row's token in its sequence (n,)."""
        return self._index % self.mask.shape[1]

    def numbers(self) -> torch.Tensor:
        """Return the row of each token in its place (S, L), 0 where there is none."""
        return self.padded(torch.arange(len(self), device=self.mask.device))

    def padded(self, rows: torch.Tensor) -> torch.Tensor:
        """Return rows (n, ...) as (S, L, ...), 0 where there is no token."""
        shape = self.mask.shape
        places = rows
        if not self.is_full:
            places = rows.new_zeros(shape.numel(), *rows.shape[1:]).index_copy(0, self._index, rows)
        padded: torch.Tensor = places.unflatten(0, shape)
        return padded

    def tokens_of(self, padded: torch.Tensor) -> torch.Tensor:
        """Return the rows (n, ...) of the tokens among (S, L, ...)."""
        flat = padded.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self._index)

    def padding_bias(self, dtype: torch.dtype) -> torch.Tensor | None:
        """Return a bias (S, 1, 1, L) that is -inf where there is no token and 0 elsewhere.

        It is None if there are tokens everywhere, which saves an addition in every layer.
        """
        if self.is_full:
            return None
        return torch.zeros_like(self.mask, dtype=dtype).masked_fill(~self.mask, -torch.inf)[:, None, None]
