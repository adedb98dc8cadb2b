"""Claims: the exclusive right of a process to write the outputs of an image.

A claim is a locked file. The operating system releases the lock when the process ends, also if it is killed, so no
stale claim remains.
"""

import errno
import os
import sys
from pathlib import Path

if sys.platform != "win32":
    import fcntl

CLAIMS = ".claims"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # from file systems without locks


class Claim:
    """An open file with a lock. On systems without locks, there is no file."""

    def __init__(self, path: Path | None = None, file: int | None = None) -> None:
        self.path = path
        self.file = file

    def release(self) -> None:
        """Delete the file, then release its lock. A second call does nothing."""
        if self.path is not None and self.file is not None:
            file, self.file = self.file, None
            self.path.unlink(missing_ok=True)
            os.close(file)


def claim_outputs(folder: Path, name: str) -> Claim | None:
    """Return a claim on the outputs of the image `name` in `folder`, or None if another process has it.

    On Windows and on file systems without locks every claim succeeds.
    """
    if sys.platform == "win32":
        return Claim()
    path = folder / CLAIMS / f"{name}.png"  # no longer than the name of the mask
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_file_at(file, path):
                return Claim(path, file)
        except BlockingIOError:
            os.close(file)
            return None
        except OSError as error:
            os.close(file)
            if error.errno not in NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return Claim()
        os.close(file)  # another process deleted the file between its opening and its locking


def is_file_at(file: int, path: Path) -> bool:
    """Return whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
