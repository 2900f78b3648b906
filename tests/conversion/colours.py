"""A small model trained to name the hue of noisy images: real accuracies, in seconds."""

import colorsys
import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import mc2_hpc
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.models.presets import ClipArchitecture
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, write_card, write_tensors

NAMES = [
    "laufen", "guitare", "велосипеде", "カメラ", "handwritten", "Wiese", "photograph", "adam",
    "chemise", "улице", "草原", "spaces", "words", "number", "Hunde", "homme",
]  # fmt: skip
"""Of the hues; words that the tests' tokenizers know."""


def draw(count: int, seed: int, *, hues: range = range(len(NAMES))) -> tuple[Tensor, Tensor]:
    """uint8 (count, 3, 32, 32) and the index of each image's hue; neighbouring hues overlap a little."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(hues)[torch.randint(len(hues), (count,), generator=generator)]
    found = labels / len(NAMES) + 0.016 * torch.randn(count, generator=generator)
    rgb = torch.tensor([colorsys.hsv_to_rgb(float(hue) % 1, 0.8, 0.8) for hue in found])
    noise = 40 * torch.randn(count, 3, 32, 32, generator=generator)
    return (255 * rgb[:, :, None, None] + noise).clamp(0, 255).byte(), labels


def picture(pixels: Tensor) -> Image.Image:
    """uint8 (3, 32, 32) as an open image."""
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def train(model: CLIP, tokenizer: Tokenizer, *, steps: int, lr: float = 2e-3, hues: range = range(len(NAMES))) -> CLIP:
    """AdamW on batches with each hue once or more; in place."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
    tokens = tokenizer.encode(NAMES)
    model.train()
    for step in range(steps):
        images, labels = draw(64, 1000 + step, hues=hues)
        image = model.encode_image(normalise(images), True)
        logits = model.logit_scale.exp() * image @ model.encode_text(tokens, True).T
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 10) * (1 - step / steps)
    return model.eval()


def trained(arch: ClipArchitecture, tokenizer: Tokenizer, *, steps: int = 120, seed: int = 0) -> CLIP:
    """A model trained from scratch on all hues."""
    arch = dataclasses.replace(arch, text=dataclasses.replace(arch.text, eos_id=tokenizer.eos_id))
    return train(build_clip(arch, seed=seed), tokenizer, steps=steps)


def write(folder: Path, model: CLIP, tokenizer: Tokenizer) -> Path:
    """A checkpoint folder."""
    write_tensors(folder / "model.0.safetensors", model.state_dict())
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model_file.read_bytes())
    write_card(folder, ModelCard(arch=model.arch, tokenizer_style=tokenizer.style))
    return folder


@torch.no_grad()
def accuracy(folder: Path, *, count: int = 1000, hues: range = range(len(NAMES))) -> float:
    """Zero-shot top-1 in [0, 1] of a folder in any format, on images that no model was trained on."""
    dual = mc2_hpc.load(folder, device="cpu").dual
    images, labels = draw(count, 7, hues=hues)
    features = dual.encode_images(list(images))
    return float((features @ dual.encode_texts(NAMES).T).argmax(1).eq(labels).float().mean())
