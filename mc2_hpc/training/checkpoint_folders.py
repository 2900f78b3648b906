"""Names in a run's checkpoints folder, for readers without torch (the format: ``mc2_hpc.training.checkpoint``)."""

from pathlib import Path

TRAINER, MANIFEST, LATEST = "trainer.json", "manifest.json", "latest"


def complete_folders(folder: Path) -> list[Path]:
    """The published checkpoints in ``folder``, oldest first; their files may have been damaged since."""
    return sorted(path for path in folder.glob("step-*") if (path / MANIFEST).is_file())
