"""Distributed Muon against torch.optim.Muon, and against the other ways to share its work.

    python benchmarks/muon.py                                        # the table of benchmarks/README.md
    python benchmarks/muon.py --hidden 1024 --blocks 5 --ranks 2     # one stack
    python benchmarks/muon.py --gpu                                  # Newton-Schulz on the true 6.9 B shapes

On CPU: stacks of GPT-NeoX's four matrices a block, float32, sharded by rows over gloo ranks of one thread each, and 64
LoRA matrices that every rank has whole. Within one run all ways alternate, so that a noisy machine is noisy for all.
Reported are medians over the repeats of: CPU time of a step on the busier rank, over that of torch.optim.Muon in one
process (ratio of the same repeat); wall time likewise. Then, of one step: bytes and collectives a rank sends, and the
peak of live allocations above weights, gradients and momenta, in the largest matrices of the stack (float32).
"""

import argparse
import importlib.util
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from measure import peak_bytes
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn.optim.layout import balance
from unlearn.optim.muon import Muon, default_floor
from unlearn.optim.newton_schulz import Method, orthogonalize
from unlearn.optim.polar import flops, polar_factor

SETTINGS = {"lr": 1e-3, "momentum": 0.95, "nesterov": True, "weight_decay": 0.01}
METHODS: tuple[Method, ...] = ("quintic", "polar-express", "gram")
STACKS = [(256, 8, 2), (512, 6, 2), (1024, 5, 2), (512, 5, 4)]  # hidden size, blocks, ranks
Shapes = dict[str, tuple[int, int]]
Step = Callable[[], Any]


def neox(hidden: int, blocks: int) -> Shapes:
    """The matrices of GPT-NeoX's blocks."""
    block = {"qkv": (3 * hidden, hidden), "dense": (hidden, hidden), "up": (4 * hidden, hidden)}
    block["down"] = (hidden, 4 * hidden)
    return {f"{index}.{name}": shape for index in range(blocks) for name, shape in block.items()}


def lora(count: int = 64, rank: int = 16, width: int = 512) -> Shapes:
    """Adapters' A [r, width] and B [width, r]."""
    return {f"{index}": (rank, width) if index % 2 == 0 else (width, rank) for index in range(count)}


def parameters(shapes: Shapes, mesh: DeviceMesh | None) -> dict[str, nn.Parameter]:
    """Random weights with random gradients, the same on every rank; sharded by rows over `mesh` if there is one."""
    generator = torch.Generator().manual_seed(0)

    def make(shape: tuple[int, int]) -> Tensor:
        whole = torch.randn(shape, generator=generator)
        return whole if mesh is None else distribute_tensor(whole, mesh, [Shard(0)])

    found = {name: nn.Parameter(make(shape)) for name, shape in shapes.items()}
    for name, shape in shapes.items():
        found[name].grad = make(shape)
    return found


def torch_muon(found: dict[str, nn.Parameter]) -> Step:
    """torch's own, in one process or on DTensors, whose every product it distributes."""
    settings: dict[str, Any] = SETTINGS | {"adjust_lr_fn": "match_rms_adamw"}
    return torch.optim.Muon(list(found.values()), **settings).step


def ours(found: dict[str, nn.Parameter], method: Method, floor: float | None = None) -> Step:
    settings: dict[str, Any] = SETTINGS
    return Muon(found.items(), method=method, floor=floor, **settings).step


def redundant(found: dict[str, nn.Parameter]) -> Step:
    """Momentum where it lies, then all-gather, and every rank orthogonalises everything."""
    momenta = {name: torch.zeros_like(parameter) for name, parameter in found.items()}

    @torch.no_grad()
    def step() -> None:
        for name, parameter in found.items():
            gradient, momentum = parameter.grad, momenta[name]
            assert isinstance(gradient, DTensor) and isinstance(momentum, DTensor) and isinstance(parameter, DTensor)
            momentum.lerp_(gradient, 0.05)
            direction = gradient.lerp(momentum, 0.95).bfloat16()
            assert isinstance(direction, DTensor)
            update = orthogonalize(direction.full_tensor(), "quintic")
            mine = distribute_tensor(update, parameter.device_mesh, [Shard(0)], src_data_rank=None)
            parameter.to_local().mul_(1 - 1e-5).add_(mine.to_local(), alpha=-1e-3)

    return step


def dion(found: dict[str, nn.Parameter], mesh: DeviceMesh) -> Step:
    """microsoft/dion's Muon, eager."""
    from dion import Muon as Dion

    settings: dict[str, Any] = {"lr": 1e-3, "mu": 0.95, "nesterov": True, "weight_decay": 0.01}
    return Dion(list(found.values()), distributed_mesh=mesh, **settings).step


