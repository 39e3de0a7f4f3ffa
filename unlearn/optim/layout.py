"""Where a matrix lies, and which rank orthogonalises it."""

import heapq
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from unlearn.distributed import rank, world_size


@dataclass(frozen=True)
class Layout:
    """How a matrix lies over all ranks: its rows in S contiguous shards, each of them held by R replicas; W = R S.

    Attributes:
        places: the global rank of each replica's shards, R tuples of S.
        replica, shard: this rank's place.
        sharded: whether its rows are dealt out, be it to one rank.
        shard_group: the S ranks that hold this replica together, in order; None if S = 1.
        replica_group: the R ranks that hold the same shard, in order; None if R = 1.
    """

    places: tuple[tuple[int, ...], ...]
    replica: int
    shard: int
    sharded: bool
    shard_group: Any = None
    replica_group: Any = None

    @property
    def replicas(self) -> int:
        return len(self.places)

    @property
    def shards(self) -> int:
        return len(self.places[0])

    def rows(self, total: int, shard: int) -> int:
        """How many of `total` rows a shard holds: `torch.chunk`'s sizes, the last shards smaller or empty."""
        size = -(-total // self.shards)
        return min(max(total - shard * size, 0), size)


def layout_of(name: str, parameter: Tensor) -> Layout:
    """The layout of a plain tensor, which is whole on every rank, or of a DTensor.

    Raises:
        ValueError: see `mesh_dimensions`.
    """
    sharded, replicated = mesh_dimensions(name, parameter)
    if not isinstance(parameter, DTensor) or sharded is None:
        return Layout(tuple((r,) for r in range(world_size())), rank(), 0, False, None, _world())
    mesh = parameter.device_mesh
    grid = mesh.mesh if replicated is None else mesh.mesh.movedim(sharded, -1)
    return Layout(
        tuple(map(tuple, grid.reshape(-1, mesh.size(sharded)).tolist())),
        0 if replicated is None else mesh.get_local_rank(replicated),
        mesh.get_local_rank(sharded),
        True,
        mesh.get_group(sharded) if mesh.size(sharded) > 1 else None,
        None if replicated is None or mesh.size(replicated) == 1 else mesh.get_group(replicated),
    )


def mesh_dimensions(name: str, parameter: Tensor) -> tuple[int | None, int | None]:
    """Which dimension of its mesh shards a parameter by rows, and which replicates it; None where there is none.

    Raises:
        ValueError: the mesh does not span all ranks, or the parameter is sharded in another way.
    """
    if not isinstance(parameter, DTensor):
        return None, None
    mesh, placements = parameter.device_mesh, parameter.placements
    if mesh.size() != world_size():
        raise ValueError(f"expected a mesh over all {world_size()} ranks for {name}; found one over {mesh.size()}")
    sharded = [dim for dim, placement in enumerate(placements) if type(placement) is Shard and placement.dim == 0]
    copied = [dim for dim, placement in enumerate(placements) if isinstance(placement, Replicate)]
    if len(sharded) > 1 or len(sharded) + len(copied) < len(placements) or (sharded and len(copied) > 1):
        raise ValueError(
            f"expected {name} sharded by rows over one mesh dimension, or replicated; found {placements}: use "
            "fully_shard without a shard_placement_fn, on a mesh of one or two dimensions"
        )
    return next(iter(sharded), None), next(iter(copied), None)


def _world() -> Any:
    return dist.group.WORLD if world_size() > 1 else None


def assign(costs: Mapping[str, float], ranks: int) -> dict[str, int]:
    """Give each matrix an owner: the dearest first, to the rank with the least work (longest processing time, Graham
    1969); of equal costs the one that is given first, of equally busy ranks the lesser rank.

    Returns:
        {name: owner}, dearest first.
    """
    busy = [(0.0, index) for index in range(ranks)]
    owners: dict[str, int] = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        load, owner = heapq.heappop(busy)
        owners[name] = owner
        heapq.heappush(busy, (load + costs[name], owner))
    return owners


def balance(costs: Mapping[str, float], ranks: int) -> float:
    """Mean work of a rank over that of the busiest, in (0, 1]: the parallel efficiency of `assign`."""
    loads = [0.0] * ranks
    for name, owner in assign(costs, ranks).items():
        loads[owner] += costs[name]
    return sum(loads) / ranks / max(loads)
