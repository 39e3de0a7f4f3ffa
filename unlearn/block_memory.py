"""What one block keeps for its backward pass, and what exists while it is differentiated, counted without data.

`memory` knows both for GPT-NeoX. Blocks of other architectures keep more: gated or wider inner layers, norms of queries
and keys, attention that is not fused. So one of theirs is run, forward and backward, at the run's own sizes.
"""

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from unlearn import lora
from unlearn.config import TrainConfig
from unlearn.live_bytes import LiveBytes, as_the_kernel_does, counting
from unlearn.lora import add_lora, set_dropout_rows
from unlearn.model import blocks, disable_dropout, meta_parameters, residual_streams
from unlearn.precision import DTYPES
from unlearn.sharding import checkpoint_blocks
from unlearn.weights import materialise

CPU = torch.device("cpu")
BELOW, COUNTED = 1, 2  # blocks below the measured one, whose stream has to come from one that trains; and with it
Kind = Literal["full", "selective", "none"]
KINDS: tuple[Kind, ...] = ("full", "selective", "none")


def measured_blocks(config: TrainConfig, model: PretrainedConfig) -> dict[str, tuple[float, float]]:
    """For each kind of --checkpoint-activations: (what a block keeps, what exists at most above all that is kept while
    a block is differentiated), in numbers for each token and hidden unit of a micro-batch.

    Args:
        model: its configuration, of whose blocks the second is taken.
    """
    length = min(config.seq_len, config.micro_tokens or config.seq_len)
    rows = max(1, config.micro_tokens // length) if config.micro_tokens else config.micro_batch or 1
    unit = rows * length * int(model.hidden_size) * DTYPES[config.dtype].itemsize
    plain = lora.dropped
    lora.dropped = as_the_kernel_does
    try:
        found = {kind: _block_bytes(config, model, kind, rows, length) for kind in KINDS}
    finally:
        lora.dropped = plain
    return {kind: (kept / unit, beside / unit) for kind, (kept, beside) in found.items()}


def _block_bytes(config: TrainConfig, model: PretrainedConfig, kind: Kind, rows: int, length: int) -> tuple[int, int]:
    with FakeTensorMode(allow_non_fake_inputs=True), counting() as counter:
        small = _small(config, model, kind)
        return _measure(small, torch.zeros(rows, length, dtype=torch.long), counter)


def _small(config: TrainConfig, model: PretrainedConfig, kind: Kind) -> PreTrainedModel:
    """The model with two blocks, in the dtype that it computes in; all that might train does."""
    cut = copy.deepcopy(model)
    cut.num_hidden_layers = COUNTED
    if getattr(cut, "layer_types", None):
        cut.layer_types = list(cut.layer_types[:COUNTED])
    with meta_parameters():
        small: PreTrainedModel = AutoModelForCausalLM.from_config(cut, dtype=DTYPES[config.dtype])
    disable_dropout(small)
    if config.lora_rank > 0:
        assert config.lora_alpha is not None and config.lora_dropout is not None
        chosen = {"targets": config.lora_targets, "layers": (), "seed": 0}
        add_lora(small, config.lora_rank, config.lora_alpha, config.lora_dropout, **chosen)  # type: ignore[arg-type]
    if kind != "none":
        checkpoint_blocks(small, kind, config.lora_rank)
    materialise(small, CPU)
    return small.train()


def _measure(small: PreTrainedModel, ids: Tensor, counter: LiveBytes) -> tuple[int, int]:
    """(bytes that the second block keeps; bytes that its backward pass adds at most)."""
    block, live = blocks(small)[BELOW], list[int]()
    block.register_forward_pre_hook(lambda *_: live.append(counter.live))
    block.register_forward_hook(lambda *_: live.append(counter.live))
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(_forget)
    set_dropout_rows(small, ids[:, 0])
    streams = residual_streams(small, ids, (BELOW, COUNTED))
    counter.peak = start = counter.live
    torch.autograd.backward(streams[COUNTED], torch.empty_like(streams[COUNTED]), inputs=[streams[BELOW], *trained])
    before, after = live[:2]
    return after - before, counter.peak - start


def _forget(parameter: nn.Parameter) -> None:
    """Gradients are planned apart."""
    parameter.grad = None
