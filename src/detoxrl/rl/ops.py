"""How are masked token tensors averaged and whitened?"""

import torch


def masked_mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of `values` (B, T) over the True positions of `mask` (B, T), a scalar."""
    return torch.where(mask, values, 0.0).sum() / mask.sum()


def masked_var(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the population variance (ddof 0) of `values` (B, T) over `mask` (B, T), a scalar."""
    return masked_mean((values - masked_mean(values, mask)).square(), mask)


def whiten(values: torch.Tensor, mask: torch.Tensor, epsilon: float = 1e-8) -> torch.Tensor:
    """Return `values` (B, T) shifted and scaled to mean 0 and population variance 1 over `mask`; 0 elsewhere.

    Once per batch, not per minibatch: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".
    """
    mean, var = masked_mean(values, mask), masked_var(values, mask)
    return torch.where(mask, (values - mean) * torch.rsqrt(var + epsilon), 0.0)
