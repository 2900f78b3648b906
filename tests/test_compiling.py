"""numba's cache if none of its own folders is writable."""

import shutil
import subprocess
import sys

CODE = """
import logging, sys, tempfile
logging.basicConfig(level=logging.INFO)
tempfile.tempdir = sys.argv[1]
from numba.core import caching
named = next(getattr(caching, n) for n in dir(caching) if n.endswith("UserProvidedCacheLocator"))
for kind in vars(caching).values():  # as if no other folder were writable
    if hasattr(kind, "_locator_classes"):
        kind._locator_classes = [named]
sys.path.insert(0, sys.argv[2])
from mc2_hpc.compiling import compiled
import sums
print(compiled(sums.add)(2, 3), compiled(sums.add)(4, 5))
"""


def test_the_cache_is_a_temporary_folder_of_ones_own(tmp_path):
    (tmp_path / "sums.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-c", CODE, str(tmp_path / "temporary"), str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "5 9\n", result.stderr
    (folder,) = (tmp_path / "temporary").glob("mc2_hpc-numba-*")
    assert result.stderr.count(f"caching compiled code in {folder}") == 1
    assert list(folder.rglob("*.nbi")) and folder.stat().st_mode & 0o077 == 0
    # A folder that others can write is not used, since they could make us run their code.
    shutil.rmtree(folder)
    folder.mkdir()
    folder.chmod(0o777)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.stdout == "5 9\n" and not list(folder.iterdir()), result.stderr
