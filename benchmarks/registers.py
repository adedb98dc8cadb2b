"""Write results/registers.md, what the compilers make of the Triton kernels: `python -m benchmarks.registers`.

No GPU is needed, and every Triton from 3.0 on will do. The same compilations are checked by
tests/kernels/test_triton_compiled.py.
"""

import argparse
import inspect
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton import language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from wsseg_layers.kernels import VARIANTS
from wsseg_layers.kernels.backends.triton import affinities, filters, propagation

RESULT = Path(__file__).resolve().parent / "results/registers.md"
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZES = {"fp32": 4, "fp16": 2, "bf16": 2, "fp64": 8}
DILATIONS = 6  # as in the published PAMR: 48 neighbours


class Usage(NamedTuple):
    """What a kernel uses per thread: registers, and bytes that did not fit into them."""

    registers: int
    spilled: int


def can_link(target: GPUTarget) -> bool:
    """Return whether this Triton makes code for a target. Before 3.5 it links for AMD with TRITON_HIP_LLD_PATH."""
    if target.backend != "hip":
        return True
    from triton.backends.amd.compiler import HIPBackend

    try:
        getattr(HIPBackend, "path_to_rocm_lld", str)()
    except Exception:  # that is what Triton raises
        return False
    return True


def compile_affinity(variant: str, target: GPUTarget) -> Any:
    """Compile the affinity of images in fp32."""
    constants: dict[str, Any] = affinities.launch_config(DILATIONS, VARIANTS[variant])
    pointers = {"image_ptr": "*fp32", "out_ptr": "*fp32", "dilations_ptr": "*i32", "position_ptr": "*fp32"}
    if VARIANTS[variant].position_weight == 0:
        constants["position_ptr"] = None
        del pointers["position_ptr"]
    return compile_kernel(affinities.affinity_kernel, target, pointers, constants)


def compile_propagation(
    channels: int, dtype: str, target: GPUTarget, *, transposed: bool = False, ragged: bool = False
) -> Any:
    """Compile an iteration for masks of `channels` channels. Ragged: every image has its own number of channels."""
    kernel = propagation.transposed_kernel if transposed else propagation.propagate_kernel
    constants: dict[str, Any] = {**propagation.launch_config(channels, ITEMSIZES[dtype], target.warp_size)}
    constants |= {"DTYPE": tl.float64 if dtype == "fp64" else tl.float32}
    pointers = {"rows_ptr": f"*{dtype}", "affinity_ptr": "*fp32", "out_ptr": f"*{dtype}", "dilations_ptr": "*i32"}
    if ragged:
        pointers["counts_ptr"] = "*i64"
    else:
        constants["counts_ptr"] = None
    return compile_kernel(kernel, target, pointers, constants)


def compile_gaussian_sum(channels: int, target: GPUTarget) -> Any:
    """Compile the sums of `bilateral_filter`."""
    types = {**dict.fromkeys(["values_ptr", "image_ptr", "out_ptr"], "*fp32"), "scale_xy": "fp32", "scale_rgb": "fp32"}
    return compile_kernel(filters.gaussian_sum_kernel, target, types, dict(filters.launch_config(channels)))


