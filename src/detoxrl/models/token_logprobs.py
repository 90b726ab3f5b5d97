"""How likely is each token, without keeping a number for every word of the vocabulary?

The logits of N tokens are an (N, V) matrix, with V up to 150,000 the largest tensor of a pass, while all that is needed
of it are N log-probs and N entropies. So the language-model head is applied to a chunk of tokens at a time, and the
logits of a chunk are dropped before the next chunk is computed.
"""

from typing import Any

import torch

from detoxrl.models.linear import linear

# Maximum number of logits in memory at once: 16 MB in float32, of which a few copies exist.
MAX_LOGITS = 4_000_000


def select_tokens(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the values (N, ...) of the N tokens of (B, T, ...) that are True in the mask (B, T), or of all B * T."""
    return values.flatten(0, 1) if mask is None else values[mask]


def place_tokens(values: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return the values (N,) of the tokens that `select_tokens` selects in their places (B, T) of ids, 0 elsewhere."""
    if mask is None:
        return values.view(ids.shape)
    return torch.zeros(ids.shape, device=ids.device).masked_scatter(mask, values)


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs and entropies under a frozen head, whose gradients are computed in the forward pass.

    With logits z = W h / temperature and probabilities p = softmax(z), the gradient of log p[y] with respect to z is
    onehot(y) - p, so its gradient with respect to the hidden state h is (W[y] - p W) / temperature. That of the entropy
    H with respect to z is -p (log p + H). They need only p, which is at hand while the logits of a chunk are. Computing
    them there means that (N, D) numbers are saved for the backward pass instead of (N, V) logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: torch.Tensor,
        head: torch.Tensor,
        ids: torch.Tensor,
        temperature: float,
        entropy_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen_logprobs = []
        entropies = []
        logprob_gradients = []
        entropy_gradients = []
        size = max(1, MAX_LOGITS // len(head))
        head = head.to(states.dtype)  # Once for all chunks, where it is stored in less precision.

        for chunk, chunk_ids in zip(states.split(size), ids.split(size), strict=True):
            logits = linear(chunk, head).float()
            logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
            chosen_logprobs.append(logprobs.gather(1, chunk_ids[:, None]).squeeze(1))

            probabilities = logprobs.exp()
            weighted = logprobs.mul_(probabilities)  # p log p, in place: logprobs are not needed again
            entropy = -weighted.sum(-1)
            entropies.append(entropy)

            if ctx.needs_input_grad[0]:
                mean_row = linear(probabilities.to(head.dtype), head.t())  # p W, the head's rows averaged under p
                logprob_gradients.append((head[chunk_ids].float() - mean_row.float()) / temperature)
                if entropy_gradient:
                    by_logit = weighted.add_(probabilities * entropy[:, None])
                    entropy_gradients.append(-linear(by_logit.to(head.dtype), head.t()).float() / temperature)

        all_entropies = torch.cat(entropies)
        if not entropy_gradient:
            ctx.mark_non_differentiable(all_entropies)
        gradients = [torch.cat(parts).to(states.dtype) for parts in (logprob_gradients, entropy_gradients) if parts]
        ctx.save_for_backward(*gradients)
        return torch.cat(chosen_logprobs), all_entropies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        # Of log-probs, and of entropies where they have a gradient.
        by_state = [
            saved * grad[:, None].to(saved.dtype) for saved, grad in zip(ctx.saved_tensors, grads, strict=False)
        ]
        return torch.stack(by_state).sum(0), None, None, None, None


def token_logprobs(
    states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, temperature: float, entropy_gradient: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probs of `ids` (N,) and the entropies (N,), in nats, after states (N, D) under a head (V, D).

    The logits are computed in chunks of at most `MAX_LOGITS`, unless the head itself trains: its gradient needs the
    logits of all tokens. Entropies have a gradient only with `entropy_gradient`.
    """
    if head.requires_grad and torch.is_grad_enabled():
        logprobs = (linear(states, head).float() / temperature).log_softmax(-1)
        return logprobs.gather(1, ids[:, None]).squeeze(1), entropies_of(logprobs, entropy_gradient)

    return _TokenLogprobs.apply(states, head, ids, temperature, entropy_gradient)  # type: ignore[no-untyped-call, no-any-return]


def entropies_of(logprobs: torch.Tensor, with_gradient: bool) -> torch.Tensor:
    """Return the entropies (N,), in nats, of distributions with log-probs (N, V)."""
    if with_gradient:
        return -(logprobs.exp() * logprobs).sum(-1)
    return -logprobs.detach().exp().mul_(logprobs.detach()).sum(-1)
