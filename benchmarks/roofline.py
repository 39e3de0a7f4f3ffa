"""What a step of the 6.9 B model takes at the least, by its operations' shapes: nothing is computed, any CPU will do.

    python benchmarks/roofline.py               # 40 seconds a row

One rank of four, one micro-batch of 4 x 2,048 tokens a term. A matrix product takes its operations at 650 TFLOP/s, any
other kernel its bytes at 3.2 TB/s, and each at least 3 us; no communication, no Muon. Dropout counts as the one kernel
that it is on a GPU. The share is of 989 TFLOP/s, without operations that are done again (MFU).
"""

import argparse
import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from step import FULL, LORA, PEAK_TFLOPS, TRUE
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import unlearn.lora
import unlearn.losses
from unlearn.blank import blank_lens, full_windows, needs_of
from unlearn.building import method_parts, method_terms, original_model, precision, trained_model
from unlearn.config import configure
from unlearn.live_bytes import as_the_kernel_does
from unlearn.methods.terms import Loss
from unlearn.sharding import shard_mesh
from unlearn.simulate import CPU, fake_ranks, in_a_process
from unlearn.trainer import gradients
from unlearn.weights import materialise

RANKS, PRODUCTS, BANDWIDTH, LAUNCH = 4, 650e12, 3.2e12, 3e-6
FREE = frozenset(
    "view _unsafe_view t transpose expand slice select split split_with_sizes detach alias permute unsqueeze squeeze "
    "as_strided reshape unbind view_as _reshape_alias empty empty_like empty_strided new_empty new_empty_strided "
    "lift_fresh is_pinned diagonal chunk narrow set_ resize_ unflatten movedim record_stream is_same_size".split()
)
KINDS = ("full", "selective", "none")
MODES = {"LoRA r16": LORA, "full": FULL}
ROWS = {f"{name}, {kind}": MODES[name] | {"checkpoint_activations": kind} for name in MODES for kind in KINDS}


class Kernels(TorchDispatchMode):
    """Counts kernels, their operations, and their least time by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = {"products": 0.0, "others": 0.0}
        self.kernels, self.flops = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        namespace, name = func._schema.name.split("::")
        if namespace != "aten" or name in FREE:
            return output
        moved = sum(
            leaf.numel() * leaf.element_size()
            for leaf in tree_leaves((args, kwargs, output))
            if isinstance(leaf, Tensor)
        )
        done = 0.0
        if func.overloadpacket in flop_registry:
            done = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=output)
        self.kernels += 1
        self.flops += float(done)
        self.seconds["products" if done else "others"] += max(done / PRODUCTS, moved / BANDWIDTH, LAUNCH)
        return output


def _as_a_gpu_multiplies(inputs: Tensor, matrix: Tensor, out: Tensor) -> None:
    """One product; on a CPU it is many, for float32 logits of bfloat16."""
    torch.mm(inputs, matrix.T)


def count(flags: dict[str, Any], folder: str) -> dict[str, float]:
    """Of one micro-batch of each term, in this process."""
    unlearn.lora.dropped, unlearn.losses._multiply = as_the_kernel_does, _as_a_gpu_multiplies
    config = configure(model=folder, layers=(5, 10, 15, 20, 25, 30), retain_start=1.0, **flags)
    with fake_ranks(RANKS) as fake:
        mesh = shard_mesh(config.shard_kind(RANKS), None, CPU)
        model, original = trained_model(config, mesh), original_model(config, mesh, needs_of(config))
        windows = full_windows(config, RANKS, micro_batches=1)
        with fake:
            for one in (model, original):
                if one is not None:
                    materialise(one, CPU)
            parts = method_parts(config, model, original, windows, partial(blank_lens, config, device=CPU), CPU)
            loss = Loss(method_terms(config, parts), precision(config, mesh, CPU), [original] if original else [])
            model.train()
            with Kernels() as found:
                gradients(model, loss, 1, 2)
    return {"kernels": found.kernels, "tflop": found.flops / 1e12, **{k: 1e3 * v for k, v in found.seconds.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names contain one of these")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'':24}{'kernels':>9}{'TFLOP':>8}{'products ms':>13}{'others ms':>11}{'together':>10}{'MFU':>7}")
    least: dict[str, float] = {}  # operations without recomputation, by the row's first words
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(TRUE))
        lines = {}
        for name, flags in ROWS.items():
            if any(part in name for part in arguments.only):
                lines[name] = in_a_process(partial(count, flags, folder))
                key = name.rpartition(",")[0]
                least[key] = min(least.get(key, float("inf")), lines[name]["tflop"])
        for name, found in lines.items():
            together = found["products"] + found["others"]
            share = least[name.rpartition(",")[0]] / together * 1e3 / PEAK_TFLOPS
            print(
                f"{name:24}{found['kernels']:9,.0f}{found['tflop']:8.0f}{found['products']:13,.0f}"
                f"{found['others']:11,.0f}{together:10,.0f}{share:7.1%}"
            )


if __name__ == "__main__":
    main()
