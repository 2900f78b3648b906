"""Bad input to ``mc2 train``: one line that says what, where and how to fix it; exit code 2; nothing lost."""

import json
import shutil
import sys

import pytest

from mc2_hpc.cli import main
from mc2_hpc.data.packing import write_shard


@pytest.fixture
def train(module_config, tmp_path, capfd):
    """``train(*overrides)``: exit code and error text of a one-process run into ``tmp_path / "run"``."""

    def run(*overrides):
        code = main(["train", str(module_config), f"output={tmp_path / 'run'}", "steps=2", *overrides])
        lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mc2: ")]
        return code, "\n".join(lines)

    return run


@pytest.fixture
def run_training(module_config, fork_server, tmp_path):
    """The same in a separate process, with all its logs: DeepSpeed can start only once per process."""

    def run(*overrides):
        command = [sys.executable, "-m", "mc2_hpc.cli", "train", str(module_config), f"output={tmp_path / 'run'}"]
        result = fork_server.run([*command, "steps=2", *overrides], timeout=120)
        return result.returncode, result.stderr

    return run


def empty_tar(folder):
    folder.mkdir()
    write_shard(folder / "00000.tar", [])
    return folder


CASES = {
    "missing folder": (["data.train=/nowhere/shards"], ["/nowhere/shards"]),
    "missing tokenizer": (["data.tokenizer=/nowhere/sp.model"], ["/nowhere/sp.model"]),
    "unknown key": (["optim.learning_rate=1"], ["optim.learning_rate", "optim.lr"]),
    "wrong type": (["steps=many"], ["steps", "many"]),
    "indivisible batch": (["global_batch=33"], ["global_batch=33", "lanes"]),
    "vocabulary too small": (["model.text.vocab_size=20"], ["vocab_size=20", "raise it to at least"]),
    "other EOS": (["model.text.eos_id=1"], ["eos_id=1", "tokenizer_style"]),
    "unknown preset": (["model.preset=ViT-Q-99"], ["ViT-Q-99", "nearest"]),
    "patch does not divide": (["model.vision.patch_size=15"], ["patch_size=15"]),
    "heads do not divide": (["model.text.heads=5"], ["heads=5"]),
    "xformers without a GPU": (["model.attention=xformers", "precision=bf16"], ["on cpu", "install a build"]),
    "xformers in fp32": (["model.attention=xformers"], ["precision=fp32", "attention=xformers", "half types"]),
    "compiled at stage 3": (["model.compile=true", "zero.stage=3"], ["model.compile=true", "zero.stage=3", "breaks"]),
    "triton without a GPU": (["loss.backend=triton"], ["loss.backend=triton"]),
    "bad stage": (["zero.stage=4"], ["zero.stage"]),
    "bad range": (["data.crop_scale=[0.9,0.1]"], ["crop_scale"]),
    "more blocks than there are": (["freeze.vision=9"], ["freeze.vision=9", "only 2 blocks", "write all"]),
    "part of a block": (["freeze.text=half"], ["freeze.text=half", "a number of blocks"]),
    "nothing to train": (["freeze.vision=all", "freeze.text=all"], ["freeze.vision=all", "unfreeze one"]),
    "no such init": (["model.init_from=/nowhere/model"], ["/nowhere/model", "no checkpoint"]),
    "no such teacher": (["distill.teacher=/nowhere/model"], ["/nowhere/model", "no such folder"]),
    "a teacher without a name": (["distill.weight=2"], ["distill.teacher: is not set"]),
    "a teacher without weight": (["distill.teacher=x", "distill.weight=0"], ["distill.weight=0.0: must be positive"]),
    "micro-batches": (["micro_batch=-1"], ["micro_batch=-1"]),
}


@pytest.mark.parametrize("overrides, words", CASES.values(), ids=CASES)
def test_one_line(train, overrides, words):
    code, text = train(*overrides)
    assert code == 2
    assert len(text.splitlines()) == 1, text
    for word in words:
        assert word in text


