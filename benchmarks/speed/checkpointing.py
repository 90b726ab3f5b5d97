"""How much memory and time does policy.checkpointing trade in an update? Random weights, no network.

    python benchmarks/speed/checkpointing.py

makes models of real shapes, and updates a LoRA on responses of 64 tokens to prompts of 256, with and without
checkpointing. It prints the peak bytes of the tensors that an update makes, weights and optimizer aside, and the
processor seconds of the fastest of 3 updates on one thread, which depend little on the load of the machine.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from detoxrl.commands.forecast import Meter
from detoxrl.config.schema import PolicyConfig
from detoxrl.models.loading import save_base
from detoxrl.models.lora import load_policy
from detoxrl.models.policy import Policy
from detoxrl.models.types import Encoded

sys.path.insert(0, str(Path(__file__).parent))
from recipe_memory import tokenizer

PROMPT = 256
RESPONSE = 64
ROWS = 4
VOCABULARY = 32_128


def _t5() -> PreTrainedModel:
    config = T5Config(
        vocab_size=VOCABULARY, d_kv=64, d_model=768, d_ff=2048, num_layers=12, num_heads=12, eos_token_id=1,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, eos_token_id=1, bos_token_id=1))


def _llama() -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=2048, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config)


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "FLAN-T5 base": _t5,
    "GPT-2": _gpt2,
    "SmolLM 135M (a Llama)": _llama,
}


def encoded_prompts(policy: Policy) -> Encoded:
    """Return prompts of `PROMPT` tokens as an update reads them."""
    ids = torch.randint(3, VOCABULARY, (ROWS, PROMPT))
    mask = torch.ones_like(ids)
    if not policy.has_encoder:
        return Encoded(states=ids, mask=mask)
    with torch.no_grad():
        states = policy._network("default").read(ids, mask)
        return policy.with_shared_cross(Encoded(states=states, mask=mask))


def update(policy: Policy, encoded: Encoded) -> None:
    """Compute the gradients of a microbatch."""
    ids = torch.randint(3, VOCABULARY, (ROWS, RESPONSE))
    policy.logprobs(encoded, ids, 1.0).logprobs.mean().backward()
    for weight in policy.parameters():
        weight.grad = None


def main() -> None:
    """Print a table of peak memory and time."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print(f"{ROWS} responses of {RESPONSE} tokens to prompts of {PROMPT}")
    print("| model | peak without | peak with | time without | time with |\n|---|---|---|---|---|")
    for name, make in MODELS.items():
        with tempfile.TemporaryDirectory() as folder:
            words = tokenizer()
            model = make()
            if not model.config.is_encoder_decoder:
                words.backend_tokenizer.post_processor = None
            save_base(model, words, Path(folder))
            policy = load_policy(folder, None, PolicyConfig(base=folder), seed=0)

        peaks = []
        seconds = []
        encoded = encoded_prompts(policy)
        for checkpointing in (False, True):
            policy.checkpointing = checkpointing
            with Meter() as meter:
                update(policy, encoded)
            peaks.append(f"{meter.peak / 2**20:,.0f} MiB")

            times = []
            for _ in range(3):
                start = time.process_time()
                update(policy, encoded)
                times.append(time.process_time() - start)
            seconds.append(f"{min(times):.2f} s")
        print("|", " | ".join([name, *peaks, *seconds]), "|", flush=True)


if __name__ == "__main__":
    main()
