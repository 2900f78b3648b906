"""Names in a run's checkpoints folder, for readers without torch (the format: ``mc2_hpc.training.checkpoint``)."""

from pathlib import Path

TRAINER, MANIFEST, LATEST = "trainer.json", "manifest.json", "latest"


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was saved, by the name of its folder; 0 for another name."""
    digits = checkpoint.name.removeprefix("step-")
    return int(digits) if digits.isdecimal() and len(digits) < 16 else 0


def complete_folders(folder: Path) -> list[Path]:
    """The published checkpoints in ``folder``, oldest first; their files may have been damaged since."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())
