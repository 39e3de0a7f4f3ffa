"""A model read at an inner layer: the tuned lens takes the place of the blocks above.

What the stream that enters block l says through a lens that was fitted to this very model is known there, whatever the
blocks above make of it (Patil et al. 2024, https://arxiv.org/abs/2309.17410, by the logit lens).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from unlearn.lens import TunedLens
from unlearn.model import blocks


@contextmanager
def read_early(model: PreTrainedModel, lens: TunedLens, layer: int) -> Iterator[None]:
    """The model with z[l] = U norm_f(h[l] + A[l] h[l] + b[l]) for logits, for the length of the block.

    Block l gives what the lens makes of its input, and those above pass it on; they compute for nothing.

    Args:
        layer: one that the lens has.
    """
    translator, dtype = lens.translators[str(layer)], next(lens.translators.parameters()).dtype

    def translated(stream: Tensor) -> Tensor:
        read = stream.to(dtype)
        return (read + translator(read)).to(stream.dtype)

    def leaving(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        stream = args[0] if args else kwargs["hidden_states"]
        passed = translated(stream) if module is stack[layer] else stream
        return (passed, *output[1:]) if isinstance(output, tuple) else passed

    stack = blocks(model)
    handles = [block.register_forward_hook(leaving, with_kwargs=True) for block in stack[layer:]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
