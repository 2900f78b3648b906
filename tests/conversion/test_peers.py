"""open_clip and transformers import on machines with and without torchvision's compiled operators."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from mc2_hpc.conversion import peers
from mc2_hpc.errors import UserError

TORCHVISION = """
import torch
def register():
    @torch.library.register_fake("torchvision::nms")
    def fake(dets, scores, iou_threshold):
        return dets
"""
COMPILED = """
import torch
library = torch.library.Library("torchvision", "DEF")
library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
PROGRAM = """
import logging, sys
logging.basicConfig(level=logging.INFO, format="%(message)s")
from mc2_hpc.conversion.peers import import_torchvision
first, second = import_torchvision(), import_torchvision()
assert first is second is sys.modules["torchvision"]
assert first.ready and sys.modules["torchvision.ops"].ready
"""


def import_in_a_new_process(folder: Path, compiled: str) -> str:
    """Import a stand-in for torchvision that needs its operator as torchvision does; returns the log."""
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("from torchvision import ops\nready = True\n")
    (package / "ops.py").write_text(f"{compiled}\n{TORCHVISION}\nregister()\nready = True\n")
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{PROGRAM}"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_operators_that_do_not_load_are_declared_aloud(tmp_path: Path) -> None:
    log = import_in_a_new_process(tmp_path, compiled="")
    assert log.count("torchvision's compiled operators do not load") == 1
    assert "torchvision::nms does not exist" in log


def test_operators_that_load_are_left_alone(tmp_path: Path) -> None:
    assert "do not load" not in import_in_a_new_process(tmp_path, compiled=COMPILED)


def test_the_peers_import(open_clip: ModuleType, transformers: ModuleType) -> None:
    assert "ViT-H-14-worldwide-quickgelu" in open_clip.list_models()
    assert transformers.MetaClip2Model.__name__ == "MetaClip2Model"
    assert transformers.CLIPImageProcessor.__name__ == "CLIPImageProcessor"


@pytest.mark.parametrize("name", ["open_clip", "transformers", "torchvision"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    import_peer = peers.import_transformers if name == "transformers" else peers.import_open_clip
    with pytest.raises(UserError, match=rf"^{name} cannot be imported \(.*\): pip install 'mc2_hpc\[eval\]'$"):
        import_peer()


def test_other_failures_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> ModuleType:
        raise RuntimeError("out of file descriptors")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(RuntimeError, match="out of file descriptors"):
        peers.import_open_clip()
