"""What the compilers make of the Triton kernels, which needs no GPU: no spills, wide loads."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from wsseg_layers.kernels import VARIANTS  # noqa: E402
from wsseg_layers.kernels.backends.triton import affinities, filters, propagation  # noqa: E402

DILATIONS = (1, 2, 4, 8, 12, 24)
TARGETS = [GPUTarget("cuda", 80, 32), GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)]
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compile_for(target: GPUTarget, kernel: Any, dtype: str, sizes: list[str], config: dict[str, Any]) -> Any:
    """Compile a kernel whose first three arguments are pointers, all aligned as PyTorch's allocations are."""
    num_warps = config.pop("num_warps")
    names = kernel.arg_names
    pointers = dict.fromkeys(names[:3] if "affinity" in names else names[:2], f"*{dtype}")
    pointers |= {"affinity": "*fp32"} if "affinity" in names else {"out": "*fp32"}
    signature = pointers | dict.fromkeys(sizes, "i32") | dict.fromkeys(config, "constexpr")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(fn=kernel, signature=signature, constexprs=config, attrs=aligned)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def assert_no_spills(compiled: Any, target: GPUTarget, tmp_path: Path) -> None:
    if target.backend == "hip":
        assert re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]) == ["0", "0"]
        return
    if not CUOBJDUMP.exists():
        pytest.skip("this triton comes without cuobjdump")
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run([CUOBJDUMP, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_affinity(variant: str, target: GPUTarget, tmp_path: Path) -> None:
    config = affinities.launch_config(DILATIONS, VARIANTS[variant])
    sizes = ["channels", "height", "width"]
    compiled = compile_for(target, affinities.affinity_kernel, "fp32", sizes, config)
    assert_no_spills(compiled, target, tmp_path)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize(
    ("transposed", "channels", "dtype"), [(False, 21, "fp32"), (False, 150, "bf16"), (True, 21, "fp32")]
)
def test_propagation(transposed: bool, channels: int, dtype: str, target: GPUTarget, tmp_path: Path) -> None:
    itemsize = 4 if dtype == "fp32" else 2
    config = {
        "DILATIONS": DILATIONS,
        "DTYPE": tl.float32,
        **({"REACH": max(DILATIONS)} if transposed else {}),
        **propagation.launch_config(channels, itemsize),
    }
    kernel = propagation.transposed_kernel if transposed else propagation.propagate_kernel
    compiled = compile_for(target, kernel, dtype, ["height", "width"], config)
    assert_no_spills(compiled, target, tmp_path)
    # The loop's body holds the 8 neighbours of one dilation. What is not wide is the affinity, one value a neighbour.
    if target.backend == "hip":
        assert len(re.findall(r"(?:global|buffer)_load_dwordx4", compiled.asm["amdgcn"])) >= 8
    else:
        assert len(re.findall(r"ld\.global\S*\.v4", compiled.asm["ptx"])) >= 8


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: str(target.arch))
@pytest.mark.parametrize("channels", [3, 21])
def test_gaussian_sum(channels: int, target: GPUTarget, tmp_path: Path) -> None:
    config = filters.launch_config(channels)
    num_warps = config.pop("num_warps")
    kernel = filters.gaussian_sum_kernel
    pointers = dict.fromkeys(["values", "image", "out"], "*fp32")
    sizes = dict.fromkeys(["channels", "height", "width"], "i32") | dict.fromkeys(["scale_xy", "scale_rgb"], "fp32")
    source = ASTSource(
        fn=kernel,
        signature=pointers | sizes | dict.fromkeys(config, "constexpr"),
        constexprs=config,
        attrs={(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )
    assert_no_spills(triton.compile(source, target=target, options={"num_warps": num_warps}), target, tmp_path)
