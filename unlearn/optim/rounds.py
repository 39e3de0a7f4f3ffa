"""Rounds: in each, every rank owns at most one matrix, which it receives whole, changes and gives back."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from itertools import chain, repeat
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn.optim.layout import Layout, assign

Place = tuple[int, int]  # (replica, shard)


class Matrix(Protocol):
    """What goes through a round: rows that lie on all ranks, and what their owner makes of them together."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, int]: ...
    @property
    def layout(self) -> Layout: ...
    @property
    def device(self) -> torch.device: ...

    @property
    def cost(self) -> int:
        """Floating-point operations of its owner."""
        ...

    @property
    def wire(self) -> torch.dtype:
        """The dtype of what is sent, there and back."""
        ...

    def elements(self, shard: int) -> int:
        """How many elements of it a shard sends, and gets back."""
        ...

    def advance(self, direction: Tensor | None) -> None:
        """Write this rank's rows into `direction`, flat, if this rank is to send or keep them."""
        ...

    def compute(self, whole: list[Tensor]) -> Tensor:
        """The owner's part: flat, out of a list of one, and flat again."""
        ...

    def update(self, rows: Tensor) -> None:
        """Take back this rank's rows, flat."""
        ...


def plan(matrices: Sequence[Matrix], ranks: int) -> list[tuple[Layout, dict[Place, Matrix]]]:
    """Rounds of at most one matrix for each rank: what `run_round` takes, the same on every rank.

    Owners are found over all matrices at once, whatever their layouts, and shape by shape: a tall matrix and its
    transpose take the same operations, but not quite the same time. A round has matrices of one layout and one dtype on
    the way, and of one size as far as there are. Rounds of small matrices come between those of large ones: three are
    in flight at once, and their memory adds up.
    """
    named = {matrix.name: matrix for matrix in sorted(matrices, key=lambda matrix: (matrix.shape, matrix.name))}
    queues: dict[tuple[Layout, torch.dtype], dict[int, list[Matrix]]] = {}
    for name, owner in assign({name: matrix.cost for name, matrix in named.items()}, ranks).items():
        matrix = named[name]
        queues.setdefault((matrix.layout, matrix.wire), {}).setdefault(owner, []).append(matrix)
    rounds = []
    for (layout, _), owned in queues.items():
        places = {at: (r, s) for r, replica in enumerate(layout.places) for s, at in enumerate(replica)}
        for index in _mixed(max(map(len, owned.values()))):
            rounds.append((layout, {places[at]: queue[index] for at, queue in owned.items() if index < len(queue)}))
    return rounds


def _mixed(count: int) -> list[int]:
    """0 .. count - 1, two from the front for each one from the back: 0, 1, count - 1, 2, 3, count - 2, .."""
    front, back = iter(range(count)), iter(reversed(range(count)))
    return [next(back if index % 3 == 2 else front) for index in range(count)]


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
    whole = _exchange(_directions(layout, owned, sizes), sizes, parts, layout.shard_group)
    arrived = [(yield from whole)]  # a list, out of which the owner takes it: its memory is needed
    computed = arrived.pop() if own is None else own.compute(arrived)
    updates = yield from _exchange(computed, parts, sizes, layout.shard_group)
    if layout.replica_group is None:
        _update([matrix for matrix in replica if matrix is not None], layout, updates)
        return
    passing = _broadcasts(layout, owned, updates)
    yield
    for work, matrices, updates in passing:
        work.wait()
        _update(matrices, layout, updates)


def _directions(layout: Layout, owned: Mapping[Place, Matrix], sizes: Sequence[int]) -> Tensor:
    """Step the momenta of the whole round; the directions for this replica's owners, in their order."""
    first = next(iter(owned.values()))
    directions = torch.empty(sum(sizes), dtype=first.wire, device=first.device)
    pieces = dict(enumerate(directions.split(list(sizes))))
    for (replica, shard), matrix in owned.items():
        matrix.advance(pieces[shard] if replica == layout.replica else None)
    return directions


def _exchange(sent: Tensor, sizes: list[int], received: list[int], group: Any) -> Generator[None, None, Tensor]:
    """An uneven all-to-all: start it, let other rounds go on, return what arrived. Without a group, what was sent."""
    if group is None:
        return sent
    buffer = sent.new_empty(sum(received))
    work = dist.all_to_all_single(buffer, sent, received, sizes, group=group, async_op=True)
    yield
    work.wait()
    sent.untyped_storage().resize_(0)  # gloo's threads may keep the tensors of a collective until their next one
    return buffer


def _broadcasts(layout: Layout, owned: Mapping[Place, Matrix], mine: Tensor) -> list[tuple[Any, list[Matrix], Tensor]]:
    """Start passing each replica's updates of this shard on to the others: (work, matrices, updates) of each."""
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
