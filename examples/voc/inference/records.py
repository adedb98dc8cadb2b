"""Records in mask files. A record says how the mask was made, so that a second run skips finished images."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

FIELD = "infer_voc"  # of the PNG's text


class Record(NamedTuple):
    """A key of the network, the image and the arguments that made a mask; the probability of each class."""

    key: str
    probabilities: Sequence[float]

    def text(self) -> dict[str, str]:
        """Return the text for the mask's PNG."""
        return {FIELD: json.dumps({"key": self.key, "probabilities": list(self.probabilities)})}


def read_record(path: Path) -> Record | None:
    """Return the record in a mask file, or None if there is no such file or no record in it."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            content = json.loads(image.info[FIELD])
        return Record(str(content["key"]), [float(value) for value in content["probabilities"]])
    except Exception:  # Pillow raises nearly anything for a damaged file
        return None


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def image_key(common: Mapping[str, Any], path: Path, labels: frozenset[int] | None) -> str:
    """Return a key that changes with the arguments in `common`, the image file, and its labels."""
    stat = path.stat()
    values = {
        **common,
        "image": [stat.st_size, stat.st_mtime_ns],
        "labels": None if labels is None else sorted(labels),
    }
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()
