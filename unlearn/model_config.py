"""What a model's folder says about it: configuration and tokenizer, read by transformers, and checked."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from unlearn.distributed import is_main
from unlearn.errors import UserError
from unlearn.files import hub_error, local_folder

DEEPEST = 1000  # blocks: nobody's model is near it, and building one takes for ever

Tokens = Sequence[int] | np.ndarray

# What transformers raises for numbers and names in config.json of which it cannot make a model.
UNBUILDABLE = (KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, StrictDataclassError)


@dataclass(frozen=True)
class Layout:
    """Attribute names of one architecture: `model.<base>.<blocks>` and so on."""

    base: str
    blocks: str
    norm: str
    embedding: str


_LLAMA = Layout("model", "layers", "norm", "embed_tokens")

LAYOUTS = {
    "gpt_neox": Layout("gpt_neox", "layers", "final_layer_norm", "embed_in"),
    "gpt2": Layout("transformer", "h", "ln_f", "wte"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "olmo": _LLAMA,
    "olmo2": _LLAMA,
    "olmo3": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
}

LEARNED_POSITIONS = ("gpt2",)  # the others compute theirs, of any number


def layout(config: PretrainedConfig) -> Layout:
    """The attribute names of the architecture that `config` describes; `UserError` if it is not in the table."""
    if config.model_type not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise UserError(f"expected a model of type {known}; found {config.model_type!r}: choose another --model")
    return LAYOUTS[config.model_type]


def load_config(path: str, *, revision: str | None = None) -> PretrainedConfig:
    """Read a model's configuration from a local folder or the hub.

    Raises:
        UserError: the folder or hub entry is missing, or its architecture is not supported.
    """
    source = local_folder(path, "model", "config.json")
    if revision is not None and Path(source).is_dir():
        raise UserError(f"--revision has no effect with the local folder {path}: leave it out")
    try:
        config = AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise hub_error(path, "model", error) from error
    except UNBUILDABLE as error:
        raise unbuildable(path, error) from error
    layout(config)
    if int(config.num_hidden_layers) > DEEPEST:
        raise UserError(
            f"expected a model of at most {DEEPEST:,} blocks; found {config.num_hidden_layers:,} in the config.json of "
            f"{path}: mend it"
        )
    _check_plain(config, path)
    return config


def _check_plain(config: PretrainedConfig, path: str) -> None:
    """Raise unless the weights are plain numbers in the files of the usual names."""
    for key in ("quantization_config", "compression_config"):
        if getattr(config, key, None) is not None:
            found = getattr(config, key)
            kind = found.get("quant_method", "of an unnamed kind") if isinstance(found, dict) else type(found).__name__
            raise UserError(
                f"expected a model in plain numbers in {path}; found a {key} ({kind}) in its config.json: give the "
                "model before quantisation; if its weights are plain, remove that entry"
            )
    if getattr(config, "transformers_weights", None) is not None:
        raise UserError(
            f"expected the weights of {path} in model.safetensors or as its index says; found the name of another file "
            f"({config.transformers_weights}) in config.json: rename the file and remove that entry"
        )


def unbuildable(path: str, error: Exception) -> UserError:
    """One sentence for a configuration with which transformers fails."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UserError(
        f"expected a config.json of which transformers can make a model in {path}; found {reason[:200]!r}: correct it "
        "or fetch the model again"
    )


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer from a local folder or the hub.

    Raises:
        UserError: there is none, it is damaged, or has words that the model has no row for.
    """
    config = load_config(path, revision=revision)
    source = local_folder(path, "model", "config.json")
    remedy = "fetch the tokenizer's files again"
    try:
        with plain_exceptions(f"expected a readable tokenizer in {path}", remedy):
            tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"expected a readable tokenizer in {path}; found {reason!r}: {remedy}") from error
    except UserError:
        raise
    except (OSError, ValueError) as error:
        if Path(source).is_dir() and not any(Path(source).glob("tokenizer*")):
            raise _no_tokenizer(path) from error
        raise hub_error(path, "tokenizer", error) from error
    _check_vocabulary(tokenizer, config, path)
    return tokenizer


def _check_vocabulary(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, path: str) -> None:
    """Raise unless there are tokens for text, and a row of the embedding for each.

    Added and special tokens may be without one: sound models have some that no text comes to. `check_rows` looks at
    what is encoded.
    """
    vocabulary = tokenizer.get_vocab()
    ordinary = vocabulary.keys() - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens)
    if not ordinary:
        raise _no_tokenizer(path)  # transformers makes an empty one where it finds no files
    largest = max(ordinary, key=lambda token: vocabulary[token])
    if vocabulary[largest] >= config.vocab_size:
        raise UserError(
            f"expected a tokenizer of at most {config.vocab_size} tokens in {path}, the rows of the model's embedding; "
            f"found the token {largest!r} of number {vocabulary[largest]}: use the model's own tokenizer, or give the "
            "embedding more rows with `resize_token_embeddings`"
        )


def _no_tokenizer(path: str) -> UserError:
    return UserError(
        f"expected tokenizer files (tokenizer.json) in {path}; found none with tokens for text: copy those of the "
        "model that it was made from"
    )


@contextmanager
def plain_exceptions(expected: str, remedy: str) -> Iterator[None]:
    """Turn the bare `Exception` with which the tokenizers library reports damage and full disks into a `UserError`."""
    try:
        yield
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise UserError(f"{expected}; found {str(error)!r}: {remedy}") from error


def check_rows(config: PretrainedConfig, largest: Mapping[str, int]) -> None:
    """Raise if a token that is to be read has no row in a model's embedding: on a GPU that is an assertion's failure.

    Args:
        largest: the largest token of each corpus, or other texts, by their name.
    """
    for name, token in largest.items():
        if token >= config.vocab_size:
            raise UserError(
                f"expected tokens below {config.vocab_size}, the rows of the embedding of "
                f"{getattr(config, '_name_or_path', '') or 'the model'}; found the token {token} in {name}: take it "
                "out of the text, use the model's own tokenizer, or give the embedding more rows with "
                "`resize_token_embeddings`"
            )


def largest_tokens(windows: Mapping[str, Iterable[Tokens]]) -> dict[str, int]:
    """The largest token in the windows of each corpus, for `check_rows`; 0 where there is none."""
    return {
        name: max((int(np.max(window)) for window in of_one if len(window)), default=0)
        for name, of_one in windows.items()
    }


def check_windows(config: PretrainedConfig, windows: Mapping[str, Iterable[Tokens]]) -> None:
    """Raise if a window has a token that a model has no row for, or is longer than the positions that it has learned.

    A model with rotary positions can read on; where it was not made to, that is said.

    Args:
        windows: of each corpus, by the corpus's name.
    """
    check_rows(config, largest_tokens(windows))
    most = getattr(config, "max_position_embeddings", None)
    lengths = {name: max(map(len, of_one), default=0) for name, of_one in windows.items()}
    name = max(lengths, key=lambda name: lengths[name])
    if most is None or lengths[name] <= most:
        return
    if config.model_type in LEARNED_POSITIONS:
        raise UserError(
            f"expected windows of at most {most} tokens, the positions that the model has learned; found one of "
            f"{lengths[name]} in {name}: give --seq-len {most}"
        )
    if is_main():
        print(
            f"warning: the model was made for texts of {most} tokens, and {name} has windows of {lengths[name]}: give "
            f"--seq-len {most} unless longer ones are meant",
            flush=True,
        )
