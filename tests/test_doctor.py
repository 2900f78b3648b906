"""``mc2 doctor`` tells the truth about this machine."""

import importlib.util
import json
import shutil

import pytest
import torch

from mc2_hpc import doctor
from mc2_hpc.cli import main


@pytest.fixture(scope="module")
def findings():
    return {finding.component: finding for finding in doctor.examine()}


def test_every_component_is_reported(findings):
    assert list(findings) == list(doctor.PROBES)
    assert all(finding.detail for finding in findings.values())


def test_what_the_tests_need_is_ok(findings):
    for component in ("torch", "collectives", "DeepSpeed", "Triton", "simplejpeg", "sentencepiece"):
        assert findings[component].status == doctor.OK, findings[component]
    assert findings["torch"].version == torch.__version__


@pytest.mark.parametrize(
    "component, there",
    [
        ("CUDA", torch.cuda.is_available()),
        ("xformers", importlib.util.find_spec("xformers") is not None),
        ("apex", importlib.util.find_spec("apex") is not None),
        ("Slurm", shutil.which("sbatch") is not None),
    ],
)
def test_what_is_missing_is_called_missing(findings, component, there):
    assert (findings[component].status != doctor.MISSING) == there


def test_a_failing_probe_is_broken_not_fatal(monkeypatch):
    def explode():
        raise OSError("libfoo.so: cannot open\nmore")

    monkeypatch.setitem(doctor.PROBES, "DALI", explode)
    finding = next(f for f in doctor.examine() if f.component == "DALI")
    assert (finding.status, finding.detail) == (doctor.BROKEN, "OSError: libfoo.so: cannot open")


def test_json(capsys):
    assert main(["doctor", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["component"] for row in rows} == set(doctor.PROBES)
