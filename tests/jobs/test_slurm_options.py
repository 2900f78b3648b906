"""The grammar of ``--slurm``, and script lines whose values a shell never runs."""

import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.slurm_options import directive, parse_slurm_options

OWN = {"nodes": 1, "max-array-size": 1, "env": None}


@pytest.mark.parametrize(
    "words",
    [
        ["partition=cpu", "time=1:00:00", "exclusive"],
        ["partition=cpu,time=1:00:00,exclusive"],
        ["exclusive,partition=cpu", "time=1:00:00"],
        ["partition=gpu,time=1:00:00", "exclusive", "partition=cpu"],
    ],
)
def test_words_and_commas_are_the_same(words):
    assert parse_slurm_options(words, OWN) == {"partition": "cpu", "time": "1:00:00", "exclusive": ""}


@pytest.mark.parametrize(
    "word, options",
    [
        ("nodelist=n[1,3],mem_per_cpu=4G", {"nodelist": "n[1,3]", "mem-per-cpu": "4G"}),
        ("partition=a,time", {"partition": "a,time"}),  # the part after the comma is not an option by itself
        ("partition=a,b,exclusive", {"partition": "a,b", "exclusive": ""}),
        ("mail-type=END,FAIL", {"mail-type": "END,FAIL"}),
        ("gres=gpu:a100:4,nvme:1", {"gres": "gpu:a100:4,nvme:1"}),
        ("exclusive=user,no_requeue", {"exclusive": "user", "no-requeue": ""}),
        ("comment=a night run", {"comment": "a night run"}),
        ("max_array_size=7,env=$HOME/a=b", {"max-array-size": "7", "env": "$HOME/a=b"}),
    ],
)
def test_commas_inside_values_stay(word, options):
    assert parse_slurm_options([word], OWN) == options


@pytest.mark.parametrize(
    "word, message",
    [
        ("cpu", "--slurm cpu: write it as --slurm key=value key=value ... (or key=value,key=value), such as"),
        ("pool", "other arguments of the command come before --slurm"),
        ("=cpu", "--slurm =cpu: no such key"),
        ("partition=", "--slurm partition=: the value is empty"),
        ("partitoin=cpu", "--slurm partitoin=cpu: no such key"),
        ("array=1-9", "--slurm array=1-9: no such key"),
        ("output=/tmp/x", "no such key"),
        ("wrap=reboot", "no such key"),
        ("nodes=0", "--slurm nodes=0: must be a whole number of at least 1"),
        ("nodes=٣", "must be a whole number"),
        ("comment=a\n#SBATCH --nodes=9", "SBATCH --nodes=9' has a line break or control character"),
        ("time=1\r", "has a line break or control character"),
        ("qos=a\u2028b", "has a line break or control character"),
        ("qos=\x1b[2J", "has a line break or control character"),
        ("account=\udcff", "bytes that are not UTF-8"),
    ],
)
def test_bad_words_are_one_line(word, message):
    with pytest.raises(UserError) as error:
        parse_slurm_options([word], OWN)
    assert message in str(error.value) and str(error.value).isprintable()


@given(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=30))
def test_a_value_is_one_word_of_its_line(value):
    line = directive("comment", value)
    assert line.count("\n") == 0
    run = subprocess.run(["sh", "-c", f"printf %s {line.removeprefix('#SBATCH ')}"], capture_output=True)
    assert run.stdout.decode() == f"--comment={value}"
