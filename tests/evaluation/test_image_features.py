"""The encoder that curation uses for folders of CLIP models."""

import numpy as np
from PIL import Image

import mc2_hpc
from mc2_hpc.curation.copies.features import CLIP, load_encoder, parse_encoder
from mc2_hpc.evaluation.image_features import ClipFeatures


def test_features_are_those_of_load(tiny_checkpoint):
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8)) for _ in range(3)]
    named = parse_encoder([str(tiny_checkpoint), "device=cpu"])
    assert named.name == CLIP and named.arguments == {"model": str(tiny_checkpoint), "device": "cpu"}
    encoder = load_encoder(named)
    assert encoder == ClipFeatures(str(tiny_checkpoint), "cpu")
    assert encoder.sources() == {"model": mc2_hpc.load(tiny_checkpoint, "cpu").dual.identity}
    assert np.allclose(encoder.encode(images), mc2_hpc.load(tiny_checkpoint, "cpu").encode_image(images), atol=1e-6)
