"""How is the embedded reward model trained?"""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from tokenizers import processors
from transformers import RobertaConfig, RobertaForSequenceClassification

from detoxrl.models.loading import scratch_tokenizer
from detoxrl.runtime.checkpoint import Checkpoints, trainable
from detoxrl.runtime.randomness import batch_indices, torch_seed

LABELS = ("nothate", "hate")


def train_reward_model(
    utterances: Sequence[tuple[str, bool]], folder: Path, place: Path, *, steps: int, batch_size: int, lr: float,
    seed: int, on_step: Callable[[int, float], None],
) -> None:  # fmt: skip
    """Train a small RoBERTa on (text, hateful) `utterances` and save it to `folder`; checkpoints go to `place`.

    Its labels are those of facebook/roberta-hate-speech-dynabench-r4-target: 0 = nothate, 1 = hate.
    """
    texts = [text for text, _ in utterances]
    tokenizer = scratch_tokenizer(texts, vocab_size=1000)
    # "</s>" opens a text too: RoBERTa's head reads the first position.
    template = processors.TemplateProcessing(single="</s> $A </s>", special_tokens=[("</s>", 1)])
    tokenizer.backend_tokenizer.post_processor = template
    model, ids = _model(len(tokenizer), seed), tokenizer(texts).input_ids
    labels = torch.tensor([int(hateful) for _, hateful in utterances])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    checkpoints = Checkpoints(place, trainable(model), optimizer)
    model.train()
    with torch.random.fork_rng(devices=[]), checkpoints.stoppable():
        for step in range((checkpoints.restore() or {"step": 0})["step"], steps):
            checkpoints.point(step, {})
            torch.manual_seed(torch_seed(seed, f"reward dropout {step}"))
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / steps)
            rows = batch_indices(seed, "reward", step, batch_size, len(utterances))
            batch = tokenizer.pad({"input_ids": [ids[row] for row in rows]}, return_tensors="pt")
            loss = model(**batch, labels=labels[rows]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            on_step(step + 1, loss.item())
        checkpoints.point(steps, {})  # a stop in the last step finds its end kept too
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _model(vocab_size: int, seed: int) -> RobertaForSequenceClassification:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    sizes |= {"vocab_size": vocab_size, "max_position_embeddings": 514, "type_vocab_size": 1}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: index for index, label in enumerate(LABELS)}}
    config = RobertaConfig(**sizes, **names, pad_token_id=0, bos_token_id=1, eos_token_id=1)  # type: ignore
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "reward model"))
        return RobertaForSequenceClassification(config)
