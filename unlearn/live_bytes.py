"""Bytes that exist while a computation runs, counted on any tensors, those without data too."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that exist: `live` now, `peak` at most so far.

    A storage is counted from the operation that returns it until it is collected, or resized (as FSDP2 does to free
    what it gathered).
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, tuple[weakref.ref[Any], int]] = {}

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, Tensor) and not leaf.is_meta:
                self.count(leaf)
        return output

    def count(self, tensor: Tensor) -> None:
        """Count a tensor's storage, if it is not counted yet."""
        if isinstance(tensor, DTensor):
            tensor = tensor._local_tensor
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = storage.nbytes()
        self._sizes[key] = (weakref.ref(storage, lambda _: self._forget(key)), size)
        self._add(size)

    def resized(self, storage: torch.UntypedStorage, size: int) -> None:
        """Note that a counted storage now has `size` bytes."""
        key = storage._cdata
        if key in self._sizes:
            reference, before = self._sizes[key]
            self._sizes[key] = (reference, size)
            self._add(size - before)

    def _forget(self, key: int) -> None:
        self.live -= self._sizes.pop(key)[1]

    def _add(self, size: int) -> None:
        self.live += size
        self.peak = max(self.peak, self.live)


@contextmanager
def counting() -> Iterator[LiveBytes]:
    """Count live bytes within the block."""
    original, counter = torch.UntypedStorage.resize_, LiveBytes()

    def resize(storage: torch.UntypedStorage, size: int) -> Any:
        result = original(storage, size)
        counter.resized(storage, size)
        return result

    torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]
    try:
        with counter:
            yield counter
    finally:
        torch.UntypedStorage.resize_ = original  # type: ignore[method-assign]


def as_the_kernel_does(x: Tensor, keys: Tensor, dropout: float) -> Tensor:
    """The memory of `dropped` on a GPU, which stores no mask."""
    return x.clone()
