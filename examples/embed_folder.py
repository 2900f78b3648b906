"""Embed every image in a folder: unit-length features and file names in one .npz.

    python examples/embed_folder.py MODEL PHOTOS features.npz

MODEL is an mc2 run or checkpoint folder, an open_clip folder or a transformers folder.
"""

import sys
from pathlib import Path

import numpy as np

import mc2_hpc
from mc2_hpc.samples import is_image_name
from mc2_hpc.shard_paths import walk_files


def main(model: str, folder: str, out: str) -> None:
    clip = mc2_hpc.load(model)
    paths = [path for path in walk_files(Path(folder)) if is_image_name(path.name)]
    features = clip.encode_image(paths, batch=64).numpy()
    np.savez(out, names=np.array([str(path.relative_to(folder)) for path in paths]), features=features)
    print(f"{len(paths)} images, {features.shape[1]}-dimensional features: {out}")


if __name__ == "__main__":
    main(*sys.argv[1:])