def test_empty_tar(train, tmp_path):
    code, text = train(f"data.train={empty_tar(tmp_path / 'empty')}")
    assert code == 2 and "skipped" in text and len(text.splitlines()) == 1


def test_missing_config_file(capsys):
    assert main(["train", "no/such.yaml"]) == 2
    assert capsys.readouterr().err == "mc2: no/such.yaml: no such config file\n"


def test_config_that_is_not_yaml(tmp_path, capsys):
    path = tmp_path / "bad.yaml"
    path.write_text("steps: [1, 2", encoding="utf-8")
    assert main(["train", str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mc2: {path}: not valid YAML") and error.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="no such config file"):
        main(["--debug", "train", str(tmp_path / "none.yaml")])


def test_unknown_arguments_are_refused(module_config, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", str(module_config), "--procesess", "2", "steps=1"])
    assert stop.value.code == 2
    assert "--procesess" in capsys.readouterr().err


def test_checkpoint_of_another_model(run_training, tmp_path):
    assert run_training()[0] == 0
    code, text = run_training("steps=4", "model.vision.layers=3")
    assert code == 2 and "checkpoint of another model" in text and "blocks.2" in text
    code, text = run_training("steps=4", "model.embed_dim=16")
    assert code == 2 and "projection" in text and "(64, 32)" in text
    code, text = run_training("steps=4", "data.lanes=4")
    assert code == 2 and "data.lanes=8" in text
    assert (tmp_path / "run/checkpoints/latest").read_text() == "step-00000002\n"


def test_damaged_checkpoint_falls_back_loudly(run_training, tmp_path):
    run = tmp_path / "run"
    assert run_training("checkpoint.every=1")[0] == 0
    path = run / "checkpoints/step-00000002/model.00000-of-00001.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    code, log = run_training("checkpoint.every=1")
    assert code == 0
    assert "step-00000002 is damaged (model.00000-of-00001.safetensors does not match its SHA-256)" in log
    assert "step-00000001 after step 1" in log
    shutil.rmtree(run / "checkpoints/step-00000002")
    (run / "checkpoints/step-00000001/trainer.json").write_text("{}")
    code, text = run_training()
    assert code == 2 and "no intact checkpoint among 1;" in text


def test_half_written_checkpoint_is_ignored_and_removed(run_training, tmp_path):
    run = tmp_path / "run"
    assert run_training()[0] == 0
    partial = run / "checkpoints/.step-00000003.partial"
    partial.mkdir()
    (partial / "model.00000-of-00001.safetensors").write_bytes(b"half")
    assert run_training("steps=4")[0] == 0
    assert not partial.exists()
    assert json.loads((run / "checkpoints/step-00000004/trainer.json").read_text())["step"] == 4


def test_corrupt_samples_are_counted(run_training, tiny_pool, tmp_path):
    """Truncated images and non-UTF-8 captions are skipped and counted, in the log and the checkpoint."""
    shards = tmp_path / "shards"
    shutil.copytree(tiny_pool.shards, shards)
    good = (shards / "00000.tar").read_bytes()
    start = good.index(b"\xff\xd8\xff")
    write_shard(
        shards / "zz.tar",
        [
            (f"bad{i:03d}", {"jpg": good[start : start + 400], "txt": b"cut"})
            if i % 2
            else (f"bad{i:03d}", {"jpg": good[start : start + 1200], "txt": b"\xff\xfe"})
            for i in range(64)
        ],
    )
    assert run_training(f"data.train={shards}", "steps=16", "log_every=4")[0] == 0
    skipped = json.loads((tmp_path / "run/checkpoints/step-00000016/trainer.json").read_text())["skipped"]
    assert len(skipped) == 2 and all(count > 0 for count in skipped.values()), skipped
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["skipped"] == skipped
