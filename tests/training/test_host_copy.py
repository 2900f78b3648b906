"""Numbers that the host reads late are those of their own step."""

import pytest
import torch

from mc2_hpc.training.host_copy import HostCopy
from mc2_hpc.training.step import StepResult


def test_later_changes_do_not_reach_the_copy():
    numbers = torch.tensor([[1.5, float("inf")]], requires_grad=True)
    copy = HostCopy(numbers)
    numbers.detach().fill_(0)
    assert copy.read() == [1.5, float("inf")]
    assert copy.read() == [1.5, float("inf")]


class Event:
    """Stands in for a CUDA event; says what is asked of it, in order."""

    log: list[str] = []

    def record(self, stream: str) -> None:
        self.log.append(f"record on {stream}")

    def synchronize(self) -> None:
        self.log.append("wait")


class OnGpu:
    """Stands in for a tensor on a GPU."""

    shape, dtype, device = torch.Size([2]), torch.float32, torch.device("cuda")

    def detach(self) -> "OnGpu":
        return self


def test_on_a_gpu_the_copy_is_pinned_and_only_reading_waits(monkeypatch):
    class Pinned:
        def copy_(self, tensor: OnGpu, *, non_blocking: bool) -> None:
            Event.log.append(f"copy, non_blocking={non_blocking}")

        def flatten(self) -> torch.Tensor:
            return torch.tensor([3.0, 4.0])

    def empty(shape: torch.Size, *, dtype: torch.dtype, pin_memory: bool) -> Pinned:
        assert pin_memory and shape == OnGpu.shape and dtype == OnGpu.dtype
        return Pinned()

    monkeypatch.setattr(Event, "log", [])
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: "the stream")
    copy = HostCopy(OnGpu())
    assert Event.log == ["copy, non_blocking=True", "record on the stream"]
    assert copy.read() == copy.read() == [3.0, 4.0]
    assert Event.log[2:] == ["wait"]


@pytest.mark.gpu
def test_reading_a_copy_waits_for_nothing_that_came_later():
    numbers = torch.ones(4, device="cuda")
    copy, matrix = HostCopy(numbers), torch.randn(8192, 8192, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        later = HostCopy((matrix @ matrix).sum() * 0 + 2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert copy.read() == [1.0] * 4 and later.read() == [2.0]


@pytest.mark.parametrize("divergence", [None, 0.3])
def test_the_numbers_of_a_step_share_one_copy(divergence):
    result = StepResult(
        loss=torch.tensor(0.1),
        grad_norm=torch.tensor(0.7),
        logit_scale=torch.tensor(14.3),
        votes=torch.tensor([1.0, 2.0]),
        divergence=None if divergence is None else torch.tensor(divergence),
    )
    read = HostCopy(result.numbers()).read()
    scalars = [0.1, 0.7, 14.3] if divergence is None else [0.1, 0.7, 14.3, divergence]
    assert read == [float(torch.tensor(value)) for value in scalars] + [1.0, 2.0]
