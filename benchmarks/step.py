"""Speed and peak memory of an optimizer step: tokens a second, share of the chip's rate, planned against measured peak.

    python benchmarks/step.py                       # a small shape on this machine's CPU
    python benchmarks/step.py --true-shape          # GPT-NeoX 6.9 B, random weights, on one GPU of 140 GB

Weights, lens and text are random: what is measured is the run's own code on full windows. On a GPU the rate is given
as a share of its dense bf16 peak (H100/H200/GH200: 989 TFLOP/s), without and with what is computed again (MFU, HFU);
`--profile` lists what takes a LoRA step's time there.
"""

import argparse
import gc
import json
import statistics
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.profiler import ProfilerActivity, profile

from unlearn.blank import blank_lens, full_windows, needs_of
from unlearn.building import method_parts, method_terms, original_model, precision, trained_model
from unlearn.config import TrainConfig, configure
from unlearn.distributed import process_group, world_size
from unlearn.lens import TunedLens
from unlearn.memory import GIB, Layout, Shape, flops_per_step, peak_gib
from unlearn.methods.terms import Loss
from unlearn.model import empty_model
from unlearn.optim.build import build_optimizers
from unlearn.sharding import shard_mesh
from unlearn.trainer import check_gradients, clip_gradients, gradients
from unlearn.weights import local_rows, materialise

