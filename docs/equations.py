"""Find the lines that compute equations of the paper: `python docs/equations.py` rewrites the table of architecture.md.

A line counts if a comment behind its code cites an equation: `x = f(y)  # eq. 3` in Python, `// eq. 3` in C++.
"""

import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
FOLDERS = ("wsseg_layers", "kernels", "examples")
START, END = "<!-- equations -->\n", "<!-- end of equations -->"

CITATION = re.compile(r"\S.*?(?:  #|//|(?<=[;{]) //)\s*(.*\beqs?\.\s*.*)$")
NUMBERS = re.compile(r"\beqs?\. (\d+)(?:(?:-| to )(\d+))?((?:,? and \d+|, \d+)*)")

TITLES = {
    1: "CAM: class score by global average pooling (GAP)",
    2: "CAM: mask of a class",
    3: "normalised global weighted pooling (nGWP)",
    4: "size penalty",
    5: "focal size penalty",
    6: "classification loss",
    7: "PAMR, propagation",
    8: "PAMR, affinity",
    9: "stochastic gate, training",
    10: "stochastic gate, evaluation",
    11: "global cue injection",
    12: "classification loss, as eq. 6",
    13: "class score: nGWP plus focal size penalty",
    14: "nGWP, as eq. 3",
    15: "focal size penalty, as eq. 5",
    16: "mean of a mask",
    21: "segmentation loss of a pixel",
    22: "weight of a class in the segmentation loss",
    23: "segmentation loss of a batch",
}


def cited(comment: str) -> list[int]:
    """Return the numbers of the equations that a comment cites."""
    numbers: list[int] = []
    for first, last, others in NUMBERS.findall(comment):
        numbers += range(int(first), int(last or first) + 1)
        numbers += map(int, re.findall(r"\d+", others))
    return numbers


def find_citations() -> dict[int, list[str]]:
    """Return the places, `file:line`, of every equation."""
    places: dict[int, list[str]] = defaultdict(list)
    files = [
        path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in (".py", ".cpp")
    ]
    for path in files:
        if "wsseg_layers/kernels/" in path.as_posix():  # the symlink
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            match = CITATION.match(line.strip())
            if match and not line.strip().startswith(("#", "//")):
                for equation in cited(match[1]):
                    places[equation].append(f"{path.relative_to(ROOT).as_posix()}:{number}")
    return dict(sorted(places.items()))


def equation_table() -> str:
    """Return the table in Markdown: one row per line of code."""
    rows = ["| equation | computes | line |", "|:--|:--|:--|"]
    for equation, (first, *others) in find_citations().items():
        rows.append(f"| {equation} | {TITLES[equation]} | `{first}` |")
        rows += [f"| | | `{place}` |" for place in others]
    return "\n".join(rows) + "\n"


def main() -> None:
    """Rewrite the table in the page."""
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(START)
    _, after = rest.split(END)
    PAGE.write_text(f"{before}{START}\n{equation_table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
