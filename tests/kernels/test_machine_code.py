"""Kernels compiled ahead of time, without needing the GPUs: no spills, shared memory, tensor cores."""

import importlib
import json
import os
import subprocess

import pytest

from benchmarks.harness import ROOT, own_command

pytest.importorskip("triton", reason="the package triton is not installed")


def compile_table(tmp_path, *options: str) -> list[dict]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [*own_command("bench_kernels.py"), "--json", str(tmp_path / "table.json"), *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return json.loads((tmp_path / "table.json").read_text())["rows"]


def test_kernels_of_bf16_training_compile_for_every_architecture(tmp_path):
    rows = compile_table(tmp_path, "--quick")
    architectures = {"sm_80": "HMMA", "sm_90": "HGMMA", "sm_100": "UTCHMMA"}
    contrastive = [
        f"contrastive_{kind}{name}" for kind in ("", "distilled_", "sigmoid_") for name in ("statistics", "gradient")
    ]
    norms = ("layer_norm", "add_layer_norm", "quick_gelu")
    fused = [f"{name}_{way}" for name in norms for way in ("forward", "backward")]
    fused += [f"{name}_backward" for name in ("add_norm_linear", "quick_gelu_linear", "split_qkv")]
    assert {(row["kernel"], row["arch"], row["tensor_core"]) for row in rows} == {
        *((kernel, arch, instruction) for kernel in contrastive for arch, instruction in architectures.items()),
        *((kernel, arch, None) for kernel in fused for arch in architectures),
    }
    assert all(0 < row["registers"] <= 255 for row in rows)
    assert all(row["shared_bytes"] > 0 for row in rows if row["kernel"] in contrastive)


@pytest.mark.slow
def test_every_entry_of_the_dispatch_tables_compiles(tmp_path):
    assert len(compile_table(tmp_path)) > 140


@pytest.fixture
def bench_kernels(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return importlib.import_module("benchmarks.bench_kernels")


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({}, None),
        ({"spills": 3}, "3 register spills"),
        ({"shared_bytes": 240_000}, "240000 bytes of shared memory"),
        ({"tensor_core": None}, "does not use tensor cores"),
    ],
)
def test_a_breach_is_reported(bench_kernels, change, complaint):
    case = bench_kernels.Case("gradient", "descriptor", 90, "bf16", 1024)
    row = {
        "kernel": "contrastive_gradient",
        "variant": case.variant,
        "arch": "sm_90",
        "spills": 0,
        "shared_bytes": 196_640,
        "tensor_core": "HGMMA",
    }
    told = bench_kernels.breaches({**row, **change}, case)
    assert told == [] if complaint is None else len(told) == 1 and complaint in told[0]


def test_the_table_covers_every_launch_entry(bench_kernels):
    from mc2_hpc.kernels.contrastive.launch import LAUNCHES

    cases = list(bench_kernels.cases(quick=False))
    assert {(case.kernel, case.source) for case in cases} == set(LAUNCHES)
    compiled = {(case.kernel, case.source, case.launch) for case in cases}
    assert compiled == {(*key, launch) for key, table in LAUNCHES.items() for launch in table.values()}
