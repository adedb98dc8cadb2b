"""The files of examples/: small, and without circles between packages."""

import ast
from collections.abc import Iterator
from pathlib import Path

import voc

ROOT = Path(voc.__file__).parent


def imports(path: Path) -> Iterator[str]:
    """Yield the packages (below voc, "" for voc itself) from which a file imports."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            module = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
            names = [(*module, alias.name) for alias in node.names] if node.module is None else [module]
            for name in names:
                yield next((part for part in name[:1] if part and (ROOT / part).is_dir()), "")


def test_no_circular_imports_between_packages() -> None:
    graph: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        package = "".join(path.relative_to(ROOT).parts[:-1])
        graph.setdefault(package, set()).update(set(imports(path)) - {package})
    assert {"", "backbones", "dataset", "evaluation", "files", "inference", "train"} <= set(graph)
    while graph:
        leaves = {package for package, others in graph.items() if not others & set(graph)}
        assert leaves, f"a circle among {graph}"
        graph = {package: others for package, others in graph.items() if package not in leaves}


def test_no_file_is_long() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    lengths |= {path.name: len(path.read_text().splitlines()) - 50 for path in ROOT.parent.glob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 250} == {}
