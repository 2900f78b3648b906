"""Decoding on the GPU: a DALI pipeline that takes JPEGs and crop boxes and returns pixels.

A batch's samples, their crops and which of them are bad are all decided before a JPEG gets here, so balancing, resume
and skips work as in every other backend. One broken JPEG stops a whole DALI pipeline. The batch is then decoded on the
CPU as by ``turbo_exact``; a JPEG that cannot be decoded there either becomes a grey image and is counted; and a new
pipeline takes over.
"""

import logging
from collections import Counter, deque
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch

from mc2_hpc.data.crop import Box, EncodedCrop
from mc2_hpc.data.decode import crop_and_resize
from mc2_hpc.drops import Dropped, log_skip
from mc2_hpc.threads import one_torch_thread

IN_FLIGHT = 2
"""Batches to submit before receiving the first, so that the pipeline is never idle."""

_GREY = 128
_DALI_ERRORS = (RuntimeError, ValueError, IndexError)  # operator errors have no class of their own
logger = logging.getLogger(__name__)


@dataclass
class Jpegs:
    """Encoded images of a batch, as sent by a worker: tensors, so that they use shared memory.

    Attributes:
        data: uint8 ``(n,)``, concatenated.
        ends: int64 ``(k,)``, where each ends.
        boxes: int32 ``(k, 4)``: top, left, height, width of each crop.
        rows: int64 ``(k,)``, their places in the batch.
    """

    data: torch.Tensor
    ends: torch.Tensor
    boxes: torch.Tensor
    rows: torch.Tensor

    @classmethod
    def pack(cls, crops: dict[int, EncodedCrop]) -> "Jpegs":
        """Create from crops by place in the batch."""
        data = torch.from_numpy(np.frombuffer(b"".join(crop.data for crop in crops.values()) or b"\0", np.uint8).copy())
        return cls(
            data,
            torch.tensor([len(crop.data) for crop in crops.values()], dtype=torch.int64).cumsum(0),
            torch.tensor([crop.box for crop in crops.values()], dtype=torch.int32).reshape(-1, 4),
            torch.tensor(list(crops), dtype=torch.int64),
        )

    def split(self) -> list[npt.NDArray[np.uint8]]:
        """Every JPEG, without copying."""
        ends = self.ends.tolist()
        data = self.data.numpy()
        return [data[start:end] for start, end in zip([0, *ends], ends, strict=False)]


@dataclass
class _Job:
    ready: torch.Tensor
    jpegs: list[npt.NDArray[np.uint8]]
    boxes: npt.NDArray[np.int32]
    jpeg_rows: torch.Tensor
    """Places of the JPEGs in the batch."""
    ready_rows: torch.Tensor
    """Places of the images in ``ready``."""
    skipped: Counter[str] = field(default_factory=Counter)


