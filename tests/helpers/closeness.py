"""When do our numbers agree with those of another implementation?"""

from __future__ import annotations

import torch


def close(ours: torch.Tensor | float, theirs: torch.Tensor | float) -> None:
    """Demand that no difference exceeds 1e-5 of the largest expected number."""
    ours, theirs = torch.as_tensor(ours).detach(), torch.as_tensor(theirs)
    assert theirs.abs().max() > 0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5 * float(theirs.abs().max()), check_dtype=False)
