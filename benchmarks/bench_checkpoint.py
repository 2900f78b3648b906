"""How long training waits for a checkpoint: ours in the background and in the foreground, compared with open_clip.

    mc2 bench checkpoint [--quick] [--json FILE]

All three save the same number of parameters with AdamW's moments, 12 bytes per parameter, from one process to the same
disk, alternately. open_clip is measured as in its program after an epoch: ``torch.save`` of a dictionary with the
``state_dict`` of model and optimizer, in the training process. It neither hashes its file nor forces it to disk; both
of ours do. In the background, training only waits for the copy and the bookkeeping between steps. The steps trained
meanwhile are timed too, and compared with steps without a save in progress. The disk is flushed (``sync``) before each
save, so that no contender waits for the previous one's bytes.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import main, spread
from mc2_hpc.config import RunConfig, config_from_dict
from mc2_hpc.conversion.open_clip import config as open_clip_config
from mc2_hpc.conversion.peers import import_open_clip
from mc2_hpc.distributed import Ranks, process_group
from mc2_hpc.models.clip import build_clip
from mc2_hpc.models.presets import ClipArchitecture, resolve
from mc2_hpc.models.weights import ModelCard
from mc2_hpc.training.engine import Engine
from mc2_hpc.training.saving import CheckpointWriter
from mc2_hpc.training.step import ContrastiveStep
from tests.faults.tiny_run import write_pool

PRESETS = {False: "ViT-B-32-worldwide", True: "ViT-S-16-worldwide"}
VOCABULARY = {False: 49_408, True: 8_000}
"""CLIP's own size and a smaller one: a table of 900k rows would be most of the model."""
ROUNDS = {False: 5, True: 1}
BATCH = {False: 8, True: 4}
STEPS_IN_PEACE = 3
"""Steps before every background save, to compare with the steps during it."""

Save = Callable[[], float]


def run(quick: bool) -> dict[str, Any]:
    """Rows for the seconds that training waits per save, and for the seconds per step."""
    config = _run_config(quick)
    arch = resolve(config.model)
    with tempfile.TemporaryDirectory() as name, process_group(60) as ranks:
        ours = _Ours(config, arch, ranks, Path(name))
        contenders: dict[str, Save] = {
            "background": ours.save_in_background,
            "foreground": ours.save_in_foreground,
            "open_clip": _open_clip_save(arch, Path(name)),
        }
        waits: dict[str, list[float]] = {who: [] for who in contenders}
        for _ in range(1 + ROUNDS[quick]):  # the first round allocates our copies and the peer's moments
            for who, save in contenders.items():
                os.sync()
                waits[who].append(save())
        size = sum(path.stat().st_size for path in ours.newest().iterdir())
    rows = [
        {"who": who, "what": "stall a save", "unit": "s", "first": first, **spread(rest), "samples": rest}
        for who, (first, *rest) in waits.items()
    ]
    for who, rounds in (("no save under way", ours.peace), ("while one is written", ours.during)):
        medians = [statistics.median(seconds) for seconds in rounds[1:]]
        rows.append({"who": who, "what": "step", "unit": "s", **spread(medians), "samples": medians})
    # The first sample is excluded from every ratio, as it is from the rows' medians.
    pairs = list(zip(ours.peace[1:], ours.during[1:], strict=True))
    return {
        "config": {
            "preset": config.model.preset,
            "parameters": ours.num_parameters,
            "checkpoint_bytes": size,
            "precision": "fp32",
            "global_batch": config.global_batch,
            "processes": 1,
            "threads": torch.get_num_threads(),
            "zero_stage": config.zero.stage,
            "steps_while_one_is_written": [len(seconds) for _, seconds in pairs],
        },
        "rows": rows,
        "ratios": {
            "stall_vs_open_clip": _median_ratio(waits["open_clip"][1:], waits["background"][1:]),
            "foreground_stall_vs_open_clip": _median_ratio(waits["open_clip"][1:], waits["foreground"][1:]),
            "step_rate_while_writing": statistics.median(
                statistics.median(peace) / statistics.median(during) for peace, during in pairs
            ),
        },
    }


