"""Atomic writing: files and folders appear only when they are complete."""

import csv
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

Write = Callable[[Path], object]  # writes a file or folder to a path


def write_whole(path: Path, write: Write) -> None:
    """Call `write` with a temporary path beside `path`, then rename the file or folder to `path`.

    A reader never sees an incomplete file at `path`. If `write` fails, an earlier file at `path` is kept.

    Raises:
        OSError: the disk is full, a folder is missing, or `path` is a folder that is not empty.
    """
    write_together({path: write})


def write_together(files: Mapping[Path, Write]) -> None:
    """Write files that belong together, as `write_whole` does. The last one stands for all of them.

    All files are written to temporary paths first, so that an error keeps all earlier files. Then the earlier last file
    is deleted, and the new files get their names, the last one at the end. So if the last file exists, the others
    belong to it.
    """
    partials = {path: path.with_name(f".partial_{uuid.uuid4().hex}{path.suffix}") for path in files}
    *others, last = files
    path = last  # the one that an error names
    try:
        for path, write in files.items():
            write(partials[path])
        if others:
            last.unlink(missing_ok=True)
        for path, partial in partials.items():
            os.replace(partial, path)
    except OSError as error:
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        for partial in partials.values():
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_csv_whole(path: Path, lines: Iterable[Sequence[str]]) -> None:
    """Write the lines of a CSV file. Bytes of file names that are not valid UTF-8 are written unchanged."""

    def write(partial: Path) -> None:
        with partial.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            csv.writer(file).writerows(lines)

    write_whole(path, write)
