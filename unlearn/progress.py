"""Progress bars: on rank 0 alone, and none where TQDM_DISABLE is set in the environment."""

import os
from typing import Any

from tqdm import tqdm

from unlearn.distributed import is_main


def progress(
    total: int | None,
    title: str,
    unit: str,
    *,
    initial: int = 0,
    shown: bool = True,
    leave: bool = False,
    delay: float = 0.0,
) -> "tqdm[Any]":
    """A bar of `total` units, `initial` of them done before, with rate and time left, on standard error; it goes when
    it is done unless it may `leave` itself.

    Args:
        total: None where nobody knows: then without the time left.
        delay: seconds before it shows.
    """
    hidden = not (shown and is_main()) or os.environ.get("TQDM_DISABLE", "0") not in ("", "0")
    how = {"leave": leave, "delay": delay, "disable": hidden, "dynamic_ncols": True}
    return tqdm(total=total, initial=initial, desc=title, unit=unit, **how)