def _median_ratio(above: list[float], below: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def _run_config(quick: bool) -> RunConfig:
    values = {
        "global_batch": BATCH[quick],
        "precision": "fp32",
        "model": {"preset": PRESETS[quick], "text": {"vocab_size": VOCABULARY[quick]}},
        "data": {"lanes": 1},
        "zero": {"stage": 1},
    }
    return config_from_dict(values, "benchmark")


class _Ours:
    """Our engine under training, and its writer, driven as the training loop drives them."""

    def __init__(self, config: RunConfig, arch: ClipArchitecture, ranks: Ranks, folder: Path) -> None:
        self.peace: list[list[float]] = []
        """Seconds of the steps before each background save."""
        self.during: list[list[float]] = []
        """Seconds of the steps while the checkpoint was being written."""
        self._engine = Engine(build_clip(arch, seed=0), config, ranks, num_micro=1)
        self.num_parameters = sum(self._engine.state_shape(name).numel() for _, name in self._engine.state_names()) // 3
        self._writer = CheckpointWriter(folder / "ours", ranks, keep=1)
        self._votes = lambda: (self._writer.own_part_done,)
        self._step = ContrastiveStep(self._engine, config.loss, feature_dtype=torch.float32, votes=self._votes)
        self._card = ModelCard(arch=arch, tokenizer_style="xlmv")
        self._tokenizer = write_pool(folder).tokenizer
        self._lr = config.optim.lr
        self._num_saves = 0
        size = arch.vision.image_size
        self._images = torch.randint(0, 256, (config.global_batch, 3, size, size), dtype=torch.uint8)
        self._tokens = torch.randint(5, arch.text.vocab_size, (config.global_batch, arch.text.context_length))
        self._tokens[:, -1] = arch.text.eos_id

    def newest(self) -> Path:
        """Folder of the newest save."""
        return max(self._writer.folder.glob("step-*"))

    def save_in_background(self) -> float:
        """Train, save, and train until the checkpoint is published; returns the seconds that training waited."""
        self.peace.append([self._train_a_step()[0] for _ in range(STEPS_IN_PEACE)])
        wait, during = self._begin(), []
        while self._writer.busy:
            seconds, written = self._train_a_step()
            during.append(seconds)
            if written:
                start = time.perf_counter()
                self._writer.advance()
                wait += time.perf_counter() - start
        self.during.append(during)
        self._check()
        return wait

    def save_in_foreground(self) -> float:
        """Seconds until the checkpoint is published, with no training meanwhile."""
        start = time.perf_counter()
        self._begin()
        self._writer.finish()
        seconds = time.perf_counter() - start
        self._check()
        return seconds

    def _begin(self) -> float:
        self._num_saves += 1
        start = time.perf_counter()
        files = {"card": self._card, "tokenizer_file": self._tokenizer, "trainer": {}}
        self._writer.begin(self._engine, step=self._num_saves, **files)
        return time.perf_counter() - start

    def _check(self) -> None:
        if self._writer.failure is not None:
            raise RuntimeError(self._writer.failure)

    def _train_a_step(self) -> tuple[float, bool]:
        start = time.perf_counter()
        result = self._step(self._images, self._tokens, self._lr)
        written = bool(result.votes[0] == 1)
        return time.perf_counter() - start, written


def _open_clip_save(arch: ClipArchitecture, folder: Path) -> Save:
    """open_clip's model with the same sizes and AdamW's moments, saved as in ``open_clip_train.main``."""
    values = open_clip_config(ModelCard(arch=arch, tokenizer_style="xlmv"))["model_cfg"]
    values["text_cfg"].pop("hf_tokenizer_name", None)
    model = import_open_clip().model.CLIP(**values)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()

    def save() -> float:
        path = folder / "epoch_1.pt"
        path.unlink(missing_ok=True)
        start = time.perf_counter()
        state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save({"epoch": 1, "name": "bench", **state}, path)
        return time.perf_counter() - start

    return save


if __name__ == "__main__":
    main("checkpoint", run)
