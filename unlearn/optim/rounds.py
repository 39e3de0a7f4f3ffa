"""Rounds: in each, every rank owns at most one matrix, which it receives, orthogonalises and gives back."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn.optim.layout import Layout, assign
from unlearn.optim.matrix import Matrix

Place = tuple[int, int]  # (replica, shard)


def plan(matrices: Sequence[Matrix], ranks: int) -> list[tuple[Layout, dict[Place, Matrix]]]:
    """Rounds of at most one matrix for each rank, dearest first: what `run_round` takes, the same on every rank.

    Owners are found over all matrices at once, whatever their layouts; a round has matrices of one layout.
    """
    named = {matrix.name: matrix for matrix in matrices}
    queues: dict[Layout, dict[int, list[Matrix]]] = {}
    for name, owner in assign({name: matrix.cost for name, matrix in named.items()}, ranks).items():
        queues.setdefault(named[name].layout, {}).setdefault(owner, []).append(named[name])
    rounds = []
    for layout, owned in queues.items():
        places = {at: (r, s) for r, replica in enumerate(layout.places) for s, at in enumerate(replica)}
        for index in range(max(map(len, owned.values()))):
            rounds.append((layout, {places[at]: queue[index] for at, queue in owned.items() if index < len(queue)}))
    return rounds


def pipeline(rounds: Iterable[Iterator[None]]) -> None:
    """Advance every round by one stage at a time, the latest first: a round is sent while the one before it is
    orthogonalised and the one before that is on its way back. Buffers belong to a round, so none is written to while
    another round's is still being read."""
    running: list[Iterator[None]] = []
    for entering in chain(rounds, repeat(None)):
        if entering is not None:
            running.insert(0, entering)
        running = [stages for stages in running if next(stages, "ended") != "ended"]
        if entering is None and not running:
            return


def run_round(layout: Layout, owned: Mapping[Place, Matrix]) -> Iterator[None]:
    """One round, in stages: step momenta and send directions to their owners | orthogonalise and send updates back |
    pass them on to the other replicas, if there are others | update weights.

    A rank's rows are contiguous in a row-major matrix: what an owner receives, in order of ranks, *is* the matrix, and
    what it sends *is* the shards of the update.
    """
    replica = [owned.get((layout.replica, shard)) for shard in range(layout.shards)]
    own = replica[layout.shard]
    sizes = [0 if matrix is None else matrix.elements(layout.shard) for matrix in replica]
    parts = [0 if own is None else own.elements(shard) for shard in range(layout.shards)]
    held = [_directions(layout, owned, sizes)]
    if layout.shard_group is not None:
        work, whole = _exchange(held[0], sizes, parts, layout.shard_group)
        yield
        work.wait()
        held[0] = whole
        del whole, work
    if own is not None:
        held.append(own.orthogonalize(held.pop().view(own.shape)).flatten())  # popped: its memory is free to use
    if layout.shard_group is not None:
        work, shards = _exchange(held[0], parts, sizes, layout.shard_group)
        yield
        work.wait()
        held[0] = shards
        del shards, work
    mine = [matrix for matrix in replica if matrix is not None]
    if layout.replica_group is None:
        _update(mine, layout, held.pop())
        return
    passing = _broadcasts(layout, owned, held.pop())
    yield
    for work, matrices, updates in passing:
        work.wait()
        _update(matrices, layout, updates)


def _directions(layout: Layout, owned: Mapping[Place, Matrix], sizes: Sequence[int]) -> Tensor:
    """Step the momenta of the whole round; the directions for this replica's owners, in their order, in bfloat16."""
    weight = next(iter(owned.values())).weight
    directions = weight.new_empty(sum(sizes), dtype=torch.bfloat16)
    pieces = dict(enumerate(directions.split(list(sizes))))
    for (replica, shard), matrix in owned.items():
        matrix.advance(pieces[shard] if replica == layout.replica else None)
    return directions


def _exchange(sent: Tensor, sizes: list[int], received: list[int], group: Any) -> tuple[Any, Tensor]:
    """Start an uneven all-to-all."""
    buffer = sent.new_empty(sum(received))
    return dist.all_to_all_single(buffer, sent, received, sizes, group=group, async_op=True), buffer


def _broadcasts(layout: Layout, owned: Mapping[Place, Matrix], mine: Tensor) -> list[tuple[Any, list[Matrix], Tensor]]:
    """Start passing each replica's updates of this shard on to the other replicas: (work, matrices, updates) of each."""
    started = []
    for replica in range(layout.replicas):
        matrices = [owned[replica, shard] for shard in range(layout.shards) if (replica, shard) in owned]
        size = sum(matrix.elements(layout.shard) for matrix in matrices)
        if size > 0:
            updates = mine if replica == layout.replica else mine.new_empty(size)
            work = dist.broadcast(updates, group=layout.replica_group, group_src=replica, async_op=True)
            started.append((work, matrices, updates))
    return started


def _update(matrices: Sequence[Matrix], layout: Layout, updates: Tensor) -> None:
    for matrix, rows in zip(matrices, updates.split([m.elements(layout.shard) for m in matrices]), strict=True):
        matrix.update(rows)