def compile_kernel(kernel: Any, target: GPUTarget, pointers: dict[str, str], constants: dict[str, Any]) -> Any:
    """Compile a kernel for 16-byte aligned pointers, as PyTorch allocates; what has no type in `pointers` is int32."""
    num_warps = constants.pop("num_warps")
    names = kernel.arg_names
    types = {name: pointers.get(name, "i32") for name in names if name not in constants}
    aligned = [names.index(name) for name, kind in pointers.items() if kind.startswith("*")]
    parameters = inspect.signature(ASTSource).parameters
    if "constexprs" in parameters:  # Triton 3.3 and later
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, "constexpr") for name in names},
            constexprs=constants,
            attrs={(index,): [["tt.divisibility", 16]] for index in aligned},
        )
    else:
        from triton.compiler.compiler import AttrsDescriptor

        if hasattr(AttrsDescriptor, "from_dict"):  # Triton 3.2
            attributes = AttrsDescriptor.from_dict(
                {"arg_properties": {"tt.divisibility": aligned}, "cls": "AttrsDescriptor"}
            )
            source = ASTSource(fn=kernel, signature=types, constants=constants, attrs=attributes)
        else:  # arguments are known by their positions
            source = ASTSource(
                fn=kernel,
                signature={names.index(name): kind for name, kind in types.items()},
                constants={names.index(name): value for name, value in constants.items()},
                attrs=AttrsDescriptor(divisible_by_16=tuple(aligned), equal_to_1=()),
            )
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def usage(compiled: Any) -> Usage:
    """Return registers and spilled bytes as the compiler reports them."""
    if "amdgcn" in compiled.asm:
        report = compiled.asm["amdgcn"]
        spilled = number(r"\.vgpr_spill_count: *", report) + number(r"\.sgpr_spill_count: *", report)
        return Usage(number(r"\.vgpr_count: *", report), 4 * spilled)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        Path(cubin.name).write_bytes(compiled.asm["cubin"])
        report = subprocess.run(
            [CUOBJDUMP, "-res-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    return Usage(number("REG:", report), number("STACK:", report) + number("LOCAL:", report))


def number(label: str, report: str) -> int:
    """Return the number behind a label of a compiler's report."""
    found = re.search(rf"{label}(\d+)", report)
    if found is None:
        raise ValueError(f"no {label!r} in the report of the compiler: {report}")
    return int(found[1])


def assembly(compiled: Any) -> str:
    """Return the text of PTX or of AMD's assembly."""
    return compiled.asm["amdgcn"] if "amdgcn" in compiled.asm else compiled.asm["ptx"]


def exchanges_in_loops(compiled: Any) -> int:
    """Count the instructions in loops by which threads wait for each other or exchange values."""
    exchange = re.compile(r"bar\.|barrier|shfl|\.shared|\bds_|_dpp|permute")
    return sum(bool(exchange.search(line)) for line in lines_in_loops(assembly(compiled).splitlines()))


def lines_in_loops(lines: list[str]) -> list[str]:
    """Return the lines of a kernel's assembly from which the control flow leads back to them."""
    labels = {found[1]: i for i, line in enumerate(lines) if (found := re.match(r"(\$L\w+|\.L\w+):", line))}
    successors: list[list[int]] = []
    for i, line in enumerate(lines):
        jump = re.search(r"\b(?:bra|s_c?branch\w*)\b.*?(\$L\w+|\.L\w+)", line)
        leaves = re.search(r"^\s*(?:bra|s_branch|s_endpgm|ret)\b", line)
        following = [i + 1] if i + 1 < len(lines) and not leaves else []
        successors.append(following + ([labels[jump[1]]] if jump else []))

    def leads_back(start: int) -> bool:
        seen: set[int] = set()
        waiting = successors[start]
        while waiting:
            seen.update(waiting)
            waiting = [after for line in waiting for after in successors[line] if after not in seen]
        return start in seen

    return [line for i, line in enumerate(lines) if leads_back(i)]


def wide_loads(compiled: Any) -> int:
    """Count the loads of 16 bytes from the memory of the device."""
    return len(
        re.findall(r"ld\.global\S*\.v4|ld\.global\S*\.v2\.b64|(?:global|buffer)_load_dwordx4", assembly(compiled))
    )


def main(arguments: list[str] | None = None) -> int:
    """Compile every kernel for every target and write the table. Returns the exit code."""
    parser = argparse.ArgumentParser(description="Tabulate what the compilers make of the Triton kernels.")
    parser.add_argument("--print", action="store_true", help="print the table, and leave the file as it is")
    only_print = parser.parse_args(arguments).print
    rows = {
        f'affinity `"{name}"`': [cell(compile_affinity, name, target) for target in TARGETS.values()]
        for name in VARIANTS
    }
    for transposed, name in ((False, "propagation"), (True, "transposed")):
        for channels, dtype in ((2, "fp32"), (21, "fp32"), (150, "fp32"), (2, "bf16"), (21, "bf16"), (150, "bf16")):
            rows[f"{name}, {channels} channels, {dtype}"] = [
                cell(compile_propagation, channels, dtype, target, transposed=transposed) for target in TARGETS.values()
            ]
    table = "\n".join(
        [
            f"| kernel | {' | '.join(TARGETS)} |",
            "|:--|" + "--:|" * len(TARGETS),
            *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()),
        ]
    )
    text = (
        "Registers per thread, bytes spilled, and instructions in loops by which threads exchange values or wait for\n"
        f"each other. {DILATIONS} dilations; Triton {triton.__version__}, `python -m benchmarks.registers`.\n\n"
        f"{table}\n"
    )
    print(text)
    if not only_print:
        RESULT.write_text(text)
    return 0


def cell(compile_for: Any, *arguments: Any, **options: Any) -> str:
    """Return a cell of the table."""
    if not can_link(arguments[-1]):
        return "no linker"
    compiled = compile_for(*arguments, **options)
    registers, spilled = usage(compiled)
    return f"{registers}, {spilled}, {exchanges_in_loops(compiled)}"


if __name__ == "__main__":
    sys.exit(main())
