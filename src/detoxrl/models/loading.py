"""Where do the base model and its tokenizer come from?"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import PartialState
from huggingface_hub.errors import StrictDataclassError
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
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.pegasus.modeling_pegasus import PegasusSinusoidalPositionalEmbedding

from detoxrl.config.schema import Config
from detoxrl.errors import InputError, StorageError, first_line, one_line, require
from detoxrl.models.ends import as_ids, end_token_ids, require_common_end
from detoxrl.models.files import generation_settings
from detoxrl.models.support import require_generator
from detoxrl.runtime.hub import fetch
from detoxrl.runtime.randomness import torch_seed

# What transformers raises when settings, weights and a class of it do not fit.
_LOADING_ERRORS = (
    OSError, ValueError, RuntimeError, TypeError, AttributeError, KeyError, IndexError, ArithmeticError, AssertionError,
    RecursionError, MemoryError, StrictDataclassError,
)  # fmt: skip
_GENERATOR = "give the folder or hub id of a text generator"
# Positions that are a fixed table. It is held as a weight, gets no gradient, and is not saved.
_FIXED_POSITIONS = (MarianSinusoidalPositionalEmbedding, PegasusSinusoidalPositionalEmbedding)
_TRAINED_WITH = "give the tokenizer that the model was trained with"


def _quiet_libraries() -> None:
    """Turn off the progress bars and notices of transformers, which would break up the console.

    These settings are global to the process. Its errors are exceptions and still come through.
    """
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # peft reads this property of transformers models under its older name.
    warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
    # transformers tells whoever fine-tunes an EncoderDecoderModel how its loss differed years ago.
    warnings.filterwarnings("ignore", "Version v4.12.0 introduces a better way to train", FutureWarning)


_quiet_libraries()


def load_tokenizer(base: str, field: str = "policy.base") -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder or hub id. Raises InputError, naming `field`, when there is none."""
    folder = fetch(base, field, weights=False)
    tokenizer: PreTrainedTokenizerBase = load_pretrained(AutoTokenizer, folder, base, field)

    if tokenizer.pad_token_id is None:
        # Most causal models have no pad token. EOS can serve, because masks come from lengths and never from ids.
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    base: str, field: str = "policy.base", bf16: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return an encoder-decoder or causal model in eval mode and its tokenizer, from a folder or the hub.

    Weights are read from safetensors only, in float32, or in bfloat16 with `bf16`. Raises InputError, naming `field`,
    when there is no such model, when it does not generate text, or when the tokenizer does not fit.
    """
    folder = fetch(base, field)
    config = load_pretrained(AutoConfig, folder, base, field)
    require_generator(field, base, config)
    generation = _generation_config(config, folder, base, field)
    tokenizer = load_tokenizer(base, field)
    model, info = load_pretrained(
        _generator_class(config),
        folder,
        base,
        field,
        use_safetensors=True,
        dtype=_dtype(bf16),
        output_loading_info=True,
    )

    _require_complete(base, field, info["missing_keys"])
    require_finite(model, field, base)
    _set_generation(model, generation)
    _require_matching_tokenizer(base, field, model, tokenizer)

    generation.eos_token_id = end_token_ids(model, tokenizer)
    return _prepared(model), tokenizer


def load_shapes(base: str, bf16: bool) -> PreTrainedModel:
    """Return the model of a folder or hub id on the meta device: shapes only, no weights. Raises InputError."""
    folder = fetch(base, "policy.base", weights=False)
    config = load_pretrained(AutoConfig, folder, base, "policy.base")
    require_generator("policy.base", base, config)
    with torch.device("meta"), explain_loading(base, "policy.base"):
        model = _generator_class(config).from_config(config, dtype=_dtype(bf16))
    _set_generation(model, _generation_config(config, folder, base, "policy.base"))
    return _prepared(model)


def load_fitting_shapes(base: str, tokenizer: PreTrainedTokenizerBase, bf16: bool) -> PreTrainedModel:
    """Return the base on the meta device, as `load_shapes`, once it is known to generate text with its tokenizer."""
    model = load_shapes(base, bf16)
    _require_matching_tokenizer(base, "policy.base", model, tokenizer)
    return model


def load_pretrained(kind: Any, folder: str, source: str, field: str, remedy: str = _GENERATOR, **settings: Any) -> Any:
    """Return what `kind`, one of transformers' auto classes, loads from a folder with some `settings`.

    Code that comes with a model is never run. Raises as `explain_loading`.
    """
    with explain_loading(source, field, remedy):
        return kind.from_pretrained(folder, trust_remote_code=False, **settings)


@contextmanager
def explain_loading(source: str, field: str, remedy: str = _GENERATOR) -> Iterator[None]:
    """Turn what transformers raises inside the block into errors that name `field` and its value `source`.

    Raises InputError, or StorageError when the weights are corrupted.
    """
    try:
        yield
    except SafetensorError as error:
        raise StorageError(f"the weights of {source} are corrupted: {first_line(error)}") from error
    except ImportError as error:  # Some tokenizers and attentions come from packages of their own.
        reason = one_line(error).partition(". ")[0]
        raise InputError(field, source, f"cannot be loaded: {reason}", "install it with pip") from error
    except _LOADING_ERRORS as error:
        if "trust_remote_code" in str(error):
            rule = "needs code that comes with it, which detoxrl never runs"
            raise InputError(field, source, rule, "give a model of an architecture that transformers has") from error
        raise InputError(field, source, f"cannot be loaded: {one_line(error)}", remedy) from error
    except Exception as error:
        if type(error) is not Exception:  # tokenizers raises the bare class for a tokenizer.json that it cannot read.
            raise
        raise InputError(field, source, f"cannot be loaded: {one_line(error)}", remedy) from error


def _generation_config(config: PreTrainedConfig, folder: str, source: str, field: str) -> GenerationConfig:
    """Return how a model starts and ends a response, by its config and by generation_config.json, if it has one.

    Other sampling settings are left out: they are not used here, and inconsistent ones could not be saved again.
    """
    generation: GenerationConfig = GenerationConfig.from_model_config(config)
    stored = generation_settings(Path(folder), field, source)
    generation.eos_token_id = sorted(as_ids(generation.eos_token_id) | as_ids(stored.get("eos_token_id")))
    generation.forced_bos_token_id = stored.get("forced_bos_token_id")
    generation.decoder_start_token_id = stored.get("decoder_start_token_id", generation.decoder_start_token_id)

    starts = not config.is_encoder_decoder or generation.decoder_start_token_id is not None
    rule = "names no decoder_start_token_id, with which its decoder has to begin"
    require(starts, field, source, rule, "name it in its config.json")
    return generation


def _set_generation(model: PreTrainedModel, generation: GenerationConfig) -> None:
    """Have sampling and fine-tuning begin a response in the same way: one reads this config, the other the model's."""
    model.generation_config = generation
    if model.config.is_encoder_decoder:
        model.config.decoder_start_token_id = generation.decoder_start_token_id


