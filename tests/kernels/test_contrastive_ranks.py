"""The contrastive loss on several gloo ranks: equal to one process for both exchanges; no hang if a rank is killed."""

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mc2_hpc.kernels.contrastive import Teacher
from tests.forking import Forked

WORKER = Path(__file__).with_name("rank_worker.py")
EXCHANGES = ("all_gather", "ring")
BATCHES = {1: [(5,)], 2: [(4, 4), (1, 6)], 3: [(3, 3, 3), (5, 0, 2)], 4: [(7, 7, 7, 7), (2, 9, 1, 4)]}
TIMEOUT = 120


@pytest.fixture(scope="module")
def start(fork_server) -> Callable[[int, Path, str], list[Forked]]:
    def run(size: int, folder: Path, task: str) -> list[Forked]:
        return [fork_server.start([sys.executable, WORKER, rank, size, folder, task]) for rank in range(size)]

    return run


def finish(ranks: list[Forked]) -> list[tuple[int, str, str]]:
    """(exit code, stdout, stderr) of every rank; no rank outlives the test."""
    try:
        results = []
        for rank in ranks:
            out, err = rank.communicate(timeout=TIMEOUT)
            results.append((rank.returncode, out, err))
        return results
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()


def triton_cases(kit) -> dict[str, dict]:
    cases = {}
    for exchange, dtype in itertools.product(EXCHANGES, (torch.float32, torch.bfloat16, torch.float16)):
        image, text = kit.features(7, 8, dtype)
        cases[f"triton {exchange} {dtype}"] = {
            "batches": (3, 4), "image": image, "text": text, "logit_scale": torch.tensor(2.5),
            "options": {"exchange": exchange, "backend": "triton", "batches": (3, 4)},
        }  # fmt: skip
    return other_losses(kit, cases)


def with_teacher(kit, case: dict) -> dict:
    """The case with a wider teacher, sharper than the student."""
    features = kit.features(len(case["image"]), 9, case["image"].dtype, seed=7)
    return {**case, "teacher": (*features, 40.0, 0.75)}


def other_losses(kit, cases: dict[str, dict]) -> dict[str, dict]:
    """The cases, each also with a teacher and as one of the sigmoid loss."""
    distilled = {f"distilled {name}": with_teacher(kit, case) for name, case in cases.items()}
    sigmoid = {f"sigmoid {name}": {**case, "logit_bias": case["logit_scale"] - 7} for name, case in cases.items()}
    return cases | distilled | sigmoid


def all_cases(kit) -> dict[str, dict]:
    cases = {}
    for size, batches in ((size, b) for size, several in BATCHES.items() for b in several):
        for exchange, backend, dtype in itertools.product(
            EXCHANGES, ("tiled", "reference"), (torch.float64, torch.float32, torch.bfloat16)
        ):
            if backend == "reference" and (exchange == "ring" or dtype == torch.bfloat16):
                continue
            image, text = kit.features(sum(batches), 6, dtype, seed=size)
            options: dict = {"exchange": exchange, "backend": backend}
            if dtype != torch.float32:
                options["batches"] = batches  # else they are exchanged
            scale = torch.tensor(2.5, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
            cases[f"{batches} {exchange} {backend} {dtype}"] = {
                "batches": batches, "image": image, "text": text, "logit_scale": scale, "options": options,
            }  # fmt: skip
    # More pairs than fit in one tile of the smallest workspace.
    image, text = kit.features(300, 8, torch.float32)
    for exchange in EXCHANGES:
        cases[f"tiles {exchange}"] = {
            "batches": (110, 90, 100), "image": image, "text": text, "logit_scale": torch.tensor(3.0),
            "options": {"exchange": exchange, "backend": "tiled", "workspace_bytes": 1 << 16},
        }  # fmt: skip
    return other_losses(kit, cases)


@pytest.fixture(scope="module")
def found(kit, start, tmp_path_factory):
    """Every case with the results of its ranks; one start of four processes serves all cases."""
    folder = tmp_path_factory.mktemp("ranks")
    cases = all_cases(kit)
    torch.save(cases, folder / "cases.pt")
    for code, _, err in finish(start(4, folder, "solve")):
        assert code == 0, err[-3000:]
    ranks = [torch.load(folder / f"found-{rank}.pt", weights_only=True) for rank in range(4)]
    return {name: (case, [ranks[k][name] for k in range(len(case["batches"]))]) for name, case in cases.items()}


def test_ranks_together_equal_float64(kit, found):
    assert_ranks_equal_float64(kit, found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's interpreter is chosen where there is no GPU")
def test_ranks_with_triton_equal_float64(kit, tmp_path):
    pytest.importorskip("triton", reason="the package triton is not installed")
    cases = triton_cases(kit)
    torch.save(cases, tmp_path / "cases.pt")
    # Fresh processes, because the interpreter is chosen when Triton is imported.
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    ranks = [
        subprocess.Popen([sys.executable, WORKER, str(rank), "2", tmp_path, "solve"], env=environment)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=TIMEOUT) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    parts = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=True) for rank in range(2)]
    assert_ranks_equal_float64(kit, {name: (case, [part[name] for part in parts]) for name, case in cases.items()})


