"""Where a causal language model keeps its parts, and how its residual stream is read.

Shapes: B sequences, S tokens, D hidden size, V vocabulary, L blocks. `h[l]`, l = 0..L-1, is the residual stream that
enters block l; `h[L]` is the one that leaves the last block, before the final norm.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from unlearn.distributed import fail_together, is_main
from unlearn.errors import UserError
from unlearn.files import hub_error, local_folder, writing
from unlearn.seeding import derive
from unlearn.weights import Checkpoint, export_weights, fill, meta_parameters


@dataclass(frozen=True)
class Layout:
    """Attribute names of one architecture: `model.<base>.<blocks>` and so on."""

    base: str
    blocks: str
    norm: str
    embedding: str


DEEPEST = 1000  # blocks: nobody's model is near it, and building one takes for ever

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


Read = TypeVar("Read")


def through_head(model: PreTrainedModel, hidden: Tensor, read: Callable[[Tensor, Tensor], Read]) -> Read:
    """`read(hidden, U)`, called inside the unembedding's forward, where the U [V, D] of a sharded model is whole.

    Args:
        hidden: [N, D], normalised.
        read: what to compute of both in place of the logits; must return tensors, alone or in a tuple.
    """
    head = model.get_output_embeddings()
    head.forward = lambda inputs: read(inputs, head.weight)
    try:
        return head(hidden)
    finally:
        del head.forward


class _DeepestReached(Exception):
    """Ends a forward pass at the deepest residual stream that was asked for."""


def residual_streams(model: PreTrainedModel, input_ids: Tensor, layers: Iterable[int]) -> dict[int, Tensor]:
    """The residual streams h[l] of one forward pass, which goes no deeper than the deepest of `layers`.

    The hooks sit on whole blocks only, outside activation checkpointing, so a recomputation does not call them again.
    h[l] is taken where block l - 1 leaves it: there the blocks above, which may be sharded, have not been gathered.

    Args:
        input_ids: int64 [B, S], padded on the right. Attention is causal, so the real tokens need no mask.
        layers: which l to return, each in 0..L.

    Returns:
        {l: h[l] [B, S, D]} in the dtype of the model's residual stream, with gradients if they are enabled.
    """
    wanted = sorted(set(layers))
    stack, captured = blocks(model), dict[int, Tensor]()

    def keep(layer: int, stream: Tensor) -> None:
        captured[layer] = stream
        if layer == wanted[-1]:
            raise _DeepestReached

    def entering(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(0, args[0] if args else kwargs["hidden_states"])

    def leaving(layer: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            stream, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
            keep(layer, stream)
            # What the blocks above contribute to its gradient is then added up before the loss's own part joins it:
            # one order of summation, whether or not FSDP2 puts a node of its own between two blocks.
            above = stream.view_as(stream)
            return above if rest is None else (above, *rest)

        return hook

    handles = [
        stack[layer - 1].register_forward_hook(leaving(layer))
        if layer > 0
        else stack[0].register_forward_pre_hook(entering, with_kwargs=True)
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
    if int(config.num_hidden_layers) > DEEPEST:
        raise UserError(
            f"expected a model of at most {DEEPEST:,} blocks; found {config.num_hidden_layers:,} in the config.json of "
            f"{path}: mend it"
        )
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
    model = empty_model(path, revision=revision, dtype=dtype)
    fill(model, Checkpoint.open(path, revision=revision), torch.device(device))
    return model


def empty_model(path: str, *, revision: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same model in eval mode, before its parameters have any memory (meta device); see `weights.fill`."""
    config = load_config(path, revision=revision)
    with meta_parameters():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()
    try:
        model.generation_config = GenerationConfig.from_pretrained(local_folder(path, "model", "config.json"))
    except (OSError, ValueError):  # without the file, generation follows the model's own configuration
        pass
    return model.eval()


def fresh_weights(path: str, seed: int, *, revision: str | None = None) -> Callable[[str], Tensor]:
    """The initial value of every parameter of an untrained model of this configuration, by name: float32, on the CPU.

    Drawn as `transformers` initialises each layer (for GPT-2 without its smaller residual projections), from the seed
    and the layer's name: the same however the model is sharded, and never the whole model at once.
    """
    twin = empty_model(path, revision=revision)

    def value(name: str) -> Tensor:
        owner, _, own = name.rpartition(".")
        layer = copy.copy(twin.get_submodule(owner))
        layer._parameters = {
            key: None if parameter is None else nn.Parameter(torch.empty(parameter.shape))
            for key, parameter in layer._parameters.items()
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "fresh weights", owner))
            twin._init_weights(layer)
        return layer.get_parameter(own).detach()

    return value


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


def save_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: torch.dtype | None = None
) -> None:
    """Write weights, config, generation config and tokenizer so that plain `transformers` loads them.

    Every rank must call this; ranks share the writing, and a sharded model is never gathered whole.

    Args:
        folder: new or empty; for a folder that is there whole or not at all, see `weights.shared_folder`.
        dtype: on disk; by default the one in memory.
    """
    dtype = dtype or next(model.parameters()).dtype
    with fail_together():
        if is_main():
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)
                model.config.dtype = dtype
                model.config.architectures = [type(model).__name__.removeprefix("FSDP")]
                model.config.save_pretrained(folder)
                model.generation_config.save_pretrained(folder)
                tokenizer.save_pretrained(folder)
    export_weights(model, folder, dtype)
