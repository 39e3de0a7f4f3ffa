"""Windows -> one seeded global order -> global batches -> this rank's rows.

The order of the windows, and which of them form a global batch, depend on the seed and not on the number of ranks.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unlearn.corpus import Corpus
from unlearn.distributed import rank, world_size
from unlearn.errors import UserError
from unlearn.seeding import derive, generator

MOST = 10**8  # windows of a run, whose order is held in memory: no run of years has more


@dataclass(frozen=True)
class Rows:
    """Some windows, padded on the right.

    Attributes:
        input_ids: int64 [B, S].
        real: int64 [N], where the tokens that count are among the B S: all real ones, or those of --forget-mask.
            leading: int64 [M], where those are whose next token counts. As positions, not as masks, whose use would
            make the CPU wait for the GPU.
        keys: int64 [B], one number in 0..2**31-1 for each row, from (seed, step, window).
        sizes, host_keys: real tokens of each row, whether they count or not, and `keys`: known without asking the GPU.
        global_tokens, global_leading, global_sequences: N, M and windows of the global batch, over all micro-batches
            and ranks.
    """

    input_ids: Tensor
    real: Tensor
    leading: Tensor
    keys: Tensor
    sizes: tuple[int, ...]
    host_keys: tuple[int, ...]
    global_tokens: int
    global_leading: int
    global_sequences: int

    @property
    def tokens(self) -> int:
        """Real tokens, whether they count or not."""
        return sum(self.sizes)

    def at_real(self, values: Tensor) -> Tensor:
        """[B, S, ..] -> [N, ..]: the values at real tokens."""
        return values.flatten(0, 1).index_select(0, self.real)

    def at_leading(self, values: Tensor) -> Tensor:
        """[B, S, ..] -> [M, ..]: the values at tokens that have a next one."""
        return values.flatten(0, 1).index_select(0, self.leading)

    def next_ids(self) -> Tensor:
        """int64 [M]: the next tokens of those."""
        return self.input_ids.flatten().index_select(0, self.leading + 1)

    def mean(self, values: Tensor) -> Tensor:
        """This micro-batch's share of the mean over the global batch's real tokens, of values [N]; []."""
        return values.sum() / self.global_tokens

    def weights(self) -> Tensor:
        """float32 [N]: what each real token counts in a mean over the global batch."""
        return torch.full(self.real.shape, 1.0 / self.global_tokens, device=self.real.device)

    def leading_weights(self) -> Tensor:
        """float32 [M]: what each token that has a next one counts in a mean over those of the global batch."""
        return torch.full(self.leading.shape, 1.0 / self.global_leading, device=self.leading.device)

    def row_of(self) -> Tensor:
        """int64 [N]: the row, 0..B-1, of each real token."""
        return torch.div(self.real, self.input_ids.shape[1], rounding_mode="floor")

    def leading_row_of(self) -> Tensor:
        """int64 [M]: the row, 0..B-1, of each token that has a next one."""
        return torch.div(self.leading, self.input_ids.shape[1], rounding_mode="floor")

    def of_sequence(self, values: Tensor) -> Tensor:
        """[M] -> [B]: the sum over each sequence's tokens that have a next one; 0 in a row of padding alone."""
        return values.new_zeros(self.input_ids.shape[0]).index_add_(0, self.leading_row_of(), values)

    def lengths(self) -> Tensor:
        """float32 [B]: how many tokens of each sequence have a next one."""
        return self.of_sequence(torch.ones(self.leading.shape, device=self.leading.device))


