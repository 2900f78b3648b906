"""Checks that this Triton can compile: a small kernel is compiled for a GPU, which need not be present."""

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def _double_kernel(x, y):
    tl.store(y, 2.0 * tl.load(x))


def compile_for(compute_capability: int) -> int:
    """Compile a kernel for an NVIDIA compute capability, for example 90 (H100, H200); returns the machine code size."""
    source = ASTSource(fn=_double_kernel, signature={"x": "*fp32", "y": "*fp32"}, constexprs={})
    compiled = triton.compile(source, target=GPUTarget("cuda", compute_capability, 32))
    return len(compiled.asm["cubin"])
