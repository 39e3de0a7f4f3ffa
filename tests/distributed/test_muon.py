"""Muon on sharded and replicated matrices: the same bits at any number of ranks, what it sends, and what stops it.

Starting ranks is dear: each number of ranks is started once, for all cases.
"""

import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from conftest import tiny_model
from harness import run_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from unlearn.distributed import rank, world_size
from unlearn.errors import UserError
from unlearn.optim.build import build_optimizers
from unlearn.optim.layout import layout_of
from unlearn.optim.muon import Muon
from unlearn.optim.polar import FLOOR, wire_dtype

# uneven shards, one row (empty shards), rows < ranks, several of a shape, and thin ones that are batched when whole
SHAPES = {
    "a.query_key_value.weight": (48, 16),
    "b.up": (64, 16),
    "c.down": (16, 64),
    "d.dense": (16, 16),
    "e.odd": (5, 7),
    "f.row": (1, 33),
    "g.two": (2, 40),
    "h.large": (131, 200),
    "l.wide": (90, 300),
    "i.thin": (8, 96),
    "j.thin": (8, 96),
    "k.tall": (96, 8),
}
SETTINGS = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1}
CASES: dict[str, dict[str, Any]] = {
    "quintic": {"method": "quintic"},
    "polar-express": {"method": "polar-express"},
    "gram": {},
    "not nesterov": {"nesterov": False},
    "quintic, not nesterov, bfloat16": {"method": "quintic", "nesterov": False, "dtype": torch.bfloat16},
    "bfloat16": {"dtype": torch.bfloat16},
    "without a floor": {"floor": 0.0},
    "original, 3 steps": {"adjust_lr": "original", "steps": 3},
    "qkv split": {"qkv": "split", "heads": 4},
    "qkv per head": {"qkv": "per-head", "heads": 4},
    "gradients of zero": {"scale": 0.0},
    "gradients of 1e-12": {"scale": 1e-12},
    "quintic, gradients of 1e-12": {"scale": 1e-12, "method": "quintic"},
    "a missing gradient": {"missing": "d.dense"},
}


SOME = ("quintic", "gram", "a missing gradient")


class Matrices(nn.Module):
    def __init__(self, weights: dict[str, Tensor]):
        super().__init__()
        self.names = list(weights)
        self.weights = nn.ParameterList([nn.Parameter(weight.clone()) for weight in weights.values()])

    def named(self) -> dict[str, nn.Parameter]:
        return dict(zip(self.names, self.weights, strict=True))


