"""Checkpoints are written while training continues; any damage is detected; nothing is unpickled."""

import ast
import json
import shutil
import sys
from pathlib import Path

import pytest

from mc2_hpc.distributed import process_group
from mc2_hpc.errors import UserError
from mc2_hpc.models.weights import load_clip
from mc2_hpc.training.checkpoint import find_damage, newest_checkpoint

WORKER = Path(__file__).parent / "saving_worker.py"
PRODUCT = [*Path(__file__).parents[2].glob("mc2_hpc/**/*.py"), *Path(__file__).parents[2].glob("kernels/**/*.py")]


@pytest.fixture(scope="module")
def train(module_config, fork_server, tmp_path_factory):
    """``train(*overrides)``: run folder and events of a 30-step run that saves every 10 steps."""

    def run(*overrides):
        folder = tmp_path_factory.mktemp("run")
        values = [f"output={folder}", "steps=30", "checkpoint.every=10", "checkpoint.keep=3", *overrides]
        command = [sys.executable, str(WORKER), str(module_config), *values]
        result = fork_server.run(command, timeout=300)
        assert result.returncode == 0, result.stderr
        return folder, result.stdout.splitlines()

    return run


@pytest.fixture(scope="module")
def saved(train):
    """A run whose first checkpoint is written only when the second one is due, and its events."""
    return train()


def test_training_continues_while_files_are_written(saved):
    _, events = saved
    assert "training waited for the files" not in events
    order = ["copied 10", "trained 20", "wrote .step-00000010.partial", "published 10", "copied 20", "published 20"]
    places = [events.index(event) for event in order]
    assert places == sorted(places), events
    assert "published 30" in events


def test_stall_is_a_metric(saved):
    rows = [json.loads(line) for line in (saved[0] / "metrics.jsonl").read_text().splitlines()]
    stalls = {row["step"]: row["checkpoint_stall_seconds"] for row in rows}
    # A row is written before its step's save, so the next row shows that save.
    assert stalls[12] > 10 * stalls[10] > 0 and stalls[22] > 0.5  # the second save waited for the first


def test_in_the_foreground_training_waits(train):
    _, events = train("checkpoint.background=false")
    assert events.index("published 10") < events.index("trained 11")
    assert events.index("published 20") < events.index("trained 21")


def flip(folder, name, place):
    data = bytearray((folder / name).read_bytes())
    data[place] ^= 4
    (folder / name).write_bytes(data)


MODEL, MOMENTS = "model.00000-of-00001.safetensors", "optimizer.00000-of-00001.safetensors"
DAMAGE = {
    "flipped byte in a header": (lambda f: flip(f, MODEL, 20), f"{MODEL} does not match its SHA-256"),
    "flipped last byte": (lambda f: flip(f, MOMENTS, -1), f"{MOMENTS} does not match its SHA-256"),
    "half a file": (lambda f: (f / MODEL).write_bytes((f / MODEL).read_bytes()[:999]), f"{MODEL} has 999 bytes"),
    "empty file": (lambda f: (f / "trainer.json").write_bytes(b""), "trainer.json has 0 bytes"),
    "no file": (lambda f: (f / "tokenizer.model").unlink(), "tokenizer.model is missing"),
    "flipped byte in the manifest": (lambda f: flip(f, "manifest.json", 0), "manifest.json cannot be read"),
    "half a manifest": (lambda f: (f / "manifest.json").write_text('{"model.json": {'), "manifest.json cannot be read"),
    "manifest of another shape": (lambda f: (f / "manifest.json").write_text('{"a": 1}'), "manifest.json cannot be"),
    "empty manifest": (lambda f: (f / "manifest.json").write_text("{}"), "does not list trainer.json"),
}


@pytest.mark.parametrize("damage, words", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_and_the_one_before_taken(saved, tmp_path, caplog, damage, words):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0] / "checkpoints", folder)
    assert find_damage(folder / "step-00000030") is None
    damage(folder / "step-00000030")
    assert words in find_damage(folder / "step-00000030")
    with process_group() as ranks:
        checkpoint = newest_checkpoint(folder, ranks)
    assert checkpoint is not None and checkpoint.step == 20
    assert "step-00000030 is damaged" in caplog.text and words in caplog.text
    for step in (10, 20):
        damage(folder / f"step-{step:08d}")
    with process_group() as ranks, pytest.raises(UserError, match="no intact checkpoint among 3;"):
        newest_checkpoint(folder, ranks)


@pytest.mark.parametrize("text", ["", "\n", "step-99999999\n", "../../elsewhere\n"])
def test_a_bad_latest_stops_no_resume_and_is_named_to_readers(saved, tmp_path, text):
    folder = tmp_path / "checkpoints"
    shutil.copytree(saved[0] / "checkpoints", folder)
    (folder / "latest").write_text(text)
    with process_group() as ranks:
        assert newest_checkpoint(folder, ranks).step == 30
    with pytest.raises(UserError, match="no model.json there"):
        load_clip(tmp_path)


def test_a_folder_without_checkpoints_is_a_new_run(tmp_path):
    (tmp_path / ".step-00000010.partial").mkdir()
    (tmp_path / "step-00000010").mkdir()  # without a manifest it was never published
    with process_group() as ranks:
        assert newest_checkpoint(tmp_path, ranks) is None


HANDED_OVER = {
    path
    for path in PRODUCT
    if path.parent.name == "jobs" and path.name in ("executors.py", "executor_process.py", "tasks.py")
}


@pytest.mark.parametrize("path", PRODUCT, ids=lambda path: "/".join(path.parts[-2:]))
def test_nothing_is_unpickled(path):
    """No pickle, marshal, shelve, joblib or ``numpy.load(allow_pickle=True)`` in the product, and ``torch.load``
    only of tensors, in two places, for released weights; except for what the job driver passes to its own tasks, as
    datatrove's executors do."""
    if path in HANDED_OVER:
        return
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        roots = {name.partition(".")[0] for name in names}
        assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}, node.lineno
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if called == "torch.load":
                assert path.name in ("torch_file.py", "mtcnn.py"), f"line {node.lineno}"
                assert keywords.get("weights_only") == "True", f"line {node.lineno}"
            assert keywords.get("allow_pickle") in (None, "False"), f"line {node.lineno}: {called}"
