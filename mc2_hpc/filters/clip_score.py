"""A filter by how well an image and its caption fit together, as a CLIP model sees it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.curation.filtering.images import PoolImage, ScoreFilter

if TYPE_CHECKING:
    from mc2_hpc.evaluation.loading import Clip


@dataclass(frozen=True, kw_only=True)
class ClipScore(ScoreFilter):
    """Limits on the cosine between the features of an image and of its caption: ``clip_score_low``,
    ``clip_score_high``.

    On a CPU the model runs on one thread, because there is a worker per core.
    """

    model: str
    """Anything that :func:`mc2_hpc.load` reads."""
    device: str = ""
    """To run on; by default a GPU if there is one."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if Path(self.model).exists():
            object.__setattr__(self, "model", str(Path(self.model).absolute()))

    def scores(self, rows: pa.Table, images: Sequence[PoolImage]) -> npt.NDArray[np.float32]:
        """See :class:`ScoreFilter`."""
        from mc2_hpc.threads import one_torch_thread

        clip = _load(self.model, self.device)
        number = {image: n for n, image in enumerate(dict.fromkeys(images))}
        with one_torch_thread() if clip.device.type == "cpu" else nullcontext():
            of_images = clip.encode_image([image.pixels for image in number]).numpy()
            of_texts = clip.encode_text(rows["text"].to_pylist()).numpy()
        return np.einsum("nd,nd->n", of_images[[number[image] for image in images]], of_texts)

    def sources(self) -> dict[str, str]:
        """The digest of the model, its tokenizer and its image transform.

        Raises:
            UserError: it cannot be loaded.
        """
        return {"model": _load(self.model, self.device).dual.identity}


@lru_cache(maxsize=2)
def _load(model: str, device: str) -> Clip:
    from mc2_hpc.evaluation.loading import load
    from mc2_hpc.threads import one_torch_thread

    with one_torch_thread():  # the number of threads that onnxruntime starts here
        return load(model, device or None)