def build(kind: str, dtype: torch.dtype = torch.float32) -> Matrices:
    """The matrices: `whole` on every rank, `sharded` over all, `hybrid` R x S, or half of them whole."""
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}
    matrices = Matrices(weights)
    if kind == "whole":
        return matrices
    mesh: DeviceMesh = init_device_mesh("cpu", (world_size(),))
    if kind.startswith("hybrid"):
        replicas = int(kind.removeprefix("hybrid"))
        mesh = init_device_mesh("cpu", (replicas, world_size() // replicas), mesh_dim_names=("replicate", "shard"))
    ignored = set(list(matrices.weights)[::2]) if kind == "mixed" else set()
    fully_shard(matrices, mesh=mesh, ignored_params=ignored)
    return matrices


def like(parameter: Tensor, whole: Tensor) -> Tensor:
    """`whole` in the placement of `parameter`."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)


def steps(
    matrices: Matrices, optimizer: Muon, which: range, *, scale: float = 1.0, missing: str = "", seed: int = 1
) -> None:
    """Steps with gradients that depend on (step, name) alone; `missing` has none in steps 1 and 2, and in step 3 only
    on some ranks, where it is zero on the others."""
    for step in which:
        for index, (name, parameter) in enumerate(matrices.named().items()):
            generator = torch.Generator().manual_seed(1000 * step + index)
            whole = (scale * torch.randn(SHAPES[name], generator=generator)).to(parameter.dtype)
            parameter.grad = like(parameter, whole)
            if name == missing and step in (1, 2):
                parameter.grad = None
            if name == missing and step == 3:
                # whole matrices must have equal gradients on all ranks, so there it is zero on all
                last = rank() == world_size() - 1
                parameter.grad = None if world_size() > 1 and not last else like(parameter, torch.zeros_like(whole))
        optimizer.step()


def gathered(matrices: Matrices) -> dict[str, Tensor]:
    return {
        name: (parameter.full_tensor() if isinstance(parameter, DTensor) else parameter).detach().clone()
        for name, parameter in matrices.named().items()
    }


def after_five_steps(kind: str, dtype: torch.dtype = torch.float32, **case: Any) -> dict[str, Tensor]:
    gradients = {key: case.pop(key) for key in ("scale", "missing") if key in case}
    matrices = build(kind, dtype)
    optimizer = Muon(matrices.named().items(), **(SETTINGS | case))
    gather, DTensor.full_tensor = DTensor.full_tensor, None  # a step that gathers a tensor fails
    try:
        steps(matrices, optimizer, range(5), **gradients)
    finally:
        DTensor.full_tensor = gather
    return gathered(matrices)


def kinds(ranks: int) -> list[str]:
    return ["whole", "sharded", "mixed"] + [f"hybrid{r}" for r in range(1, ranks + 1) if ranks % r == 0 and ranks > 1]


def sent_bytes(kind: str) -> list[int]:
    """Bytes that this rank sends to others in each all-to-all of one step."""
    matrices = build(kind)
    optimizer = Muon(matrices.named().items(), **SETTINGS)
    exchange, sent = dist.all_to_all_single, []

    def counted(output: Tensor, given: Tensor, received: list[int], sizes: list[int], **rest: Any) -> Any:
        sent.append(given.dtype.itemsize * (sum(sizes) - sizes[dist.get_rank(rest["group"])]))
        return exchange(output, given, received, sizes, **rest)

    dist.all_to_all_single = counted
    try:
        steps(matrices, optimizer, range(1))
    finally:
        dist.all_to_all_single = exchange
    return sent


def poisoned(kind: str) -> tuple[str, bool]:
    """A NaN on the last rank only, in its rows of the largest matrix: what every rank says, and if all is as before."""
    matrices = build(kind)
    optimizer = Muon(matrices.named().items(), **SETTINGS)
    steps(matrices, optimizer, range(2))
    watched = [*matrices.weights, *(state["momentum_buffer"] for state in optimizer.state.values())]
    before = [local(tensor).detach().clone() for tensor in watched]
    if rank() == world_size() - 1:
        local(matrices.named()["h.large"].grad)[-1, -1] = math.nan
    try:
        optimizer.step()
    except UserError as error:
        same = all(torch.equal(local(a), b) for a, b in zip(watched, before, strict=True))
        return str(error), same
    return "no error", False


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def save_after_three(folder: Path, kind: str) -> None:
    matrices = build(kind)
    optimizer = Muon(matrices.named().items(), **SETTINGS)
    steps(matrices, optimizer, range(3))
    model_state, optimizer_state = get_state_dict(matrices, optimizer)
    checkpoint.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)


def load_and_continue(folder: Path, kind: str) -> dict[str, Tensor]:
    """Load into other weights and an optimizer without a step, then take steps 3 and 4."""
    matrices = build(kind)
    with torch.no_grad():
        for parameter in matrices.weights:
            parameter.zero_()
    optimizer = Muon(matrices.named().items(), **SETTINGS)
    model_state, optimizer_state = get_state_dict(matrices, optimizer)
    checkpoint.load({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=folder)
    set_state_dict(matrices, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    steps(matrices, optimizer, range(3, 5))
    return gathered(matrices)


def refused() -> list[str]:
    """What other placements are answered."""
    mesh, answers = init_device_mesh("cpu", (world_size(),)), []
    wrong = [distribute_tensor(torch.ones(4, 4), mesh, [Shard(1)])]
    if world_size() == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
        wrong += [distribute_tensor(torch.ones(4, 4), square, [Shard(0), Shard(0)])]
        wrong += [distribute_tensor(torch.ones(4, 4), square["b"], [Shard(0)])]
    for tensor in wrong:
        with pytest.raises(ValueError) as raised:
            layout_of("w", tensor)
        answers.append(str(raised.value))
    return answers


def everything(folder: Path) -> dict[str, Any]:
    """All that is asked of one number of ranks."""
    ranks = world_size()
    results: dict[str, Any] = {
        "weights": {
            (kind, case): after_five_steps(kind, **CASES[case])
            for kind in kinds(ranks)
            for case in (CASES if kind in ("whole", "sharded", "hybrid2") else SOME)
        },
        "poisoned": {kind: poisoned(kind) for kind in kinds(ranks)},
        "refused": refused(),
        "continued": {
            (saved, kind): load_and_continue(folder / saved, kind)
            for saved in ("sharded", "whole")
            for kind in kinds(ranks)
            if (kind == "whole") == (saved == "whole") and kind != "mixed"
        },
    }
    if ranks > 1:
        results["sent"] = sent_bytes("sharded")
    return results


@pytest.fixture(scope="module")
def at_ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[dict[str, Any]]]:
    """`everything` at a number of ranks, once; the checkpoints that it loads were saved at two."""
    folder = tmp_path_factory.mktemp("checkpoints")

    def save() -> None:
        for kind in ("sharded", "whole"):
            save_after_three(folder / kind, kind)

    run_ranks(2, save)
    return cache(lambda ranks: run_ranks(ranks, everything, folder))


RANKS = [1, 2, 3, 4]


@pytest.mark.parametrize("ranks", RANKS)
def test_the_same_bits_at_any_number_of_ranks(at_ranks: Any, ranks: int) -> None:
    """Sharded, hybrid, whole and mixed: those of one process without a process group."""
    (expected,) = run_ranks(1, lambda: {case: after_five_steps("whole", **CASES[case]) for case in CASES})
    for results in at_ranks(ranks):
        for (kind, case), weights in results["weights"].items():
            for name, weight in weights.items():
                if SHAPES[name] in ((8, 96), (96, 8)) and kind not in ("whole",):
                    continue  # compared below: in a batch where it is whole, alone where it is sharded
                assert torch.equal(weight, expected[case][name]), (kind, case, name)
    (alone,) = [results["weights"] for results in at_ranks(1)[:1]]
    for results in at_ranks(ranks):
        for (kind, case), weights in results["weights"].items():
            for name in ("i.thin", "j.thin", "k.tall"):
                if kind.startswith(("hybrid", "sharded")):
                    assert torch.equal(weights[name], alone["sharded", case][name]), (kind, case, name)


def test_the_cases_do_something(at_ranks: Any) -> None:
    """No two cases end in the same weights, and a step without a gradient leaves a weight alone."""
    weights = {case: at_ranks(2)[0]["weights"]["sharded", case] for case in CASES}
    for one in CASES:
        for other in CASES:
            assert one == other or any(not torch.equal(weights[one][n], weights[other][n]) for n in SHAPES), (
                one,
                other,
            )
    start = gathered(build("whole"))
    for name, weight in weights["gradients of zero"].items():
        torch.testing.assert_close(weight, start[name] * (1 - 0.02 * 0.1) ** 5)  # decay is all that happened


@pytest.mark.parametrize("ranks", RANKS)
def test_nan_on_one_rank_stops_all_before_anything_changes(at_ranks: Any, ranks: int) -> None:
    for results in at_ranks(ranks):
        for kind, (message, same) in results["poisoned"].items():
            assert "NaN or infinity in that of h.large, before any weight was changed" in message and same, kind


@pytest.mark.parametrize("ranks", RANKS)
def test_a_checkpoint_of_two_ranks_continues_on_any_number(at_ranks: Any, ranks: int) -> None:
    """With the bits of the run that was never interrupted, at 1, 2, 3 and 4 ranks, full and hybrid."""
    for results in at_ranks(ranks):
        for (_, kind), weights in results["continued"].items():
            for name, weight in weights.items():
                assert torch.equal(weight, results["weights"][kind, "gram"][name]), (kind, name)


@pytest.mark.parametrize("ranks", RANKS[1:])
def test_bytes_and_collectives(at_ranks: Any, ranks: int) -> None:
    """Two all-to-alls a round, no more rounds than the busiest owner has matrices of either dtype; 2 x 2 bytes
    P / W (W - 1) / W of large matrices, 2 x 4 of small ones."""
    sent = [results["sent"] for results in at_ranks(ranks)]
    assert len({len(calls) for calls in sent}) == 1 and len(sent[0]) % 2 == 0
    assert len(SHAPES) / ranks <= len(sent[0]) / 2 <= len(SHAPES)
    total = sum(rows * columns * wire_dtype(rows, columns, FLOOR).itemsize for rows, columns in SHAPES.values())
    # rows that do not divide evenly leave a little to chance: who owns what
    assert sum(map(sum, sent)) / ranks == pytest.approx(2 * total / ranks * (ranks - 1) / ranks, rel=0.1)


def test_other_placements_are_refused(at_ranks: Any) -> None:
    for ranks in (2, 4):
        for results in at_ranks(ranks):
            assert all("expected" in answer and " w" in answer for answer in results["refused"])
            assert len(results["refused"]) == (3 if ranks == 4 else 1)


def gradients_through_fsdp() -> dict[str, Tensor]:
    """Two steps of a sharded model by backward, Muon and AdamW."""
    model = tiny_model()
    for block in model.gpt_neox.layers:
        fully_shard(block)
    fully_shard(model)
    built = build_optimizers(model, optimizer="muon", adam_lr=1e-3, muon_lr=1e-2, momentum=0.9)
    tokens = torch.randint(0, 301, (4, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        logits = model(input_ids=tokens, use_cache=False).logits
        nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer in built.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return {name: parameter.full_tensor().detach() for name, parameter in model.named_parameters()}


def test_a_sharded_model_trains() -> None:
    """The same rows on each rank: their mean gradient is one process's, to rounding, which bfloat16 makes 1/256.

    Matrices only: Adam's first steps on biases are +-lr, also where the gradient is rounding noise.
    """
    (expected,) = run_ranks(1, gradients_through_fsdp)
    for weights in run_ranks(3, gradients_through_fsdp):
        for name, weight in weights.items():
            if weight.ndim == 2:
                assert (weight - expected[name]).norm() <= 2e-3 * expected[name].norm(), name