def _generator_class(config: PreTrainedConfig) -> Any:
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM


def _dtype(bf16: bool) -> torch.dtype:
    return torch.bfloat16 if bf16 else torch.float32


def _require_complete(base: str, field: str, missing_keys: set[str]) -> None:
    if missing_keys:
        rule = f"lacks weights of a generator, for example {min(missing_keys)}"
        raise InputError(field, base, rule, "give a model saved with its language-model head")


def _require_matching_tokenizer(
    base: str, field: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    require_vocabulary(field, base, tokenizer, model)

    require_common_end(field, base, model, tokenizer)

    ends = end_token_ids(model, tokenizer)
    open_ended = model.config.is_encoder_decoder or tokenizer("Thank you").input_ids[-1] not in ends
    rule = "has a tokenizer that ends every prompt with EOS, after which a causal model generates nothing useful"
    require(open_ended, field, base, rule, "save its tokenizer with add_eos_token=False")


def require_vocabulary(field: str, source: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Raise InputError when a tokenizer knows no words, or more tokens than the model has embeddings for."""
    # transformers makes an empty tokenizer, without an error, when the tokenizer's files are missing.
    ids = tokenizer("Thank you, that is very kind of you.").input_ids
    decoded = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    rule = "has a tokenizer that knows no word of a test sentence"
    require(decoded != "", field, source, rule, "give a folder with its tokenizer files")

    embeddings: int = model.get_input_embeddings().num_embeddings  # type: ignore[assignment]
    tokens = 1 + max(tokenizer.get_vocab().values())  # Ids may have gaps.
    rule = f"has a tokenizer of {tokens} tokens, but embeddings for {embeddings}"
    require(tokens <= embeddings, field, source, rule, _TRAINED_WITH)


def require_finite(model: torch.nn.Module, field: str, source: str) -> None:
    """Raise InputError when a weight is NaN or infinite: whatever reads it would be too, hours later perhaps."""
    for name, weight in model.named_parameters():
        rule = f"has weights that are not finite, {name} for one"
        require(bool(weight.isfinite().all()), field, source, rule, "restore its files, or give another model")


def name_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give a classifier's config the padding token of its tokenizer, if it names none.

    A causal model finds the last token of a text by it, and reads a single text at a time without it.
    """
    config = model.config.get_text_config()
    if config.to_dict().get("pad_token_id") is None:
        config.pad_token_id = tokenizer.pad_token_id


def require_positions(settings: PreTrainedConfig, config: Config, longest_target: int) -> None:
    """Raise InputError when a text may be longer than the number of positions that the model has.

    `longest_target` is the length in tokens of the longest fine-tuning target. A causal model reads prompt and response
    as one sequence, so there the sum of both counts. `settings` is the model's own config.
    """
    prompt = config.data.max_prompt_tokens
    lengths = {
        "generation.max_new_tokens": config.generation.max_new_tokens,
        "tokens of the longest reference": longest_target,
    }
    limits: dict[str, int | None]
    if settings.is_encoder_decoder:
        limits = dict.fromkeys(lengths, positions_for(settings, "decoder"))
        lengths["data.max_prompt_tokens"] = prompt
        limits["data.max_prompt_tokens"] = positions_for(settings, "encoder")
    else:
        lengths = {f"data.max_prompt_tokens + {name}": prompt + length for name, length in lengths.items()}
        limits = dict.fromkeys(lengths, positions_for(settings, "decoder"))

    for name, length in lengths.items():
        positions = limits[name]
        rule = f"exceeds the {positions} positions of {config.policy.base}"
        require(positions is None or length <= positions, name, length, rule, "give a smaller value")


def positions_for(settings: PreTrainedConfig, part: str) -> int | None:
    """Return how many tokens the encoder or decoder of a model has positions for.

    None stands for any number, as of T5, whose positions are relative.
    """
    text = settings.get_text_config(decoder=part == "decoder")
    for name in (f"max_{part}_position_embeddings", "max_position_embeddings", "max_seq_len"):
        positions = getattr(text, name, None)
        if isinstance(positions, int):
            return positions
    return None


def _prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model in eval mode, with faster modules that compute the same functions.

    T5's tanh-approximated GELU becomes torch's fused one, which passes over memory once instead of 6 times.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, NewGELUActivation):
            model.set_submodule(name, torch.nn.GELU(approximate="tanh"))
        if isinstance(module, _FIXED_POSITIONS):
            module.requires_grad_(False)
    return with_fast_attention(model.eval())


def with_fast_attention(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model with the fastest attention for its device and precision.

    On a CPU, torch's fused attention is no faster in bfloat16 than in float32, so plain products are used there.
    """
    if model.dtype == torch.bfloat16 and PartialState().device.type == "cpu":
        model.set_attn_implementation("eager")
    return model


def scratch_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer trained on `texts`. It folds white space to one space, as T5's does."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    # Words are split at punctuation only, so that DialogSum's "#Person1#" can become one token.
    punctuation = pre_tokenizers.Split(Regex(r"[.,:;?!]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), punctuation])
    tokenizer.decoder = decoders.Metaspace()

    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special.values()), show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def scratch_base(tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Return a randomly initialised T5 of about 1 M parameters for the tokenizer."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=128,
        d_kv=32,
        d_ff=256,
        num_layers=2,
        num_heads=4,
        relative_attention_max_distance=64,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,  # type: ignore[call-arg]
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(torch_seed(seed, "scratch base"))
        return _prepared(T5ForConditionalGeneration(config))


def save_base(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model and tokenizer so that `load_base(str(folder))` reads them."""
    # transformers 5 keeps the untied head of a FLAN-T5 but saves a config that calls it tied, which transformers 4
    # then believes. So the config is set to what the weights are.
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    model.config.tie_word_embeddings = tied
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
