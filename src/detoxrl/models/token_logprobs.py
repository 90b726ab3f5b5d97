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


class _TokenLogprobs(torch.autograd.Function):
    """Log-probs under a frozen head, whose gradient is computed in the forward pass.

    With logits z = W h / temperature and probabilities p = softmax(z), the gradient of log p[y] with respect to z is
    onehot(y) - p, so its gradient with respect to the hidden state h is (W[y] - p W) / temperature. It needs only p,
    which is at hand while the logits of a chunk are. Computing it there means that (N, D) numbers are saved for the
    backward pass instead of (N, V) logits.
    """

    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        chosen_logprobs = []
        entropies = []
        state_gradients = []
        size = max(1, MAX_LOGITS // len(head))

        for chunk, chunk_ids in zip(states.split(size), ids.split(size), strict=True):
            logits = linear(chunk, head).float()
            logprobs = (logits if temperature == 1 else logits / temperature).log_softmax(-1)
            chosen_logprobs.append(logprobs.gather(1, chunk_ids[:, None]).squeeze(1))

            probabilities = logprobs.exp()
            entropies.append(-logprobs.mul_(probabilities).sum(-1))  # in place: logprobs are not needed again

            if ctx.needs_input_grad[0]:
                mean_row = linear(probabilities.to(head.dtype), head.t())  # p W, the head's rows averaged under p
                state_gradients.append((head[chunk_ids].float() - mean_row.float()) / temperature)

        entropy = torch.cat(entropies)
        ctx.mark_non_differentiable(entropy)
        if state_gradients:
            ctx.save_for_backward(torch.cat(state_gradients).to(states.dtype))
        return torch.cat(chosen_logprobs), entropy

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        (state_gradients,) = ctx.saved_tensors
        logprob_grads = grads[0]
        return state_gradients * logprob_grads[:, None].to(state_gradients.dtype), None, None, None


def token_logprobs(
    states: torch.Tensor, head: torch.Tensor, ids: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log-probs of `ids` (N,) and the entropies (N,), in nats, after states (N, D) under a head (V, D).

    The logits are computed in chunks of at most `MAX_LOGITS`, unless the head itself trains: its gradient needs the
    logits of all tokens. Entropies have no gradient.
    """
    if head.requires_grad and torch.is_grad_enabled():
        logprobs = (linear(states, head).float() / temperature).log_softmax(-1)
        detached = logprobs.detach()
        entropy = -(detached.exp() * detached).sum(-1)
        return logprobs.gather(1, ids[:, None]).squeeze(1), entropy

    return _TokenLogprobs.apply(states, head, ids, temperature)  # type: ignore[no-untyped-call, no-any-return]
