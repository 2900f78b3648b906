"""A custom kernel: QuickGELU (``x * sigmoid(1.702 * x)``, as in OpenAI's CLIP) in one pass over memory.

    python examples/kernel.py        # on a GPU; elsewhere in Triton's interpreter

It has the same four parts as a folder in ``kernels/ops``: a float64 reference, the Triton kernels, the autograd
function, and a check of the value and the gradient for odd sizes.
"""

import os

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if DEVICE.type == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

_BLOCK = 1024


def reference(x: torch.Tensor) -> torch.Tensor:
    """QuickGELU in float64."""
    return x.double() * torch.sigmoid(1.702 * x.double())


@triton.jit
def _forward(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    tl.store(y_ptr + at, x / (1 + tl.exp(-1.702 * x)), mask=at < n)


@triton.jit
def _backward(x_ptr, dy_ptr, dx_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < n).to(tl.float32)
    gate = 1 / (1 + tl.exp(-1.702 * x))
    slope = gate * (1 + 1.702 * x * (1 - gate))
    tl.store(dx_ptr + at, tl.load(dy_ptr + at, mask=at < n).to(tl.float32) * slope, mask=at < n)


class QuickGELU(torch.autograd.Function):
    """Saves only its input for backward, where eager PyTorch saves three tensors."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        y = torch.empty_like(x)
        _forward[(triton.cdiv(x.numel(), _BLOCK),)](x, y, x.numel(), BLOCK=_BLOCK)
        return y

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        dx = torch.empty_like(x)
        _backward[(triton.cdiv(x.numel(), _BLOCK),)](x, dy.contiguous(), dx, x.numel(), BLOCK=_BLOCK)
        return dx


def largest_error(shape: tuple[int, ...]) -> float:
    """The largest difference between value or gradient and the reference."""
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    y, expected = QuickGELU.apply(x), reference(exact)
    weights = torch.randn_like(y)
    y.backward(weights)
    expected.backward(weights.double())
    return max((y - expected).abs().max().item(), (x.grad - exact.grad).abs().max().item())


def main() -> None:
    for shape in ((1,), (1023,), (7, 129), (3, 5, 1025)):
        error = largest_error(shape)
        print(f"{shape}: largest error {error:.1e}")
        assert error < 1e-5


if __name__ == "__main__":
    main()
