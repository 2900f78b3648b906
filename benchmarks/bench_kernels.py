"""Compile every Triton kernel in the dispatch tables, for GPUs that need not be present, and check the machine code.

    mc2 bench kernels [--quick] [--json FILE]

Prints a row for each kernel, variant and architecture: registers per thread, spills (loads from and stores to local
memory in the machine code), shared memory, and the tensor-core instruction. Exits with 1 on a breach: any spill, more
shared memory than a block may use, or a matrix kernel without tensor-core instructions.
"""

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.fused_kernel_cases import ElementwiseCase, fused_cases
from benchmarks.harness import Rows, main
from mc2_hpc.kernels.contrastive import triton_distillation, triton_impl, triton_sigmoid
from mc2_hpc.kernels.contrastive.launch import LAUNCHES, Launch, launch_for

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
"""Shared memory limit of a block, by architecture (CUDA C++ Programming Guide, table of compute capabilities)."""

TENSOR_CORE = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA"}
"""The instruction that a half-precision matrix kernel must use, by architecture."""

KERNELS = {
    "statistics": triton_impl.statistics_kernel,
    "gradient": triton_impl.gradient_kernel,
    "distilled_statistics": triton_distillation.distilled_statistics_kernel,
    "distilled_gradient": triton_distillation.distilled_gradient_kernel,
    "sigmoid_statistics": triton_sigmoid.sigmoid_statistics_kernel,
    "sigmoid_gradient": triton_sigmoid.sigmoid_gradient_kernel,
}

MOST_PROCESSES = 8
"""That compile at once, of the cores there are."""
WIDTHS = ("width", "teacher_width")
EVEN_WIDTH, UNEVEN_WIDTH = 1024, 1000
FP16_GRADIENT_SCALE = 2.0**14


@dataclass(frozen=True)
class Case:
    """One way a kernel is compiled."""

    kernel: str
    source: str
    arch: int
    dtype: str
    width: int

    @property
    def variant(self) -> str:
        return f"{self.source}-{self.dtype}{'' if self.width == EVEN_WIDTH else '-uneven'}"

    @property
    def launch(self) -> Launch:
        return launch_for(self.kernel, self.source, self.arch)


def cases(quick: bool) -> Iterator[Case]:
    """Every entry of the tables on every architecture that supports it; ``quick`` keeps those used in bf16 training."""
    for kernel, source in LAUNCHES:
        for arch in SHARED_BYTES:
            if source == "descriptor" and arch < 90:
                continue
            if quick and source != ("descriptor" if arch >= 90 else "pointer"):
                continue
            dtypes = ("bf16",) if quick else ("bf16", "fp16", "fp32") if source == "memory" else ("bf16", "fp16")
            for dtype in dtypes:
                if kernel.endswith("statistics") and source == "memory" and dtype != "fp32" and not quick:
                    continue  # reads and writes fp32 whatever the type of the features
                for width in (EVEN_WIDTH, UNEVEN_WIDTH) if source == "pointer" and not quick else (EVEN_WIDTH,):
                    yield Case(kernel, source, arch, dtype, width)


def compile_source(case: Case) -> ASTSource:
    """The kernel with the argument types and constants of a launch on aligned tensors."""
    kernel, launch = KERNELS[case.kernel], case.launch
    features = {
        "descriptor": lambda rows: f"tensordesc<{case.dtype}[{rows}, {launch.BLOCK_K}]>",
        "pointer": lambda rows: f"*{case.dtype}",
        "memory": lambda rows: "constexpr",
    }[case.source]
    dots = "*fp32" if case.source == "memory" else "constexpr"
    special = {
        "images": features(launch.BLOCK_M),
        "texts": features(launch.BLOCK_N),
        "dots_ptr": dots,
        "teacher_images": features(launch.BLOCK_M),
        "teacher_texts": features(launch.BLOCK_N),
        "teacher_dots_ptr": dots,
        "teacher_scale": "fp32",
        "share": "fp32",
        "grad_ptr": f"*{case.dtype}",
    }
    constants: dict[str, Any] = dict(launch.constants(case.width, case.source))
    if case.kernel.startswith("distilled"):
        constants["TEACHER_EVEN_K"] = constants["EVEN_K"]
    if case.kernel.endswith("gradient"):
        constants["GRADIENT_SCALE"] = FP16_GRADIENT_SCALE if case.dtype == "fp16" else 1.0

    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        default = "*fp32" if name.endswith("_ptr") else "constexpr" if name in constants else "i32"
        signature[name] = special.get(name, default)
        if signature[name] == "constexpr":
            constants.setdefault(name, None)
        if signature[name].startswith("*") or name == "stride" or (name in WIDTHS and case.width == EVEN_WIDTH):
            aligned[(index,)] = [["tt.divisibility", 16]]
    constexprs = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return ASTSource(kernel, signature, constexprs, aligned)


