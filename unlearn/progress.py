"""Progress bars: on rank 0 alone, and none where TQDM_DISABLE is set in the environment."""

import os
from typing import Any

from tqdm import tqdm

from unlearn.distributed import is_main


def progress(
    total: int, title: str, unit: str, *, initial: int = 0, shown: bool = True, leave: bool = False
) -> "tqdm[Any]":
    """A bar of `total` units, `initial` of them done before, with rate and time left, on standard error; it goes when
    it is done unless it may `leave` itself."""
    hidden = not (shown and is_main()) or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    return tqdm(total=total, initial=initial, desc=title, unit=unit, leave=leave, disable=hidden, dynamic_ncols=True)