class Batches:
    """Global batches of one corpus: the same windows in the same order at any number of ranks.

    The first `examples` windows of one seeded permutation are those to train on; each pass over them has a permutation
    of its own.

    Args:
        total: windows to train on over the whole run; the last global batch may be short.
        batch: windows of a full global batch.
        tag: sets this corpus's order apart from another's under the same seed.
        micro_batch: most windows of one forward pass on one rank.
        micro_tokens: most tokens, padding included, of one forward pass with more than one window.

    Attributes:
        chosen: how many windows there are to train on. unique: how many of them the whole run comes to.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        examples: int,
        total: int,
        batch: int,
        seed: int,
        tag: str,
        micro_batch: int | None = None,
        micro_tokens: int | None = None,
    ):
        if total > MOST:
            raise UserError(
                f"expected at most {MOST:,} windows to train on; found {total:,}: lower --epochs, --steps or --examples"
            )
        chosen = torch.randperm(len(corpus.windows), generator=generator(seed, tag, "choice"))[:examples].tolist()
        self.corpus, self.chosen, self.total, self.batch = corpus, len(chosen), total, batch
        self.seed, self.tag, self.micro_batch, self.micro_tokens = seed, tag, micro_batch, micro_tokens
        self.order: list[int] = []
        while len(self.order) < total:
            epoch = len(self.order) // self.chosen
            permutation = torch.randperm(self.chosen, generator=generator(seed, tag, "epoch", epoch)).tolist()
            self.order += [chosen[index] for index in permutation]
        del self.order[total:]
        self.unique = len(set(self.order))

    @property
    def steps(self) -> int:
        """Optimizer steps to train on all windows."""
        return math.ceil(self.total / self.batch)

    def indices(self, step: int) -> list[int]:
        """The windows of one global batch, as indices into the corpus."""
        return self.order[step * self.batch : (step + 1) * self.batch]

    def tokens(self, step: int) -> int:
        """Real tokens of one global batch."""
        return sum(len(self.corpus.windows[index]) for index in self.indices(step))

    def counted(self, step: int) -> int:
        """Tokens of one global batch that count."""
        return sum(map(self.corpus.counted, self.indices(step)))

    def targets(self, step: int) -> int:
        """Tokens of one global batch whose next token counts."""
        return sum(map(self.corpus.predicted, self.indices(step)))

    def micro_batches(self, step: int, device: torch.device) -> Iterator[Rows]:
        """This rank's micro-batches of one global batch, equally many on every rank.

        A rank with nothing left gets rows without a real token: their forward and backward passes add zero, and a
        sharded model needs every rank in every pass.
        """
        windows, planned, masks = self.indices(step), self.plan(step), self.corpus.masks
        counts = (self.counted(step), self.targets(step), len(windows))
        for first in range(0, len(planned), world_size()):
            turn = first + rank()
            part = planned[turn] if turn < len(planned) else []
            keys = [derive(self.seed, self.tag, step, position) for position in part]
            chosen = [self.corpus.windows[windows[position]] for position in part]
            which = None if masks is None else [masks[windows[position]] for position in part]
            yield pad(chosen, which, keys, device, counts)

    def plan(self, step: int) -> list[list[int]]:
        """The micro-batches of one global batch, as positions in `indices(step)`; rank r takes numbers r, r + W, ...

        Windows of similar length stand together, so that little is padded. The number of ranks has an effect only
        where some rank would otherwise get nothing.
        """
        lengths = [len(self.corpus.windows[index]) for index in self.indices(step)]
        most = min(self.micro_batch or len(lengths), math.ceil(len(lengths) / world_size()))
        planned: list[list[int]] = []
        for position in sorted(range(len(lengths)), key=lambda position: (-lengths[position], position)):
            current = planned[-1] if planned else []
            longest = lengths[current[0]] if current else math.inf
            fits = self.micro_tokens is None or (len(current) + 1) * longest <= self.micro_tokens
            if current and len(current) < most and fits:
                current.append(position)
            else:
                planned.append([position])
        return planned


def pad(
    windows: Sequence[np.ndarray],
    masks: Sequence[np.ndarray] | None,
    keys: Sequence[int],
    device: torch.device,
    counts: tuple[int, int, int],
) -> Rows:
    """Stack windows of different lengths, padded on the right with token 0; without any, one row of padding alone.

    Args:
        masks: which tokens of each count; None: all.
        counts: of the global batch, see `Rows`: N, M and windows.
    """
    longest = max((len(window) for window in windows), default=2)
    input_ids = torch.zeros(max(1, len(windows)), longest, dtype=torch.int64)
    real, followed = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)]
    keys = keys or [0]
    for row, window in enumerate(windows):
        input_ids[row, : len(window)] = torch.tensor(window)
        every = torch.arange(row * longest, row * longest + len(window))
        real.append(every if masks is None else every[np.flatnonzero(masks[row])])
        followed.append(every[:-1] if masks is None else every[np.flatnonzero(masks[row][1:])])
    return Rows(
        sent(input_ids, device),
        sent(torch.cat(real), device),
        sent(torch.cat(followed), device),
        sent(torch.tensor(keys, dtype=torch.int64), device),
        sizes=tuple(map(len, windows)) or (0,),
        host_keys=tuple(keys),
        global_tokens=counts[0],
        global_leading=counts[1],
        global_sequences=counts[2],
    )


def sent(numbers: Tensor, device: torch.device) -> Tensor:
    """`numbers` on the way to `device`; from pageable memory a GPU's stream would have to end first."""
    if device.type != "cpu":
        return numbers.pin_memory().to(device, non_blocking=True)
    return numbers.to(device)


def check_examples(corpus: Corpus, examples: int, batch: int) -> None:
    """Raise unless every rank can have at least one example of `corpus`, and one row of a full global batch."""
    available = min(examples, len(corpus.windows))
    if available < world_size():
        raise UserError(
            f"expected at least one example a rank ({world_size()} ranks); found {available} in {corpus.name}: "
            "use fewer ranks or a larger corpus"
        )
    if batch < world_size():
        raise UserError(f"expected --batch of at least one row a rank ({world_size()} ranks); found {batch}: raise it")
