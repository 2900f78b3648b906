"""The ways that the kernels of transformer blocks are compiled, for ``bench_kernels``."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from triton.compiler import ASTSource

from mc2_hpc.kernels.layer_norm import MOST_FUSED_COLUMNS
from mc2_hpc.kernels.layer_norm import triton_impl as layer_norm
from mc2_hpc.kernels.layer_norm.launch import launch_for
from mc2_hpc.kernels.quick_gelu import triton_impl as quick_gelu
from mc2_hpc.kernels.split_qkv import triton_impl as split_qkv

WIDTHS = (1280, 1024, 5120, 1000)
"""Of ViT-H/14's towers; its MLP's, as a wide row; and one that is no multiple of 16."""

KERNELS = {
    "layer_norm_forward": layer_norm.forward_kernel,
    "layer_norm_backward": layer_norm.backward_kernel,
    "add_layer_norm_forward": layer_norm.forward_kernel,
    "add_layer_norm_backward": layer_norm.backward_kernel,
    "add_norm_linear_backward": layer_norm.backward_kernel,
    "quick_gelu_forward": quick_gelu.forward_kernel,
    "quick_gelu_backward": quick_gelu.backward_kernel,
    "quick_gelu_linear_backward": quick_gelu.backward_kernel,
    "split_qkv_backward": split_qkv.backward_kernel,
}
_ADDITION = ("added_ptr", "sum_ptr", "dsum_ptr")
_FP32 = (
    *("weight_ptr", "bias_ptr", "mean_ptr", "scale_ptr", "dweight_ptr", "dbias_ptr"),
    *("dx_sum_ptr", "dqkv_sum_ptr"),
)


@dataclass(frozen=True)
class Launch:
    """Launch parameters of an elementwise kernel."""

    BLOCK: int
    """Values of a program, or of one of its steps over rows."""
    num_warps: int
    num_stages: int = 3
    """Triton's default."""


@dataclass(frozen=True)
class ElementwiseCase:
    """One way a kernel of a block is compiled."""

    name: str
    arch: int
    dtype: str
    width: int
    """Of the rows."""

    @property
    def kernel(self) -> str:
        return self.name

    @property
    def variant(self) -> str:
        return f"{self.dtype}-{self.width}" if _of_rows(self.name) else self.dtype

    @property
    def launch(self) -> Launch:
        if _of_rows(self.name):
            launch = launch_for(self.width)
            return Launch(launch.BLOCK, launch.num_warps)
        if self.name == "quick_gelu_forward":
            return Launch(quick_gelu.BLOCK, quick_gelu.NUM_WARPS)
        module = split_qkv if self.name.startswith("split_qkv") else quick_gelu
        return Launch(module.ROWS * module.COLUMNS, module.NUM_WARPS)

    def compile_source(self) -> ASTSource:
        """The kernel with the argument types of a launch on aligned tensors and fp32 parameters."""
        kernel = KERNELS[self.name]
        adds, linear = self.name.startswith("add"), "linear" in self.name
        constants: dict[str, Any] = {"BLOCK": self.launch.BLOCK, "PARAMETERS": True, "ADDED": adds}
        constants |= {"ROWS": quick_gelu.ROWS, "COLUMNS": quick_gelu.COLUMNS}
        constants |= {"NORMALISES": linear, "VALUES": linear, "SUMS": linear or self.name.startswith("split_qkv")}
        if not adds:
            constants |= dict.fromkeys(_ADDITION)
        if self.name.endswith("backward") and not linear:
            constants["y_ptr"] = None
        signature, constexprs, aligned = {}, {}, {}
        for index, argument in enumerate(kernel.arg_names):
            if argument in constants:
                signature[argument] = "constexpr"
                constexprs[(index,)] = constants[argument]
            elif argument.endswith("_ptr"):
                signature[argument] = "*fp32" if argument in _FP32 else f"*{self.dtype}"
            else:
                signature[argument] = "fp32" if argument == "eps" else "i32"
            if (argument.endswith("_ptr") and argument not in constants) or (
                argument == "width" and self.width % 16 == 0
            ):
                aligned[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(kernel, signature, constexprs, aligned)


def _of_rows(name: str) -> bool:
    """Whether a program has whole rows, so that it depends on their width."""
    return "norm" in name


def fused_cases(architectures: tuple[int, ...], quick: bool) -> Iterator[ElementwiseCase]:
    """Every kernel on every architecture; ``quick`` keeps bf16 and the image tower's width."""
    for name in KERNELS:
        for arch in architectures:
            for dtype in ("bf16",) if quick else ("bf16", "fp16", "fp32"):
                for width in WIDTHS[:1] if quick or not _of_rows(name) else WIDTHS:
                    if name.startswith("add_norm_linear"):
                        width = min(width, MOST_FUSED_COLUMNS)
                    yield ElementwiseCase(name, arch, dtype, width)
