"""Numbers on their way from the device: copied while training continues, read when they are needed."""

import torch
from torch import Tensor


class HostCopy:
    """A copy of a small tensor in host memory, started now and read later.

    On a GPU the copy goes to pinned memory and queues behind the kernels launched before it, so starting it does not
    wait. :meth:`read` waits for these kernels alone, not for any launched since. On a CPU both are immediate.
    """

    def __init__(self, tensor: Tensor) -> None:
        tensor = tensor.detach()
        self._event: torch.cuda.Event | None = None
        if tensor.device.type == "cuda":
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensor.device))
        else:
            self._host = tensor.clone()

    def read(self) -> list[float]:
        """The numbers, flattened."""
        if self._event is not None:
            self._event.synchronize()
            self._event = None
        return self._host.flatten().tolist()