PEAK_TFLOPS = 989.0
NEOX: dict[str, Any] = {"model_type": "gpt_neox", "rotary_pct": 0.25, "tie_word_embeddings": False}
TRUE = NEOX | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 16384,
    "vocab_size": 50304,
    "max_position_embeddings": 2048,
}
SMALL = NEOX | {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "intermediate_size": 1024,
    "vocab_size": 8192,
    "max_position_embeddings": 256,
}
LORA: dict[str, Any] = {"lora_rank": 16, "micro_batch": 4}
FULL: dict[str, Any] = {"optimizer": "muon", "micro_batch": 4, "shard": "full"}
ROWS: dict[str, dict[str, Any]] = {
    "LoRA r16, AdamW, 1 window": LORA | {"micro_batch": 1, "checkpoint_activations": "full"},
    "LoRA, 4 windows": LORA | {"checkpoint_activations": "full"},
    "LoRA, 4, no dropout": LORA | {"lora_dropout": 0.0, "checkpoint_activations": "full"},
    "LoRA, 4, selective": LORA | {"checkpoint_activations": "selective"},
    "LoRA, 4, none": LORA | {"checkpoint_activations": "none"},
    "LoRA, 4, none, compiled": LORA | {"checkpoint_activations": "none", "compile_blocks": True},
    "full, Muon, 1 window": FULL | {"micro_batch": 1, "checkpoint_activations": "full"},
    "full, Muon, 4 windows": FULL | {"checkpoint_activations": "full"},
    "full, Muon, 4, selective": FULL | {"checkpoint_activations": "selective"},
    "full, Muon, 4, full, compiled": FULL | {"checkpoint_activations": "full", "compile_blocks": True},
    "full, Muon, 4, sel., compiled": FULL | {"checkpoint_activations": "selective", "compile_blocks": True},
    "full, Muon, 1, none": FULL | {"micro_batch": 1, "checkpoint_activations": "none"},
    "full, AdamW, 1 window": {"micro_batch": 1, "shard": "full", "checkpoint_activations": "full"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--true-shape", action="store_true")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="*", default=[""], help="rows whose names contain one of these")
    parser.add_argument("--profile", action="store_true", help="on a GPU, also list what takes a LoRA step's time")
    arguments = parser.parse_args()
    shape = TRUE if arguments.true_shape else SMALL
    print(f"{'':30}{'tokens/s':>10}{'MFU':>7}{'HFU':>7}{'s/step':>8}{'planned':>9}{'measured GiB':>13}")
    with process_group() as device, tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(shape))
        for name, flags in ROWS.items():
            if any(part in name for part in arguments.only):
                config = configured(folder, shape, flags, device)
                print(f"{name:30}{measure(config, device, arguments.steps)}", flush=True)
        if arguments.profile and device.type == "cuda":
            profile_step(configured(folder, shape, LORA, device), device)


def configured(folder: str, shape: dict[str, Any], flags: dict[str, Any], device: torch.device) -> TrainConfig:
    depth = shape["num_hidden_layers"]
    dtype: Literal["bf16", "fp32"] = "bf16" if device.type == "cuda" else "fp32"
    layers = tuple(range(5, depth, 5)) if depth > 6 else (2, 4)
    length = shape["max_position_embeddings"]
    return configure(model=folder, layers=layers, seq_len=length, dtype=dtype, retain_start=1.0, **flags)


def random_lens(config: TrainConfig, device: torch.device, layers: tuple[int, ...]) -> TunedLens:
    """A lens of random numbers."""
    lens = blank_lens(config, layers, device)
    for parameter in lens.parameters():
        parameter.data.normal_(std=0.02)
    return lens


class Run:
    """A run on random weights and full windows."""

    def __init__(self, config: TrainConfig, device: torch.device):
        mesh = shard_mesh(config.shard_kind(world_size()), config.shard_size, device)
        needs = needs_of(config)
        self.model, original = trained_model(config, mesh), original_model(config, mesh, needs)
        for model in (self.model, original):
            if model is not None:
                materialise(model, device)
                for parameter in model.parameters():
                    local_rows(parameter)[0].normal_(std=0.02)
        windows = full_windows(config, world_size(), micro_batches=2)
        self.parts = method_parts(config, self.model, original, windows, partial(random_lens, config, device), device)
        frozen = [] if original is None else [original]
        self.loss = Loss(method_terms(config, self.parts), precision(config, mesh, device), frozen)
        self.optimizers = build_optimizers(
            self.model,
            optimizer=config.optimizer,
            adam_lr=config.adam_lr,
            muon_lr=config.muon_lr,
            momentum=config.momentum,
            floor=config.muon_floor or 0.0,
        )
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.model.train()

    def step(self) -> None:
        """One optimizer step, as the trainer makes it."""
        metrics = gradients(self.model, self.loss, 1, 2)
        clip_gradients(self.parameters, 1.0, check_gradients(self.parameters, metrics, 1))
        for optimizer in self.optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def measure(config: TrainConfig, device: torch.device, steps: int) -> str:
    """One line of the table: a warm-up step, then the median of `steps`."""
    shape = Shape.of(empty_model(config.model), config)
    planned = peak_gib(
        config, shape, Layout(world_size(), world_size() if config.shard == "full" else 1), needs_of(config)
    )
    _clear(device)
    run, times = Run(config, device), []
    for _ in range(steps + 1):
        _wait(device)
        started = time.perf_counter()
        run.step()
        _wait(device)
        times.append(time.perf_counter() - started)
    seconds = statistics.median(times[1:])
    windows = run.parts.batches["forget"].batch
    tokens = 2 * windows * config.seq_len  # forget and retain
    used, done = (counted * windows / config.batch / seconds / world_size() / 1e12 for counted in _flops(config, shape))
    measured = f"{torch.cuda.max_memory_allocated() / GIB:13.2f}" if device.type == "cuda" else f"{'-':>13}"
    shares = "".join(f"{rate / PEAK_TFLOPS:7.1%}" if device.type == "cuda" else f"{'-':>7}" for rate in (used, done))
    return f"{tokens / seconds:10,.0f}{shares}{seconds:8.2f}{planned:9.2f}{measured}"


def _flops(config: TrainConfig, shape: Shape) -> tuple[float, float]:
    """Of a step: without what is computed again (MFU), and with it (HFU)."""
    plain = replace(config, checkpoint_activations="none")
    return flops_per_step(plain, shape, needs_of(config)), flops_per_step(config, shape, needs_of(config))


def profile_step(config: TrainConfig, device: torch.device) -> None:
    """Print the operations that take the GPU's time in one step."""
    _clear(device)
    run = Run(config, device)
    run.step()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        run.step()
        _wait(device)
    print(trace.key_averages().table(sort_by="self_cuda_time_total", row_limit=16, max_name_column_width=60))


def _clear(device: torch.device) -> None:
    """Give back what the run before left: a sharded model is held by cycles of references."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