def ways(shapes: Shapes, sharded: bool) -> dict[str, Step]:
    """A step of every way to share the work."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if sharded else None
    found = {f"ours, {method}": ours(parameters(shapes, mesh), method) for method in METHODS}
    found["ours, gram, no floor"] = ours(parameters(shapes, mesh), "gram", 0.0)
    if mesh is None:
        return found
    found["torch.optim.Muon on DTensors"] = torch_muon(parameters(shapes, mesh))
    found["all-gather, redundant"] = redundant(parameters(shapes, mesh))
    if importlib.util.find_spec("dion") is not None:
        found["dion"] = dion(parameters(shapes, mesh), mesh)
    return found


class Traffic(TorchDispatchMode):
    """Counts the collectives of a block, and the bytes that this rank sends in them to others."""

    def __init__(self) -> None:
        super().__init__()
        self.collectives, self.sent = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if DTensor in types:  # let it fall apart into what it does
            return NotImplemented
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional") and "wait" not in name:
            self.collectives += 1
            self.sent += _sent_bytes(name, args)
        return func(*args, **(kwargs or {}))


def _sent_bytes(name: str, args: Any) -> float:
    """Bytes to other ranks, as a ring sends them."""
    ranks, first = dist.get_world_size(), args[0]
    tensor = first[0] if isinstance(first, list) else first
    size = tensor.numel() * tensor.element_size()
    if "alltoall_base" in name:
        sent, splits = args[1], args[4]
        own = splits[dist.get_rank()] * (sent.numel() // max(1, sum(splits)))
        return (sent.numel() - own) * sent.element_size()
    if "allreduce" in name or "all_reduce" in name:
        return 2 * size * (ranks - 1) / ranks
    if "reduce_scatter" in name:
        return size * (ranks - 1) / ranks
    if "allgather" in name or "_allgather_base" in name:
        return size * (ranks - 1) / ranks  # the first argument is the result
    return size * (ranks - 1)


@dataclass
class Timing:
    cpu: list[float]
    wall: list[float]


def measure(shapes: Shapes, sharded: bool, repeats: int) -> dict[str, dict[str, float]]:
    """What one rank has to say of each way; CPU and wall times are the greatest of all ranks'."""
    steps = ways(shapes, sharded)
    single = torch_muon(parameters(shapes, None))
    peaks = {name: peak_bytes(step) for name, step in steps.items()}
    traffic = {}
    for name, step in steps.items():
        with Traffic() as traffic[name]:
            step()
    single()
    ratios = {name: Timing([], []) for name in steps}
    base = Timing([], [])
    for _ in range(repeats):
        # every rank runs the single process's step in turn, alone: no rank's share of the machine is another's
        cpu, wall = _alone(single)
        base.cpu.append(cpu)
        base.wall.append(wall)
        for name, step in steps.items():
            own_cpu, own_wall = _together(step)
            ratios[name].cpu.append(own_cpu / cpu)
            ratios[name].wall.append(own_wall / wall)
    largest = 4 * max(rows * columns for rows, columns in shapes.values())
    report = {"torch.optim.Muon, one process": {"cpu": 1.0, "wall": 1.0, "ms": 1e3 * statistics.median(base.cpu)}}
    for name in steps:
        report[name] = {
            "cpu": statistics.median(ratios[name].cpu),
            "wall": statistics.median(ratios[name].wall),
            "peak": _largest(peaks[name]) / largest,
            "sent": _mean(traffic[name].sent),
            "most sent": _largest(traffic[name].sent),
            "collectives": traffic[name].collectives,
        }
    return report


def _alone(step: Step) -> tuple[float, float]:
    """CPU and wall seconds of a step on rank 0 while the others wait."""
    dist.barrier()
    cpu, wall = _seconds(step) if dist.get_rank() == 0 else (0.0, 0.0)
    dist.barrier()
    return _largest(cpu), _largest(wall)


def _together(step: Step) -> tuple[float, float]:
    """CPU seconds of the busier rank and wall seconds of the later one."""
    dist.barrier()
    cpu, wall = _seconds(step)
    return _largest(cpu), _largest(wall)


def _seconds(step: Step) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def _largest(value: float) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.item()


def _mean(value: float) -> float:
    tensor = torch.tensor(float(value), dtype=torch.float64)
    dist.all_reduce(tensor)
    return tensor.item() / dist.get_world_size()


