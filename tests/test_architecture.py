"""What docs/architecture.md says of the sources is true."""

import ast
import importlib.util
import re
from itertools import takewhile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
SOURCES = [*(ROOT / "wsseg_layers").glob("*.py"), *(ROOT / "kernels").rglob("*.py")]


def module_name(path: Path) -> str:
    """Return the name under which a source is imported."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("wsseg_layers", *parts) if parts[0] == "kernels" else parts
    return ".".join(parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Return the names of the modules of the library that a source imports."""
    names = {module_name(source) for source in SOURCES}
    package = module_name(path).split(".")
    package = package if path.name == "__init__.py" else package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            prefix = ".".join([*base, *((node.module or "").split(".") if node.module else [])])
            targets = {f"{prefix}.{alias.name}" for alias in node.names}
            found |= {target if target in names else prefix for target in targets} & names
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & names
    return found


@pytest.fixture(scope="module")
def equations() -> ModuleType:
    spec = importlib.util.spec_from_file_location("equations", ROOT / "docs" / "equations.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_equations_is_that_of_the_sources(equations: ModuleType) -> None:
    assert equations.equation_table() in PAGE.read_text(encoding="utf-8"), "run: python docs/equations.py"


def test_every_backend_cites_its_equations(equations: ModuleType) -> None:
    places = equations.find_citations()
    for folder in ("eager", "cpp", "triton"):
        for equation in (7, 8):
            assert [place for place in places[equation] if f"backends/{folder}/" in place]


def test_every_equation_of_the_method_is_cited(equations: ModuleType) -> None:
    assert set(equations.find_citations()) >= {*range(3, 17), 21, 22, 23}


def test_the_tree_names_files_that_exist() -> None:
    tree = PAGE.read_text(encoding="utf-8").split("```text\n")[1].split("```")[0]
    folder = ROOT
    for line in tree.splitlines():
        for name in takewhile(lambda word: word.endswith((".py", "/")), line.split()):
            if not line.startswith(" "):
                folder = ROOT / name
            known = (folder / name, ROOT / name, ROOT / "kernels" / "backends" / name)
            assert any(path.exists() for path in known), name


def test_no_circular_imports() -> None:
    # A package imports its own modules, and they may import what it is made of: packages are left out.
    graph = {module_name(path): imported(path) for path in SOURCES if path.name != "__init__.py"}
    graph = {name: others & set(graph) for name, others in graph.items()}
    while leaves := [name for name, others in graph.items() if not others]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: others - set(leaves) for name, others in graph.items()}
    assert not graph


def test_backends_know_nothing_of_the_operators() -> None:
    for path in (ROOT / "kernels" / "backends").rglob("*.py"):
        assert "wsseg_layers.kernels.operators" not in imported(path)


def test_the_operators_name_no_backend() -> None:
    source = (ROOT / "kernels" / "operators.py").read_text(encoding="utf-8")
    assert not re.findall(r"[\"'](?:triton|cpp|torch|eager)[\"']", source)
