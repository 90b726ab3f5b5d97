"""Where do base model and tokenizer come from?"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from safetensors import SafetensorError
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.activations import NewGELUActivation

from detoxrl.config.schema import Config
from detoxrl.errors import InputError, StorageError, first_line, require
from detoxrl.runtime.hub import fetch
from detoxrl.runtime.randomness import torch_seed

_GENERATOR = "give the folder or hub id of a text generator"
_TRAINED_WITH = "give the tokenizer that the model was trained with"


def load_tokenizer(base: str, field: str = "policy.base") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id. Raises InputError, naming `field`, when there is none."""
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, fetch(base, field, weights=False), base, field)
    if tokenizer.pad_token_id is None:  # as most causal models have it; masks go by length, never by id
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    base: str, field: str = "policy.base", bf16: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return an encoder-decoder or causal model in eval mode and its tokenizer, from a folder or the hub.

    Safetensors only; its weights come in fp32, or with `bf16` in bfloat16. Raises InputError, naming `field`, when
    there is no such model, when it generates no text, or when the tokenizer does not fit.
    """
    folder = fetch(base, field)
    config = load_pretrained(AutoConfig, folder, base, field)
    tokenizer = load_tokenizer(base, field)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    dtype = torch.bfloat16 if bf16 else torch.float32
    model, info = load_pretrained(
        kind, folder, base, field, use_safetensors=True, dtype=dtype, output_loading_info=True
    )
    saved_as = config.architectures or [type(model).__name__]
    # transformers also makes a BERT generate, though it was trained to look at both sides.
    generates = config.is_encoder_decoder or type(model).__name__ in saved_as
    rule = f"is a {saved_as[0]}, which does not generate text"
    require(generates, field, base, rule, "give a T5, BART, GPT-2 or Llama, for example")
    missing = sorted(info["missing_keys"])
    rule = f"lacks weights of a generator, {missing[0]} for one" if missing else ""
    require(not missing, field, base, rule, "give a model saved with its language-model head")
    _require_fit(base, field, model, tokenizer)
    # Its settings for sampling are not used here, and what does not hold together could not be saved.
    model.generation_config = GenerationConfig.from_model_config(model.config)
    return _ready(model), tokenizer


def load_shapes(base: str, bf16: bool) -> PreTrainedModel:
    """Return the model of a folder or hub id on the meta device: its shapes, with no weight read. Raises InputError."""
    config = load_pretrained(AutoConfig, fetch(base, "policy.base", weights=False), base, "policy.base")
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        return _ready(kind.from_config(config, dtype=torch.bfloat16 if bf16 else torch.float32))  # type: ignore[no-untyped-call]


def load_pretrained(kind: Any, folder: str, source: str, field: str, remedy: str = _GENERATOR, **settings: Any) -> Any:
    """Return what one of transformers' auto classes makes of a folder. Raises InputError and, if torn, StorageError."""
    try:
        return kind.from_pretrained(folder, **settings)
    except SafetensorError as error:
        raise StorageError(f"the weights of {source} are broken: {first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, TypeError) as error:
        raise InputError(field, source, f"cannot be loaded: {first_line(error)}", remedy) from error


def _require_fit(base: str, field: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    require_vocabulary(field, base, tokenizer, model)
    ours, theirs = tokenizer.eos_token_id, eos_token_ids(model.config)
    rule = f"has a tokenizer whose eos_token_id is {ours}, but the model says {theirs}"
    require(ours is not None and ours in theirs, field, base, rule, _TRAINED_WITH)
    open_ended = model.config.is_encoder_decoder or tokenizer("Thank you").input_ids[-1] != ours
    rule = "has a tokenizer that ends every prompt with EOS, behind which a causal model says nothing of use"
    require(open_ended, field, base, rule, "save its tokenizer with add_eos_token=False")


def eos_token_ids(config: PreTrainedConfig) -> list[int]:
    """Return the ids that end a response, which may be several."""
    ids = config.get_text_config().eos_token_id
    return list(ids) if isinstance(ids, list) else [ids]


def require_vocabulary(field: str, source: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise InputError when a tokenizer knows more tokens than the model, or no word.

    transformers makes an empty one where its files are missing.
    """
    ids = tokenizer("Thank you, that is very kind of you.").input_ids
    known = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    remedy = "give a folder with its tokenizer files"
    require(known != "", field, source, "has a tokenizer that knows no word of a sentence", remedy)
    rows: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    rule = f"has a tokenizer of {len(tokenizer)} tokens, but embeddings for {rows}"
    require(len(tokenizer) <= rows, field, source, rule, _TRAINED_WITH)


def require_positions(settings: PreTrainedConfig, config: Config, longest_target: int) -> None:
    """Raise InputError when a text may be longer than the positions the model has (T5 has no bound).

    `longest_target` is that of fine-tuning, in tokens. A causal model reads prompt and response in a row, so there the
    sum counts.
    """
    positions = getattr(settings.get_text_config(), "max_position_embeddings", None)  # T5 has none
    prompt, response = config.data.max_prompt_tokens, config.generation.max_new_tokens
    lengths = {"generation.max_new_tokens": response, "tokens of the longest summary": longest_target}
    if settings.is_encoder_decoder:
        lengths["data.max_prompt_tokens"] = prompt
    else:
        lengths = {f"data.max_prompt_tokens + {name}": prompt + length for name, length in lengths.items()}
    for name, length in lengths.items():
        fits = positions is None or length <= positions
        require(fits, name, length, f"exceeds the {positions} positions of {config.policy.base}", "give a smaller one")


def _ready(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in eval mode, T5's tanh-GELU as torch's fused one: the same function in 1 pass instead of 6."""
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            model.set_submodule(name, torch.nn.GELU(approximate="tanh"))
    return with_fast_attention(model.eval())


def with_fast_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with the attention that is fastest: a CPU's fused one takes bfloat16 as slowly as float32."""
    if model.dtype == torch.bfloat16 and PartialState().device.type == "cpu":
        model.set_attn_implementation("eager")
    return model


def scratch_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer trained on `texts`; white space is folded to one space, as T5's is."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    # Words are kept whole up to punctuation, so that DialogSum's "#Person1#" can become one token.
    punctuation = pre_tokenizers.Split(Regex(r"[.,:;?!]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), punctuation])
    tokenizer.decoder = decoders.Metaspace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[*special.values()], show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def scratch_base(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Return a randomly initialised T5 of about 1 M parameters for the tokenizer."""
    sizes = {"d_model": 128, "d_kv": 32, "d_ff": 256, "num_layers": 2, "num_heads": 4}
    kind = {"relative_attention_max_distance": 64, "feed_forward_proj": "gated-gelu", "dropout_rate": 0.0}
    config = T5Config(vocab_size=len(tokenizer), **sizes, **kind, decoder_start_token_id=0)  # type: ignore
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "scratch base"))
        return _ready(T5ForConditionalGeneration(config))


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer so that `load_base(str(folder))` reads them."""
    # transformers 5 keeps an untied FLAN-T5 apart but writes that it is tied, and transformers 4 believes that.
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.config.tie_word_embeddings = tied
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
