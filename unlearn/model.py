"""Where a causal language model keeps its parts, and how its residual stream is read.

Shapes: B sequences, S tokens, D hidden size, V vocabulary, L blocks. `h[l]`, l = 0..L-1, is the residual stream that
enters block l; `h[L]` is the one that leaves the last block, before the final norm.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from unlearn.distributed import is_main
from unlearn.errors import UserError
from unlearn.files import hub_error, local_folder


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


def layout(config: PretrainedConfig) -> Layout:
    """The attribute names of the architecture that `config` describes; `UserError` if it is not in the table."""
    if config.model_type not in LAYOUTS:
        known = ", ".join(sorted(LAYOUTS))
        raise UserError(f"expected a model of type {known}; found {config.model_type!r}: choose another --model")
    return LAYOUTS[config.model_type]


def _base(model: PreTrainedModel) -> nn.Module:
    return getattr(model, layout(model.config).base)


def blocks(model: PreTrainedModel) -> nn.ModuleList:
    """The L transformer blocks, in order."""
    return getattr(_base(model), layout(model.config).blocks)


def blocks_prefix(model: PreTrainedModel) -> str:
    """What the names of all parameters inside the blocks start with, e.g. `gpt_neox.layers.`."""
    names = layout(model.config)
    return f"{names.base}.{names.blocks}."


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm between the last block and the unembedding."""
    return getattr(_base(model), layout(model.config).norm)


def unembedding(model: PreTrainedModel) -> nn.Parameter:
    """The unembedding matrix U [V, D] (the input embedding where the model ties them)."""
    return model.get_output_embeddings().weight


def softcap(model: PreTrainedModel) -> float | None:
    """The bound c of logits that are soft-capped as c tanh(z / c) (Gemma 2), None elsewhere."""
    return getattr(model.config, "final_logit_softcapping", None)


class _DeepestReached(Exception):
    """Ends a forward pass at the deepest residual stream that was asked for."""


def residual_streams(model: PreTrainedModel, input_ids: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """The residual streams h[l] of one forward pass, which goes no deeper than the deepest of `layers`.

    The hooks sit on whole blocks only, outside activation checkpointing, so a recomputation does not call them again.

    Args:
        input_ids: int64 [B, S], padded on the right. Attention is causal, so the real tokens need no mask.
        layers: which l to return, each in 0..L.

    Returns:
        {l: h[l] [B, S, D]} in the dtype of the model's residual stream, with gradients if they are enabled.
    """
    wanted = sorted(set(layers))
    stack, captured = blocks(model), dict[int, Tensor]()

    def before(layer: int) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            captured[layer] = args[0] if args else kwargs["hidden_states"]
            if layer == wanted[-1]:
                raise _DeepestReached

        return hook

    def after_last(_module: nn.Module, _args: Any, output: Any) -> None:
        captured[len(stack)] = output[0] if isinstance(output, tuple) else output
        raise _DeepestReached

    handles = [
        stack[-1].register_forward_hook(after_last)
        if layer == len(stack)
        else stack[layer].register_forward_pre_hook(before(layer), with_kwargs=True)
        for layer in wanted
    ]
    try:
        model(input_ids=input_ids, use_cache=False)
    except _DeepestReached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return captured


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
    layout(config)
    return config


def load_tokenizer(path: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Read a model's tokenizer from a local folder or the hub; `UserError` if there is none."""
    source = local_folder(path, "model", "config.json")
    try:
        return AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise hub_error(path, "tokenizer", error) from error


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Read a causal language model, whole, onto one device, in eval mode.

    Args:
        path: a local folder in Hugging Face's layout, or a hub name.
        dtype: dtype of the weights in memory.

    Raises:
        UserError: the model is missing, unsupported, truncated, lacks tensors, or has NaN or infinite weights.
    """
    config = load_config(path, revision=revision)
    try:
        with _bars(shown=is_main()):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                local_folder(path, "model", "config.json"),
                revision=revision,
                config=config,
                dtype=dtype,
                trust_remote_code=False,
                output_loading_info=True,
            )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise hub_error(path, "model", error) from error
    model, report = loaded
    _check_complete(path, report)
    check_finite(model, path)
    return model.to(device).eval()


@contextmanager
def _bars(*, shown: bool) -> Iterator[None]:
    """Show or hide `transformers`' progress bars for the length of the block."""
    before = logging.is_progress_bar_enabled()
    logging.enable_progress_bar() if shown else logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar() if before else logging.disable_progress_bar()


def _check_complete(path: str, report: dict[str, Any]) -> None:
    """`from_pretrained` only reports missing tensors, and then makes them up at random."""
    for kind in ("missing_keys", "mismatched_keys"):
        if report.get(kind):
            names = sorted(str(key) for key in report[kind])
            raise UserError(
                f"expected every tensor of the model in {path}; found {len(names)} {kind.replace('_keys', '')} "
                f"({', '.join(names[:3])}): the files are incomplete or not of this model, fetch them again"
            )


def check_finite(model: nn.Module, path: str) -> None:
    """Raise `UserError` naming the first parameter of `model` that holds a NaN or an infinity."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise UserError(
                f"expected finite weights in {path}; found NaN or infinity in {name}: use another checkpoint"
            )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout of the model's own to 0: unlearning compares it with its original, token by token."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Round all parameters to `dtype` in place; buffers (rotary frequencies) keep their precision."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer so that plain `transformers` loads them.

    The dtype on disk is the one in memory. `folder` must be new; wrap the call in `files.atomic_folder`.
    """
    model.config.dtype = next(model.parameters()).dtype
    with _bars(shown=False):
        model.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
