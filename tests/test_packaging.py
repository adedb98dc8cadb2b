"""The wheel, and what an import needs. Built from a copy of the sources, so that no stale build folder has a say."""

import os
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import wsseg_layers

ROOT = Path(__file__).parents[1]
UNTRACKED = {"__pycache__", "build", "dist", "runs", "site", "wsseg_layers.egg-info"}


def python(code: str, cwd: Path, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints."""
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    sources = tmp_path_factory.mktemp("sources") / "wsseg_layers"
    shutil.copytree(
        ROOT,
        sources,
        symlinks=True,
        ignore=lambda _, names: [name for name in names if name.startswith(".") or name in UNTRACKED],
    )
    wheels = tmp_path_factory.mktemp("wheels")
    python(f"from setuptools import build_meta; build_meta.build_wheel({str(wheels)!r})", cwd=sources)
    (built,) = wheels.glob("*.whl")
    return built


def test_holds_the_library_and_its_kernels_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    library = {f"wsseg_layers/{path.name}" for path in (ROOT / "wsseg_layers").glob("*.py")}
    kernels = {
        f"wsseg_layers/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")
    }
    assert library
    assert kernels
    sources = {f"wsseg_layers/kernels/backends/cpp/{name}.cpp" for name in ("kernels", "lattice")}
    assert shipped == library | kernels | sources | {"wsseg_layers/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "wsseg-layers"
    assert metadata["Version"] == wsseg_layers.__version__
    assert metadata["License-Expression"] == "Apache-2.0"


def test_installed_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "site-packages"
    zipfile.ZipFile(wheel).extractall(installed)
    code = """
import torch, wsseg_layers
from wsseg_layers import GCI, PAMR, PAR, FocalSizePenalty, StochasticGate, nGWPPool
print(wsseg_layers.__file__, wsseg_layers.kernels.__file__, sep="\\n")
PAMR(num_iter=1)(torch.rand(1, 3, 5, 6), torch.rand(1, 2, 5, 6))
"""
    files = python(code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert files == [str(installed / "wsseg_layers" / name) for name in ("__init__.py", "kernels/__init__.py")]


def test_imports_without_triton(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["triton"] = None  # `import triton` now raises ImportError
import torch
from wsseg_layers import PAMR
print(*PAMR(num_iter=1)(torch.rand(1, 3, 5, 6), torch.rand(1, 2, 5, 6)).shape)
"""
    assert python(code, cwd=tmp_path, PYTHONPATH=str(ROOT)) == "1 2 5 6"


def test_import_leaves_triton_and_the_compiler_alone(tmp_path: Path) -> None:
    code = """
import sys
import torch
before = set(sys.modules)
import wsseg_layers
print({"triton", "torch._dynamo", "torch._inductor"} & (set(sys.modules) - before))
"""
    assert python(code, cwd=tmp_path, PYTHONPATH=str(ROOT)) == "set()"
