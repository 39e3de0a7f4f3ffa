"""One command at a time in a folder."""

import errno
import fcntl
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

from unlearn.errors import UserError
from unlearn.files import writing

LOCK = "lock"  # in the folder of a run, while it lasts
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # what a file system without them answers


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Hold the lock `file` for the length of the block, and remove it afterwards.

    The kernel holds it for this process and gives it back however the process ends; over NFS and Lustre it holds on all
    nodes, if they are mounted with locks. Folders that were made for it go again if nothing else came into them.

    Args:
        what: what would be at work there, e.g. "run".

    Raises:
        UserError: another process holds it.
    """
    made = [folder for folder in file.parents if not folder.exists()]
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = _acquire(file, what)
    try:
        with writing(file):
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}")
            stream.flush()
        yield
    finally:
        if _is(stream, file):  # and not another's, where the folder was deleted meanwhile
            file.unlink()
        stream.close()
        with suppress(OSError):
            for folder in made:
                folder.rmdir()


def _acquire(file: Path, what: str) -> IO[str]:
    """The lock file, open and locked; not one that its holder has just removed."""
    while True:
        with ExitStack() as stack:
            stream = stack.enter_context(file.open("a+", encoding="utf-8"))
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                stream.seek(0)
                raise UserError(
                    f"expected no {what} at work in {file.parent}; found one ({stream.read() or 'just started'}): wait "
                    "for its end, or choose another folder"
                ) from None
            except OSError as error:
                if error.errno not in _NO_LOCKS:
                    raise
                print(
                    f"warning: expected a file system with locks for {file.parent}; found none: start nothing else "
                    "that writes there",
                    file=sys.stderr,
                )
            if _is(stream, file):
                stack.pop_all()
                return stream


def _is(stream: IO[str], file: Path) -> bool:
    """Whether an open file still bears this name."""
    return file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat())
