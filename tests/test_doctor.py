"""``mc2 doctor`` reports this machine correctly."""

import importlib.util
import json
import shutil
import sys

import pytest
import torch

from mc2_hpc import doctor
from mc2_hpc.cli import main
from mc2_hpc.doctor.probes import Probe


@pytest.fixture(scope="module")
def findings():
    return {finding.component: finding for finding in doctor.examine(full=True)}


@pytest.fixture(scope="module")
def shallow():
    return {finding.component: finding for finding in doctor.examine()}


def test_every_component_is_reported(findings, shallow):
    assert list(findings) == list(shallow) == list(doctor.PROBES)
    assert all(finding.detail for finding in findings.values())


def test_what_the_tests_need_is_ok(findings):
    for component in ("torch", "collectives", "DeepSpeed", "Triton", "simplejpeg", "sentencepiece"):
        assert findings[component].status == doctor.OK, findings[component]
        assert not findings[component].shallow
    assert findings["torch"].version == torch.__version__


def test_what_was_not_tried_is_called_shallow(findings, shallow):
    """Quick checks always run; both modes agree on versions and on what is missing."""
    for component, probe in doctor.PROBES.items():
        found = shallow[component]
        assert found.shallow == (probe.slow and found.status == doctor.OK), found
        assert ("--full" in found.detail) == found.shallow
        assert (found.status == doctor.MISSING) == (findings[component].status == doctor.MISSING)
        if found.status == findings[component].status:
            assert found.version == findings[component].version
    assert shallow["DeepSpeed"].shallow and shallow["Triton"].shallow and not shallow["torch"].shallow


@pytest.mark.parametrize(
    "component, there",
    [
        ("CUDA", torch.cuda.is_available()),
        ("xformers", importlib.util.find_spec("xformers") is not None),
        ("torchao", importlib.util.find_spec("torchao") is not None),
        ("apex", importlib.util.find_spec("apex") is not None),
        ("Slurm", shutil.which("sbatch") is not None),
    ],
)
def test_what_is_missing_is_called_missing(findings, component, there):
    assert (findings[component].status != doctor.MISSING) == there


def test_a_failing_probe_is_broken_not_fatal(monkeypatch):
    def explode():
        raise OSError("libfoo.so: cannot open\nmore")

    probe = Probe(version=lambda: "2.0", check=explode, slow=True)
    monkeypatch.setitem(doctor.PROBES, "DALI", probe)
    (finding,) = doctor.examine_here(["DALI"], full=True)
    assert (finding.status, finding.version) == (doctor.BROKEN, "2.0")
    assert finding.detail == "OSError: libfoo.so: cannot open"
    (finding,) = doctor.examine_here(["DALI"], full=False)
    assert (finding.status, finding.shallow) == (doctor.OK, True)


ENDS = {
    "crash": ("import os; os.kill(os.getpid(), 11)", "ended with SIGSEGV: no message"),
    "exit": ("import sys; print('x'); sys.exit('no driver')", "ended with exit code 1: no driver"),
    "hang": ("import time; time.sleep(60)", "no answer within 1 s"),
}


@pytest.mark.parametrize("code, words", ENDS.values(), ids=ENDS)
def test_a_library_that_takes_its_process_down_is_broken(monkeypatch, code, words):
    monkeypatch.setattr(doctor, "_COMMAND", (sys.executable, "-c", code))
    monkeypatch.setattr(doctor, "PROCESS_S", 1 if "sleep" in code else 120)
    findings = {finding.component: finding for finding in doctor.examine()}
    assert list(findings) == list(doctor.PROBES)
    for component in ("torch", "collectives", "simplejpeg"):
        assert (findings[component].status, findings[component].detail) == (doctor.BROKEN, words)
    assert findings["DeepSpeed"].status == doctor.OK


def test_another_package_called_apex_is_not_nvidias(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("raise ImportError('never imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    (finding,) = doctor.examine_here(["apex"], full=False)
    assert finding.status == doctor.BROKEN and "not NVIDIA's: pip uninstall apex" in finding.detail


def test_json(capsys):
    assert main(["doctor", "--json", "-"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["component"] for row in rows} == set(doctor.PROBES)
    assert {row["component"] for row in rows if row["shallow"]} >= {"DeepSpeed", "Triton"}


def test_table(capsys):
    assert main(["doctor"]) == 0
    assert "ok (shallow)" in capsys.readouterr().out
