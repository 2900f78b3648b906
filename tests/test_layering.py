"""Imports only go downwards, the command line starts fast, and the wheel is complete."""

import ast
import pkgutil
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Lowest first; a module may import from its own package and from every layer below.
LAYERS = [
    {"mc2_hpc.compiling", "mc2_hpc.drops", "mc2_hpc.errors", "mc2_hpc.precision", "mc2_hpc.threads"},
    {"mc2_hpc.reading"},
    {"mc2_hpc.config_model", "mc2_hpc.config_optim", "mc2_hpc.train_sources"},
    {"mc2_hpc.config_data", "mc2_hpc.config_stages"},
    {
        "mc2_hpc.config",
        "mc2_hpc.distributed",
        "mc2_hpc.draws",
        "mc2_hpc.storage",
        "mc2_hpc.tar",
        "mc2_hpc.terminal",
    },
    {"mc2_hpc.caption_tables", "mc2_hpc.images", "mc2_hpc.samples", "mc2_hpc.shard_paths"},
    {"mc2_hpc.metadata", "mc2_hpc.pages"},
    {"mc2_hpc.jobs", "mc2_hpc.balancing", "mc2_hpc.draw_kernels"},
    {"mc2_hpc.curation", "mc2_hpc.kernels"},
    {"mc2_hpc.ingestion", "mc2_hpc.models"},
    {"mc2_hpc.data"},
    {"mc2_hpc.conversion", "mc2_hpc.inspection", "mc2_hpc.vocabulary"},
    {"mc2_hpc.evaluation"},
    {"mc2_hpc.filters", "mc2_hpc.training"},
    {"mc2_hpc.planning"},
    {"mc2_hpc.ablation", "mc2_hpc.quickstart", "mc2_hpc.doctor", "mc2_hpc.tuning"},
    {"mc2_hpc.cli"},
]
NO_TORCH = {"mc2_hpc.metadata", "mc2_hpc.jobs", "mc2_hpc.balancing", "mc2_hpc.curation", "mc2_hpc.ingestion"}
RESIZES = "mc2_hpc.curation.fetching.stored"
"""Imports torch when it has an image to resize."""
RANK = {package: rank for rank, layer in enumerate(LAYERS) for package in layer}


def modules():
    """(module name, file) of every Python file of the product."""
    for path in sorted((ROOT / "mc2_hpc").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path
    for path in sorted((ROOT / "kernels" / "ops").rglob("*.py")):
        parts = path.relative_to(ROOT / "kernels" / "ops").with_suffix("").parts
        yield ".".join(("mc2_hpc", "kernels", *(parts[:-1] if parts[-1] == "__init__" else parts))), path


def imports(path):
    """Absolute names of everything that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(module):
    """The layered package that a module belongs to."""
    return next((p for p in RANK if module == p or module.startswith(p + ".")), None)


@pytest.mark.parametrize("module, path", [pytest.param(*m, id=m[0]) for m in modules()])
def test_imports_run_downwards(module, path):
    own = package_of(module)
    if module == "mc2_hpc":  # the package itself is above all layers and imports lazily
        return
    assert own is not None, f"{module} is in no layer"
    for name in imports(path):
        assert name.split(".")[0] not in {"kernels", "benchmarks", "configs", "tests"}, f"{module} imports {name}"
        other = package_of(name)
        if own == "mc2_hpc.kernels":
            assert other in (None, own), f"the kernels import {name}"
        elif other is not None and other != own:
            assert RANK[other] < RANK[own], f"{module} imports {name}, which is not below it"
        if own in NO_TORCH and module != RESIZES:
            assert name.split(".")[0] != "torch", f"{module} imports torch"


def test_no_modules_import_each_other():
    """No import cycles, including imports inside functions and for type checkers."""
    files = dict(modules())
    found = circles({module: set(used(path, files)) for module, path in files.items()})
    assert not found, "\n".join(" <-> ".join(group) for group in found)


def used(path, files):
    """The product's modules that a file imports; for ``from package import name``, the name if it is a module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield from [name] if name in files else [node.module] if node.module in files else []


def circles(graph):
    """Groups of two or more nodes that reach each other, sorted, and nodes with an edge to themselves."""
    reach = {}
    for node in graph:
        seen, todo = set(), list(graph[node])
        while todo:
            following = todo.pop()
            if following not in seen:
                seen.add(following)
                todo += graph[following]
        reach[node] = seen
    groups = {tuple(sorted(other for other in reach[node] if node in reach[other])) for node in graph}
    return sorted(group for group in groups if group)


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"d", "a"}, "e": set()}) == [("b", "c"), ("d",)]


def of_heavy(packages: str, after: str) -> str:
    """Which of ``packages`` the statements ``after`` load, and what they print, in a separate process."""
    code = f"{after}\nimport sys; print(sorted(set({packages.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_loads_no_heavy_package():
    """This keeps ``mc2 --help`` fast."""
    ask_help = "from mc2_hpc.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass"
    *text, loaded = of_heavy("torch numpy deepspeed pyarrow msgspec yaml numba rich", ask_help).splitlines()
    assert loaded == "[]" and any("quickstart" in line for line in text)


def test_importing_the_package_loads_nothing_heavy():
    """``mc2_hpc.load`` loads torch when it is called, not before."""
    assert of_heavy("torch numpy PIL yaml", "import mc2_hpc") == "[]\n"
    assert of_heavy("torch", "import mc2_hpc; assert callable(mc2_hpc.load)") == "['torch']\n"


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "tests"])
def test_imports_inside_functions_are_there(folder):
    """For code that tests do not call in every run: slow lanes, benchmarks. (mypy checks the package itself.)"""
    missing = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for name in imports(path):
            if name.split(".")[0] == "mc2_hpc":
                try:
                    pkgutil.resolve_name(name)
                except (ImportError, AttributeError) as error:
                    missing.append(f"{path.relative_to(ROOT)}: {error}")
    assert not missing


def test_wheel_works_from_another_folder(tmp_path):
    """The wheel has every package, kernels under their other name, and imports without the source tree."""
    source = tmp_path / "source"  # a copy, because building leaves files that the next wheel would include
    for name in ("mc2_hpc", "kernels", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(source)],
        check=True,
        capture_output=True,
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(site)
    for module, path in modules():
        inside = module.replace(".", "/") + ("/__init__.py" if path.name == "__init__.py" else ".py")
        assert inside in names, f"the wheel lacks {inside}"
    assert {"mc2_hpc/py.typed", "mc2_hpc/metadata/languages.tsv", "mc2_hpc/slurm_scripts/train.sbatch"} <= names
    templates = {str(path.relative_to(ROOT)) for path in (ROOT / "mc2_hpc").rglob("templates/*")}
    assert "mc2_hpc/pages/templates/base.html" in templates and templates <= names
    assert not any(name.startswith(("kernels/", "tests/", "benchmarks/")) for name in names)
    code = "import mc2_hpc.kernels.contrastive as c, mc2_hpc.training.trainer, os; print(os.path.dirname(c.__file__))"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.stdout.strip() == str(site / "mc2_hpc" / "kernels" / "contrastive"), result.stderr
