"""The source distribution and the wheel for every machine, what an import needs, and the files about the project."""

import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import wsseg_layers
from tests.checkout import ROOT, copy_sources, python, run
from wsseg_layers.kernels.backends.cpp import library as cpp_library

BACKENDS = "wsseg_layers/kernels/backends"


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("setuptools", minversion="77", reason="the build backend is not installed")
    sources = copy_sources(tmp_path_factory.mktemp("sources") / "checkout")
    folder = tmp_path_factory.mktemp("sdist")
    python(f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})", cwd=sources)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    shutil.unpack_archive(sdist, sdist.parent)
    return sdist.with_name(sdist.name.removesuffix(".tar.gz"))


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    python(f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})", cwd=unpacked)
    (built,) = folder.iterdir()
    return built


def test_the_source_distribution_is_complete(sdist: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    tracked = {name for name in listed.splitlines() if (ROOT / name).exists()}
    with tarfile.open(sdist) as archive:
        files = {member.name.partition("/")[2] for member in archive if not member.isdir()}
        assert not [member.name for member in archive if member.issym()]
    assert tracked - files == {".gitignore", "wsseg_layers/kernels"}
    assert {name for name in files - tracked if ".egg-info/" not in name} == {"PKG-INFO"}


def test_its_tests_run(unpacked: Path) -> None:
    # Quick ones; .ci/run runs all of them in a clone.
    tests = ("tests/test_size_penalty.py", "tests/test_ngwp.py")
    assert " passed" in run(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, cwd=unpacked)


def test_works_where_symlinks_are_plain_files(tmp_path: Path) -> None:
    """Git makes such a checkout on Windows, and with core.symlinks=false."""
    checkout = copy_sources(tmp_path / "checkout")
    link = checkout / "wsseg_layers" / "kernels"
    if link.is_symlink():  # not in an unpacked source distribution
        link.unlink()
    link.write_text("../kernels")
    code = "from wsseg_layers import kernels; print(kernels.__name__, kernels.__file__)"
    assert python(code, cwd=checkout) == f"wsseg_layers.kernels {checkout / 'kernels' / '__init__.py'}"


def test_holds_the_library_and_its_kernels_and_nothing_else(wheel: Path) -> None:
    assert wheel.name == f"wsseg_layers-{wsseg_layers.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    shipped = {name for name in names if ".dist-info/" not in name}
    library = {f"wsseg_layers/{path.name}" for path in (ROOT / "wsseg_layers").glob("*.py")}
    kernels = {
        f"wsseg_layers/kernels/{path.relative_to(ROOT / 'kernels').as_posix()}"
        for path in (ROOT / "kernels").rglob("*.py")
    }
    assert library
    assert kernels
    sources = {f"{BACKENDS}/cpp/{source.name}" for source in (*cpp_library.SOURCES, *cpp_library.HEADERS)}
    assert shipped == library | kernels | sources | {"wsseg_layers/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_metadata(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(archive.read(name).decode())
    assert metadata["Name"] == "wsseg-layers"
    assert metadata["Version"] == wsseg_layers.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist") or [] if "extra ==" not in line]
    assert [re.split("[<>=;]", line)[0] for line in required] == ["torch", "numpy"]
    assert {line.partition(",")[0] for line in metadata.get_all("Project-URL") or []} >= {"Repository", "Changelog"}


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


def test_the_version_is_the_same_everywhere() -> None:
    version = wsseg_layers.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    sections = re.findall(r"^## \[(.+?)\](?: - \d{4}-\d\d-\d\d)?$", changelog, re.MULTILINE)
    assert sections[:2] == ["Unreleased", version]
    assert re.findall(r"^\[(.+?)\]: https://", changelog, re.MULTILINE) == sections


def test_workflows() -> None:
    actionlint = shutil.which("actionlint", path=Path(sys.executable).parent) or shutil.which("actionlint")
    if actionlint is None:
        pytest.skip("actionlint is not installed")
    workflows = sorted((ROOT / ".github/workflows").glob("*.yml"))
    assert [path.name for path in workflows] == ["ci.yml", "release.yml"]
    assert run(actionlint, "-no-color", *workflows, cwd=ROOT) == ""


def test_pages_need_no_network(tmp_path: Path) -> None:
    for package in ("sphinx", "furo", "myst_parser", "math_core", "ziamath"):
        pytest.importorskip(package, reason="the extra docs is not installed")
    pages = tmp_path / "pages"
    run(sys.executable, "-m", "sphinx", "-W", "-q", ROOT / "docs", pages, cwd=tmp_path, PYTHONPATH=str(ROOT))
    for page in pages.rglob("*.html"):
        html = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|iframe)[^>]* src=\"(?:https?:)?//[^\"]*", html), page
        assert not re.findall(r"<link rel=\"(?:stylesheet|preload)[^>]* href=\"(?:https?:)?//[^\"]*", html), page
        assert "\\(" not in html, f"{page} shows TeX"
    assert (pages / "layers/pamr.html").read_text(encoding="utf-8").count('<math display="block"') >= 2
    assert (pages / "_static/STIXTwoMath-Regular.ttf").exists()
