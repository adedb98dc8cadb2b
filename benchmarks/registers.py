"""Write results/registers.md, what the compilers make of the Triton kernels: `python -m benchmarks.registers`.

No GPU is needed. The same compilations are checked by tests/kernels/test_triton_compiled.py.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget

from tests.kernels.test_triton_compiled import CUOBJDUMP, DILATIONS, TARGETS, compile_for
from wsseg_layers.kernels import VARIANTS
from wsseg_layers.kernels.backends.triton import affinities, propagation

RESULT = Path(__file__).resolve().parent / "results/registers.md"
PROPAGATIONS = [
    (21, "fp32", False),
    (150, "fp32", False),
    (150, "bf16", False),
    (21, "fp32", True),
    (150, "bf16", True),
]


def main() -> int:
    """Compile every kernel for every target and write the table. Returns the exit code."""
    lines = {f'affinity `"{variant}"`': affinity_usage(variant) for variant in VARIANTS}
    for channels, dtype, transposed in PROPAGATIONS:
        name = f"{'transposed' if transposed else 'propagation'}, {channels} channels, {dtype}"
        lines[name] = propagation_usage(channels, dtype, transposed)
    header = "| kernel | " + " | ".join(f"{'sm_' * isinstance(t.arch, int)}{t.arch}" for t in TARGETS) + " |"
    table = "\n".join(
        [header, "|:--|" + "--:|" * len(TARGETS), *(f"| {n} | {' | '.join(u)} |" for n, u in lines.items())]
    )
    RESULT.write_text(
        f"Registers a thread and, after a comma, bytes spilled, for {len(DILATIONS)} dilations; Triton"
        f" {triton.__version__}, `python -m benchmarks.registers`.\n\n{table}\n"
    )
    print(RESULT.read_text())
    return 0


def affinity_usage(variant: str) -> list[str]:
    """Return what the affinity's kernel uses on every target."""
    sizes = ["channels", "height", "width"]
    kernel = affinities.affinity_kernel
    return [usage(kernel, "fp32", sizes, affinities.launch_config(DILATIONS, VARIANTS[variant]), t) for t in TARGETS]


def propagation_usage(channels: int, dtype: str, transposed: bool) -> list[str]:
    """Return what the propagation's kernel uses on every target."""
    config = {
        "DILATIONS": DILATIONS,
        "DTYPE": tl.float32,
        **({"REACH": max(DILATIONS)} if transposed else {}),
        **propagation.launch_config(channels, itemsize=4 if dtype == "fp32" else 2),
    }
    kernel = propagation.transposed_kernel if transposed else propagation.propagate_kernel
    return [usage(kernel, dtype, ["height", "width"], dict(config), target) for target in TARGETS]


def usage(kernel: Any, dtype: str, sizes: list[str], config: dict[str, Any], target: GPUTarget) -> str:
    """Return registers and spilled bytes as the compiler reports them."""
    compiled = compile_for(target, kernel, dtype, sizes, config)
    if target.backend == "hip":
        report = compiled.asm["amdgcn"]
        return f"{number('vgpr_count: *', report)}, {4 * number('vgpr_spill_count: *', report)}"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        report = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return f"{number('REG:', report)}, {number('LOCAL:', report)}"


def number(label: str, report: str) -> int:
    """Return the number behind a label of a compiler's report."""
    found = re.search(rf"\b{label}(\d+)", report)
    if found is None:
        raise ValueError(f"no {label!r} in the report of the compiler: {report}")
    return int(found[1])


if __name__ == "__main__":
    sys.exit(main())