class DaliDecoder:
    """Batches of JPEG crops in, uint8 ``(b, 3, S, S)`` images on the device out, in order.

    Args:
        image_size: S.
        max_batch: most JPEGs in a batch.
        device: of the images; ``cuda`` decodes on the GPU (DALI's ``mixed``), ``cpu`` on the CPU.
        num_threads: for the CPU's part.
        hw_decoder_load: share of the images that a GPU's JPEG engine decodes, if it has one.
    """

    def __init__(
        self, *, image_size: int, max_batch: int, device: torch.device, num_threads: int, hw_decoder_load: float
    ) -> None:
        self._size = image_size
        self.device = device
        self._new_pipeline = partial(_pipeline, image_size, max_batch, device, num_threads, hw_decoder_load)
        # Training's kernels queue on the current stream; waiting for an image must not wait for them.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._jobs: deque[_Job] = deque()
        self._restart()

    def submit(self, num: int, ready: torch.Tensor, parts: list[tuple[int, Jpegs]]) -> None:
        """Start a batch of ``num`` images.

        Args:
            ready: uint8 ``(m, 3, S, S)``, images that need no decoding, in order; pinned if the device is a GPU.
            parts: the others; each part's rows are relative to its number.
        """
        is_ready = torch.ones(num, dtype=torch.bool)
        jpeg_rows = torch.cat([part.rows + first for first, part in parts])
        is_ready[jpeg_rows] = False
        jpegs = [jpeg for _, part in parts for jpeg in part.split()]
        boxes = np.concatenate([part.boxes.numpy() for _, part in parts])
        self._jobs.append(_Job(ready, jpegs, boxes, jpeg_rows, is_ready.nonzero().flatten()))
        self._feed(self._jobs[-1])

    def receive(self) -> tuple[torch.Tensor, Counter[str]]:
        """The oldest batch, and counts of images that failed to decode, by reason; needs :data:`IN_FLIGHT` batches."""
        assert len(self._jobs) >= IN_FLIGHT, "submit before you receive"
        job = self._jobs.popleft()
        try:
            if self._broken is not None:
                raise self._broken
            (output,) = self._pipeline.share_outputs()
        except _DALI_ERRORS as error:
            logger.warning("DALI failed on a batch, which is decoded on the CPU instead: %s", _cause(error))
            pixels = self._on_cpu(job)
            self._restart()
        else:
            pixels = self._copy(output)[: len(job.jpegs)]
        num = len(job.jpeg_rows) + len(job.ready_rows)
        images = torch.empty((num, 3, self._size, self._size), dtype=torch.uint8, device=self.device)
        # Places come from the host: a mask on the device would make the host wait for the number of its rows.
        images.index_copy_(0, self._upload(job.jpeg_rows), pixels)
        if len(job.ready_rows):
            images.index_copy_(0, self._upload(job.ready_rows), self._upload(job.ready))
        return images, job.skipped

    def _upload(self, host: torch.Tensor) -> torch.Tensor:
        """A copy on the device that the host does not wait for."""
        if self.device.type != "cuda":
            return host
        return (host if host.is_pinned() else host.pin_memory()).to(self.device, non_blocking=True)

    def _restart(self) -> None:
        self._pipeline = self._new_pipeline()
        self._num_fed = 0
        self._broken: Exception | None = None
        for job in self._jobs:
            self._feed(job)

    def _feed(self, job: _Job) -> None:
        # A batch without JPEGs must pass through too, so that the pipeline's batches match ours.
        boxes = job.boxes if job.jpegs else np.array([[0, 0, 8, 8]], np.int32)
        try:
            self._pipeline.feed_input("jpegs", job.jpegs or [_tiny_jpeg()])
            self._pipeline.feed_input("start", list(boxes[:, :2]))
            self._pipeline.feed_input("shape", list(boxes[:, 2:]))
            self._num_fed += 1
            if self._num_fed >= IN_FLIGHT:
                self._pipeline.schedule_run()  # the first call runs all batches fed so far
        except _DALI_ERRORS as error:  # from an earlier batch: the pipeline works ahead
            self._broken = error

    def _copy(self, output: Any) -> torch.Tensor:
        with torch.cuda.stream(self._stream) if self._stream else nullcontext():
            pixels = torch.from_dlpack(output.as_tensor()).clone()
        if self._stream is not None:
            self._stream.synchronize()
            pixels.record_stream(torch.cuda.current_stream(self.device))
        self._pipeline.release_outputs()
        return pixels

    def _on_cpu(self, job: _Job) -> torch.Tensor:
        pixels = torch.full((len(job.jpegs), 3, self._size, self._size), _GREY, dtype=torch.uint8)
        with one_torch_thread():
            for row, (jpeg, box) in enumerate(zip(job.jpegs, job.boxes.tolist(), strict=True)):
                try:
                    pixels[row] = crop_and_resize(jpeg.tobytes(), _always(Box(*box)), self._size, "turbo_exact")
                except Dropped as skip:
                    log_skip(skip.reason, "a JPEG that DALI refused; its image is grey", skip.detail)
                    job.skipped[skip.reason] += 1
        return self._upload(pixels)


def _pipeline(image_size: int, max_batch: int, device: torch.device, num_threads: int, hw_decoder_load: float) -> Any:
    from nvidia.dali import fn, types
    from nvidia.dali.pipeline import Pipeline

    on_gpu = device.type == "cuda"
    pipeline = Pipeline(
        batch_size=max_batch,
        num_threads=num_threads,
        device_id=(device.index or 0) if on_gpu else None,
        prefetch_queue_depth=IN_FLIGHT,
    )
    with pipeline:
        jpegs = fn.external_source(name="jpegs", dtype=types.UINT8, ndim=1)
        start = fn.external_source(name="start", dtype=types.INT32, ndim=1)
        shape = fn.external_source(name="shape", dtype=types.INT32, ndim=1)
        images = fn.decoders.image_slice(
            jpegs,
            start=start,
            shape=shape,
            axis_names="HW",
            output_type=types.RGB,
            **({"device": "mixed", "hw_decoder_load": hw_decoder_load} if on_gpu else {"device": "cpu"}),
        )
        resized = fn.resize(
            images, size=(image_size, image_size), interp_type=types.INTERP_CUBIC, antialias=True, dtype=types.UINT8
        )
        pipeline.set_outputs(fn.transpose(resized, perm=[2, 0, 1]))
    pipeline.build()
    return pipeline


@lru_cache(maxsize=1)
def _tiny_jpeg() -> npt.NDArray[np.uint8]:
    return np.frombuffer(simplejpeg.encode_jpeg(np.full((8, 8, 3), _GREY, np.uint8)), np.uint8)


def _always(box: Box) -> Callable[[int, int], Box]:
    return lambda height, width: box


def _cause(error: Exception) -> str:
    """The line of DALI's report that states the error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = [lines[i + 1] for i, line in enumerate(lines[:-1]) if line.startswith("encountered")]
    return (after or lines or [type(error).__name__])[0]