def assert_ranks_equal_float64(kit, found: dict[str, tuple[dict, list]]) -> None:
    """The value is the same on all ranks; value and gradients equal the dense float64 reference's."""
    for name, (case, ranks) in found.items():
        size = len(ranks)
        losses, images, texts, *scalars = zip(*ranks, strict=True)
        assert all(torch.equal(losses[0], loss) for loss in losses), f"{name}: ranks disagree on the loss"
        # Data parallelism averages gradients over ranks; only the feature's own rank contributes to its average.
        averages = [torch.stack(each).mean() for each in scalars]
        together = kit.Solution(losses[0], torch.cat(images) / size, torch.cat(texts) / size, *averages)
        inputs = (case["image"], case["text"], case["logit_scale"])
        try:
            if "logit_bias" in case:
                kit.assert_sigmoid(together, *inputs, case["logit_bias"])
            elif "teacher" in case:
                kit.assert_distilled(together, *inputs, Teacher(*case["teacher"]))
            else:
                kit.assert_exact(together, *inputs)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_both_exchanges_agree_to_rounding(found):
    compared = 0
    for name, (_, ranks) in found.items():
        if "ring" not in name:
            continue
        for ring, gathered in zip(ranks, found[name.replace("ring", "all_gather")][1], strict=True):
            for a, b in zip(ring, gathered, strict=True):
                epsilon = torch.finfo(a.dtype).eps
                torch.testing.assert_close(a, b, rtol=50 * epsilon, atol=50 * epsilon, msg=name)
                compared += 1
    assert compared > 50


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_a_killed_rank_makes_the_others_fail(exchange, start, tmp_path):
    *others, killed = finish(start(3, tmp_path, f"vanish-{exchange}"))
    assert killed[0] == -9
    for code, _, err in others:
        assert code not in (0, -9), "a rank continued without its peer"
        assert "Error" in err


def test_a_rank_that_never_calls_makes_the_others_fail_within_the_timeout(start, tmp_path):
    began = time.monotonic()
    ranks = start(2, tmp_path, "stall-all_gather")
    try:
        _, err = ranks[0].communicate(timeout=45)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert ranks[0].returncode not in (0, -9)
    assert "imed out" in err, err[-2000:]
    assert time.monotonic() - began < 45


def test_ranks_with_different_widths_all_say_so(start, tmp_path):
    for code, out, err in finish(start(2, tmp_path, "mismatch")):
        assert code == 0, err[-2000:]
        assert "ranks hold different feature widths: [3, 4]" in out
        assert "ranks hold different widths of a teacher's features: [3, 4]" in out
