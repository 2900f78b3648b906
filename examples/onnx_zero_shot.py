"""Classify an image with a model exported to ONNX; needs onnxruntime, sentencepiece, Pillow and NumPy, not mc2_hpc.

mc2 convert MODEL --to onnx --out ONNX
python examples/onnx_zero_shot.py ONNX photo.jpg "a cat" "eine Katze" "猫"
"""

import json
import string
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import sentencepiece
from PIL import Image

CLEANING = {
    "lower_case": str.lower,
    "drop_ascii_punctuation": lambda text: text.translate(str.maketrans("", "", string.punctuation)),
    "collapse_white_space": lambda text: " ".join(text.split()),
}


def pixels(image: Image.Image, facts: dict) -> np.ndarray:
    """Float32 (1, 3, size, size)."""
    image, size = image.convert("RGB"), facts["size"]
    sides = (size, size)
    if facts["resize"] == "shortest":
        sides = tuple(int(size * side / min(image.size)) for side in image.size)
    left, top = (round((side - size) / 2) for side in sides)
    image = image.resize(sides, Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    scaled = np.asarray(image, np.float32) / 255
    normalised = (scaled - np.float32(facts["mean"])) / np.float32(facts["std"])
    return np.ascontiguousarray(normalised.transpose(2, 0, 1))[None]


def token_ids(texts: list[str], folder: Path, facts: dict) -> np.ndarray:
    """Int64 (texts, tokens of the longest)."""
    layout = facts["tokenizer"]
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / layout["file"]))
    room = facts["context_length"] - len(layout["prefix"]) - 1
    rows = []
    for text in texts:
        for step in layout["clean"]:
            text = CLEANING[step](text)
        pieces = [
            layout["unk"] if piece == layout["file_unk"] else piece + layout["shift"] for piece in model.encode(text)
        ]
        rows.append([*layout["prefix"], *pieces[:room], layout["eos"]])
    longest = max(map(len, rows))
    return np.array([row + [layout["pad"]] * (longest - len(row)) for row in rows], np.int64)


def run(folder: Path, facts: dict, inputs: np.ndarray) -> np.ndarray:
    """Unit-length features (n, D) of one tower."""
    session = onnxruntime.InferenceSession(folder / facts["file"], providers=["CPUExecutionProvider"])
    return session.run([facts["output"]], {facts["input"]: inputs})[0]


def main(model: str, image: str, *texts: str) -> None:
    folder = Path(model)
    facts = json.loads((folder / "onnx_model.json").read_text(encoding="utf-8"))
    shown = run(folder, facts["image"], pixels(Image.open(image), facts["image"]))
    said = run(folder, facts["text"], token_ids(list(texts), folder, facts["text"]))
    logits = facts["logit_scale"] * (shown @ said.T)[0]
    odds = np.exp(logits - logits.max())
    for text, share in zip(texts, odds / odds.sum(), strict=True):
        print(f"{share:6.1%}  {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
