"""How likely is each token, without keeping a number for every word of the vocabulary?"""

from typing import Any

import torch

from detoxrl.models.linear import linear

# Most logits at once: 16 MB in fp32, and some copies of it.
LOGITS = 4_000_000


def select_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return values (N, ...) of the N tokens of (B, T, ...) under the mask; without one, of all."""
    return values.flatten(0, 1) if mask is None else values[mask]


class _TokenLogprobs(torch.autograd.Function):
    """d log p(y) / d logits = 1[y] - p needs p alone, so the slope by the states is made on the way there."""

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logprobs, entropies, slopes = [], [], []
        size = max(1, LOGITS // len(head))
        for some, chosen in zip(states.split(size), ids.split(size), strict=True):
            logits = linear(some, head).float()
            every = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
            logprobs.append(every.gather(1, chosen[:, None]).squeeze(1))
            shares = every.exp()
            entropies.append(-every.mul_(shares).sum(-1))
            if ctx.needs_input_grad[0]:
                mean = linear(shares.to(head.dtype), head.t())
                slopes.append((head[chosen].float() - mean.float()) / temperature)
        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        if slopes:
            ctx.save_for_backward(torch.cat(slopes).to(states.dtype))
        return torch.cat(logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (slopes,) = ctx.saved_tensors
        return slopes * grads[0][:, None].to(slopes.dtype), None, None, None


def token_logprobs(
    states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log-probs of `ids` (N,) and entropies, both in nats and (N,), after states (N, D) under a head (V, D).

    Logits are made for a few rows at a time. Entropies have no gradient.
    """
    if head.requires_grad and torch.is_grad_enabled():
        every = (linear(states, head).float() / temperature).log_softmax(-1)
        seen = every.detach()
        return every.gather(1, ids[:, None]).squeeze(1), -(seen.exp() * seen).sum(-1)
    return _TokenLogprobs.apply(states, head, ids, temperature)  # type: ignore[no-untyped-call, no-any-return]
