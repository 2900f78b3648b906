"""Classify an image in five languages, without training on any labels.

python examples/zero_shot.py MODEL photo.jpg
"""

import sys

import torch

import mc2_hpc

CLASSES = {
    "English": (["cat", "dog", "bird", "car"], "a photo of a {}"),
    "German": (["Katze", "Hund", "Vogel", "Auto"], "ein Foto: {}"),
    "Russian": (["кошка", "собака", "птица", "машина"], "на фотографии {}"),
    "Japanese": (["猫", "犬", "鳥", "車"], "{}の写真"),
    "Arabic": (["قطة", "كلب", "طائر", "سيارة"], "صورة {}"),
}


def main(model: str, image: str) -> None:
    clip = mc2_hpc.load(model)
    shown = clip.encode_image(image)
    for language, (names, template) in CLASSES.items():
        texts = clip.encode_text([template.format(name) for name in names])
        # Cosines of a trained CLIP differ by a few hundredths; 100 is its usual logit scale.
        odds = torch.softmax(100 * texts @ shown, dim=0)
        best = int(odds.argmax())
        print(f"{language:9} {names[best]} ({odds[best]:.0%})")


if __name__ == "__main__":
    main(*sys.argv[1:])