def examine(case: Case | ElementwiseCase) -> dict[str, Any]:
    """Compile a case and read its machine code."""
    source = compile_source(case) if isinstance(case, Case) else case.compile_source()
    options = {"num_warps": case.launch.num_warps, "num_stages": case.launch.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        usage = _cuobjdump("--dump-resource-usage", cubin.name)
        instructions = _cuobjdump("--dump-sass", cubin.name)
    registers = re.search(r"REG:(\d+)", usage)
    if registers is None:
        raise RuntimeError(f"cuobjdump reports no register count for {case}: {usage!r}")
    tensor_core = re.search(rf"\b{TENSOR_CORE[case.arch]}\b", instructions)
    return {
        "kernel": f"contrastive_{case.kernel}" if isinstance(case, Case) else case.kernel,
        "variant": case.variant,
        "arch": f"sm_{case.arch}",
        "registers": int(registers[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", instructions)),
        "shared_bytes": compiled.metadata.shared,
        "tensor_core": tensor_core[0] if tensor_core else None,
        "launch": str(case.launch),
    }


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([str(tool), option, path], capture_output=True, text=True, timeout=120, check=True).stdout


def breaches(row: dict[str, Any], case: Case | ElementwiseCase) -> list[str]:
    """The problems of a row, if any."""
    where = f"{row['kernel']} {row['variant']} {row['arch']}"
    found = []
    if row["spills"]:
        found.append(f"{where}: {row['spills']} register spills: use smaller blocks or more warps")
    if row["shared_bytes"] > SHARED_BYTES[case.arch]:
        found.append(f"{where}: {row['shared_bytes']} bytes of shared memory, the limit is {SHARED_BYTES[case.arch]}")
    if isinstance(case, Case) and case.source != "memory" and row["tensor_core"] is None:
        found.append(f"{where}: no {TENSOR_CORE[case.arch]} instruction: the matrix product does not use tensor cores")
    return found


def run(quick: bool) -> dict[str, Any]:
    """Rows and breaches of every case."""
    if triton.knobs.runtime.interpret:
        raise SystemExit("bench kernels compiles kernels, which TRITON_INTERPRET=1 prevents: unset it")
    rows, found = Rows(), []
    every: list[Case | ElementwiseCase] = [*cases(quick), *fused_cases(tuple(SHARED_BYTES), quick)]
    processes = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    # Forked: this process has no threads yet, and a new one would spend longer on imports than on several kernels.
    with ProcessPoolExecutor(processes, get_context("fork")) as pool:
        for case, row in zip(every, pool.map(examine, every), strict=True):
            rows.append(row)
            found += breaches(row, case)
    return {"config": {"shared_bytes": SHARED_BYTES}, "rows": rows, "ratios": {}, "breaches": found}


if __name__ == "__main__":
    found: list[str] = []

    def run_and_keep(quick: bool) -> dict[str, Any]:
        result = run(quick)
        found.extend(result["breaches"])
        return result

    main("kernels", run_and_keep)
    for breach in found:
        print(f"breach: {breach}", file=sys.stderr)
    sys.exit(1 if found else 0)
