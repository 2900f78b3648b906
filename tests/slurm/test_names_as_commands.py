"""Names that a shell would run, in every part of a job's script; a stand-in for sbatch runs the script."""

import json
import os
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.cli import main
from mc2_hpc.storage import write_json

STAND_IN = """#!/bin/bash
# sbatch: options that begin with -, then a script, or the script on standard input; runs it as task 0 of an array.
for word in "$@"; do case $word in --export=ALL,*) export "${word#--export=ALL,}" ;; esac; done
last=${*: -1}
if [ -f "$last" ]; then cp "$last" "$SBATCH_COPY"; else cat > "$SBATCH_COPY"; fi
export SLURM_ARRAY_TASK_ID=0 SLURM_NODELIST=n1 SLURM_JOB_ID=7 SLURM_JOB_NODELIST=n1
bash "$SBATCH_COPY" > "$SBATCH_COPY.log" 2>&1
echo "Submitted batch job 7"
"""
HOSTILE = "x $(touch $MARK) `touch $MARK` '; touch $MARK; ' \"; touch $MARK; \" & #"


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands, first on PATH; yields the path of sbatch's script, then checks for the mark."""
    commands = {"sbatch": STAND_IN, "squeue": "#!/bin/sh\n", "scontrol": "#!/bin/sh\necho n1\n", "srun": "#!/bin/sh\n"}
    for name, text in commands.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SBATCH_COPY", str(tmp_path / "script"))
    monkeypatch.setenv("MARK", str(tmp_path / "mark"))
    yield tmp_path / "script"
    assert not (tmp_path / "mark").exists(), "a name was run as a command"


@pytest.fixture
def pool(tmp_path) -> Path:
    write_json(tmp_path / "metadata" / "en.json", ["dog"])
    (tmp_path / "pool").mkdir()
    table = pa.table({"key": ["a"], "text": ["a dog"], "lang": ["en"]})
    pq.write_table(table, tmp_path / "pool" / "0.parquet")
    return tmp_path / "pool"


def test_curation_into_a_folder_whose_name_is_a_command(stand_in, pool, tmp_path, capsys):
    out = tmp_path / HOSTILE.replace("/", "-")
    words = ["curate", "match", str(pool), "--metadata", str(tmp_path / "metadata"), "--out", str(out), "--tasks", "1"]
    slurm = ["partition=$(touch $MARK)", "time=`touch $MARK`", "comment=a '; touch $MARK #", "exclusive"]
    assert main([*words, "--slurm", *slurm]) == 0
    log = stand_in.with_suffix(".log").read_text()
    assert (out / "0.parquet").is_file(), log  # the stand-in has run both stages in the folder with that name
    assert "submitted" in capsys.readouterr().out
    script = stand_in.read_text()
    assert "\n#SBATCH --exclusive\n" in script and "--partition='$(touch $MARK)'" in script
    assert main([*words, "--workers", "1"]) == 0


def test_training_whose_output_is_a_command(stand_in, tmp_path, capsys):
    config = tmp_path / "run.yaml"
    config.write_text("output: placeholder\nglobal_batch: 8\ndata: {lanes: 8}\n")
    output = f"output={tmp_path}/{HOSTILE.replace('/', '-')}"
    environment = tmp_path / "$(touch $MARK).sh"
    environment.write_text("export MC2_PYTHON=true\n")
    slurm = [f"env={environment}", "nodes=1", "gpus=1", "job-name=$(touch $MARK)", "constraint=a&b|`touch $MARK`"]
    assert main(["train", str(config), output, "--slurm", *slurm]) == 0
    assert capsys.readouterr().out.strip() == "Submitted batch job 7"
    assert "job 7, start 1 on n1" in Path(f"{stand_in}.log").read_text()  # the stand-in has run the script


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\x1bb", "a\udcffb"])
def test_a_folder_whose_name_no_script_can_hold_is_refused(stand_in, pool, tmp_path, capsys, bad):
    words = ["curate", "match", str(pool), "--metadata", str(tmp_path / "metadata"), "--out", str(tmp_path / bad)]
    assert main([*words, "--slurm", "partition=p", "time=1"]) == 2
    assert_refused(capsys, stand_in)


@pytest.mark.parametrize("bad", ["a\nb", "a\rb", "a\x1bb"])
def test_an_output_whose_name_no_script_can_hold_is_refused(stand_in, tmp_path, capsys, bad):
    config = tmp_path / "run.yaml"
    config.write_text(f"output: {json.dumps(bad)}\nglobal_batch: 8\ndata: {{lanes: 8}}\n")
    assert main(["train", str(config), "--slurm", "nodes=1", "gpus=1"]) == 2
    assert_refused(capsys, stand_in)


def assert_refused(capsys, script: Path) -> None:
    error = capsys.readouterr().err
    assert re.search("a Slurm script cannot contain|is not allowed", error) and error.count("\n") == 1, error
    assert not script.exists()