def on_ranks(ranks: int, *arguments: Any) -> dict[str, dict[str, float]]:
    """`measure(*arguments)` on forked gloo ranks; rank 0's answer."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        answers = context.SimpleQueue()
        started = [
            context.Process(target=_rank, args=(rank, ranks, folder, answers, arguments), daemon=True)
            for rank in range(ranks)
        ]
        for process in started:
            process.start()
        for process in started:
            process.join()
        if any(process.exitcode for process in started):
            raise SystemExit("benchmarks/muon.py: a rank failed; its traceback is above")
        return answers.get()


def _rank(rank: int, ranks: int, folder: str, answers: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(ranks))
    rendezvous = f"file://{Path(folder) / 'rendezvous'}"
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=ranks, timeout=timedelta(minutes=10))
    report = measure(*arguments)
    if rank == 0:
        answers.put(report)
    dist.destroy_process_group()


def show(title: str, report: dict[str, dict[str, float]], bound: float | None) -> None:
    print(f"\n{title}")
    print(f"{'':32}{'CPU':>7}{'wall':>7}{'sent MiB (most)':>18}{'collectives':>13}{'peak / largest':>16}")
    for name, row in report.items():
        if "ms" in row:
            print(f"{name:32}{1:7.2f}{1:7.2f}     {row['ms']:.0f} ms CPU")
            continue
        sent = f"{row['sent'] / 2**20:.2f} ({row['most sent'] / 2**20:.2f})"
        print(f"{name:32}{row['cpu']:7.2f}{row['wall']:7.2f}{sent:>18}{row['collectives']:13.0f}{row['peak']:16.1f}")
    if bound is not None:
        print(f"{'2 x 2 bytes P / W (W - 1) / W':32}{'':14}{bound / 2**20:11.2f} MiB")


def show_balance() -> None:
    """How even the work of the 6.9 B model's 128 matrices is on different numbers of ranks."""
    print("\nbalance of the 6.9 B model's matrices: mean work of a rank over the busiest's")
    for method in METHODS[::2]:
        floor, shapes = default_floor(method), neox(4096, 32)
        costs: dict[str, float] = {name: flops(*shape, method, floor=floor) for name, shape in shapes.items()}
        print(f"{method:10}" + "".join(f"  W={ranks}: {balance(costs, ranks):.2f}" for ranks in (4, 8, 16, 24, 32, 64)))


def on_gpu(repeats: int) -> None:
    """The orthogonal factor of the 6.9 B model's four shapes: time, and share of the rate of a large bf16 product."""
    rate = _product_rate(repeats)
    print(f"bf16 product of 8192: {rate / 1e12:.0f} TFLOP/s ({torch.cuda.get_device_name()})")
    for name, (rows, columns) in neox(4096, 1).items():
        matrix = torch.randn(rows, columns, device="cuda", dtype=torch.bfloat16)
        for method in METHODS:
            for floor in sorted({0.0, default_floor(method)}):
                seconds = _gpu_seconds(lambda: polar_factor(matrix, method, floor=floor), repeats)  # noqa: B023
                share = flops(rows, columns, method, floor=floor) / seconds / rate
                form = f"{method}, floor {floor}"
                print(f"{name:8}[{rows:5}, {columns:5}] {form:26}{1e3 * seconds:8.2f} ms  {share:6.1%} of the rate")


def _product_rate(repeats: int) -> float:
    x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    return 2 * 8192**3 / _gpu_seconds(lambda: x @ x, repeats)


def _gpu_seconds(function: Step, repeats: int) -> float:
    """Median time of a call on the device."""
    times = []
    for _ in range(repeats + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--hidden", type=int)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--gpu", action="store_true", help="Newton-Schulz on one CUDA device instead")
    flags = parser.parse_args()
    if flags.gpu:
        on_gpu(flags.repeats)
        return
    stacks = STACKS if flags.hidden is None else [(flags.hidden, flags.blocks, flags.ranks)]
    for hidden, blocks, ranks in stacks:
        shapes = neox(hidden, blocks)
        total = sum(rows * columns for rows, columns in shapes.values())
        title = f"hidden {hidden}, {blocks} blocks, {ranks} ranks ({total / 1e6:.1f} M parameters)"
        report = on_ranks(ranks, shapes, True, flags.repeats)
        show(title, report, 2 * 2 * total / ranks * (ranks - 1) / ranks)
    if flags.hidden is None:
        show("64 LoRA matrices, r = 16, width 512, 2 ranks", on_ranks(2, lora(), False, flags.repeats), None)
    show_balance()


if __name__ == "__main__":
    main()
