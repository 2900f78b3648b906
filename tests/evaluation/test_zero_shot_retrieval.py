"""Zero-shot and retrieval against a naive full-matrix computation, and against open_clip's own functions."""

import hashlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders.protocol import encode_texts
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.nearest import nearest, nearest_both_ways
from mc2_hpc.evaluation.prompts import PHOTO, fill, templates_of
from mc2_hpc.evaluation.retrieval import recall
from mc2_hpc.evaluation.zero_shot import build_classifier, predict, top_k_accuracy


class RandomEncoder:
    """A model with features that are a fixed random function of its input; counts the rows it encodes."""

    def __init__(self, width: int = 16) -> None:
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(256, width, generator=generator)
        self.texts = 0

    def encode_text(self, tokens: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        self.texts += len(tokens)
        features = torch.tanh(self.table[tokens].cumsum(1)).mean(1)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_texts(self, texts) -> torch.Tensor:
        return self.encode_text(tokenize(texts), normalize=True)


def tokenize(texts):
    return torch.tensor([list(hashlib.blake2b(text.encode(), digest_size=12).digest()) for text in texts])


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def naive_order(queries: torch.Tensor, gallery: torch.Tensor) -> torch.Tensor:
    return (queries @ gallery.T).sort(dim=1, descending=True, stable=True).indices


@settings(deadline=None, max_examples=60)
@given(
    num_queries=st.integers(0, 9),
    num_gallery=st.integers(1, 23),
    tile=st.integers(1, 30),
    values=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    data=st.data(),
)
def test_nearest_is_a_stable_sort_of_the_full_matrix(num_queries, num_gallery, tile, values, seed, data):
    # Small integers: inner products are exact in any order of summation, and there are many ties.
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(-values, values + 1, (num_queries, 3), generator=generator).float()
    gallery = torch.randint(-values, values + 1, (num_gallery, 3), generator=generator).float()
    k = data.draw(st.integers(1, num_gallery))
    scores, indices = nearest(queries, gallery, k, tile=tile)
    expected = naive_order(queries, gallery)[:, :k]
    assert torch.equal(indices, expected)
    assert torch.equal(scores, (queries @ gallery.T).gather(1, expected))


@settings(deadline=None, max_examples=60)
@given(
    num_left=st.integers(1, 19),
    num_right=st.integers(1, 23),
    k=st.integers(1, 30),
    tile=st.integers(1, 30),
    values=st.integers(1, 4),
    seed=st.integers(0, 10_000),
)
def test_both_ways_at_once_are_each_way_by_itself(num_left, num_right, k, tile, values, seed):
    generator = torch.Generator().manual_seed(seed)
    left = torch.randint(-values, values + 1, (num_left, 3), generator=generator).float()
    right = torch.randint(-values, values + 1, (num_right, 3), generator=generator).float()
    both = nearest_both_ways(left, right, k, tile=tile)
    for (scores, indices), (queries, gallery) in zip(both, ((left, right), (right, left)), strict=True):
        expected = naive_order(queries, gallery)[:, :k]
        assert torch.equal(indices, expected)
        assert torch.equal(scores, (queries @ gallery.T).gather(1, expected))


def test_nearest_takes_zeros_of_both_signs_as_equal():
    scores, indices = nearest(torch.tensor([[1.0]]), torch.tensor([[-0.0], [0.0], [-1.0]]), 3)
    assert indices.tolist() == [[0, 1, 2]] and scores.tolist() == [[0.0, 0.0, -1.0]]


def test_nearest_refuses_what_has_no_answer():
    with pytest.raises(UserError, match="width 3 against a gallery of width 4"):
        nearest(torch.ones(2, 3), torch.ones(2, 4), 1)
    with pytest.raises(UserError, match="k=3: must be between 1 and the size of the gallery, 2"):
        nearest(torch.ones(2, 3), torch.ones(2, 3), 3)
    with pytest.raises(UserError, match="NaN"):
        nearest(torch.full((1, 3), float("nan")), torch.ones(2, 3), 1)
    with pytest.raises(UserError, match="NaN"):  # in a later tile
        nearest(torch.ones(1, 3), torch.cat([torch.ones(4, 3), torch.full((1, 3), float("nan"))]), 1, tile=2)


def test_recall_equals_the_full_matrix():
    generator = torch.Generator().manual_seed(3)
    text_image = torch.cat([torch.arange(40), torch.randint(40, (90,), generator=generator)])
    images = unit(40, 8, seed=1)
    texts = F.normalize(images[text_image] + unit(130, 8, seed=2), dim=-1)
    found = recall(images, texts, text_image, ks=(1, 5, 10))
    image_rank = naive_order(texts, images)
    text_rank = naive_order(images, texts)
    for k in (1, 5, 10):
        t2i = [int(text_image[i]) in image_rank[i, :k].tolist() for i in range(130)]
        own = [set((text_image == i).nonzero().flatten().tolist()) for i in range(40)]
        i2t = [bool(own[i] & set(text_rank[i, :k].tolist())) for i in range(40)]
        assert found.text_to_image[k] == pytest.approx(sum(t2i) / 130, abs=1e-12)
        assert found.image_to_text[k] == pytest.approx(sum(i2t) / 40, abs=1e-12)
    assert 0 < found.text_to_image[1] < found.text_to_image[10] <= 1


def test_recall_of_equal_images_goes_to_the_first():
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = recall(images, images, torch.tensor([0, 1]), ks=(1, 2, 7))
    assert found.text_to_image == {1: 0.5, 2: 1.0, 7: 1.0} and found.image_to_text == {1: 0.5, 2: 1.0, 7: 1.0}


def test_recall_refuses_images_and_texts_that_do_not_belong_together():
    features = unit(3, 4)
    with pytest.raises(UserError, match="1 of 3 images have no text"):
        recall(features, features, torch.tensor([0, 1, 1]))
    with pytest.raises(UserError, match="indices are in 0..3, but there are 3 images"):
        recall(features, features, torch.tensor([0, 1, 3]))
    with pytest.raises(UserError, match="3 texts with 2 image indices"):
        recall(features, features, torch.tensor([0, 1]))


def test_classifier_and_accuracy_equal_open_clips():
    from mc2_hpc.conversion.peers import import_open_clip

    import_open_clip()
    from open_clip.zero_shot_classifier import build_zero_shot_classifier

    model = RandomEncoder()
    names = [f"class {i}" for i in range(23)]
    templates = ["a photo of a {}.", "{}", "{} in ink"]
    ours = build_classifier(lambda texts: encode_texts(model, texts, batch=7), names, templates)
    theirs = build_zero_shot_classifier(
        model,
        tokenize,
        names,
        [lambda name, template=template: template.format(name) for template in templates],
        num_classes_per_batch=5,
    )
    torch.testing.assert_close(ours, theirs.T, rtol=0, atol=1e-6)

    features = unit(301, 16, seed=5)
    labels = torch.randint(23, (301,), generator=torch.Generator().manual_seed(6))
    logits = 100.0 * features @ theirs
    assert torch.equal(predict(features, ours)[:, 0], logits.argmax(dim=1))
    # A copy of open_clip's zero_shot.accuracy, because that module imports open_clip's training package.
    best = logits.topk(5, 1, True, True).indices
    expected = {k: float((best[:, :k] == labels[:, None]).any(1).sum()) / 301 for k in (1, 5)}
    assert top_k_accuracy(features, ours, labels) == pytest.approx(expected, abs=1e-12)


def test_accuracy_with_fewer_classes_than_k_and_bad_labels():
    weights = torch.eye(3)
    assert top_k_accuracy(weights, weights, torch.tensor([0, 1, 0])) == {1: pytest.approx(2 / 3), 5: 1.0}
    with pytest.raises(UserError, match="labels are in 0..3, but there are 3 classes"):
        top_k_accuracy(weights, weights, torch.tensor([0, 1, 3]))
    with pytest.raises(UserError, match="0 images with 0 labels"):
        top_k_accuracy(torch.empty(0, 3), weights, torch.empty(0, dtype=torch.int64))


def test_texts_are_encoded_once_and_come_back_in_order():
    model = RandomEncoder()
    texts = ["b", "a longer text", "b", "", "c", "a longer text"]
    features = encode_texts(model, texts, batch=2)
    assert model.texts == 4
    expected = torch.cat([model.encode_text(tokenize([text]), normalize=True) for text in texts])
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-6)
    assert features.dtype == torch.float32


def test_images_are_normalised_with_the_recipes_constants(encoder):
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    features = encoder.dual.encode_images(list(images))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    expected = encoder.dual.model.encode_image((images / 255 - mean) / std, normalize=True)
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-5)


def test_features_that_are_not_finite_are_refused(encoder, image_folder):
    with torch.no_grad():
        encoder.dual.model.vision.projection.fill_(float("nan"))
    with pytest.raises(UserError, match="non-finite features for some images"):
        encoder.images(ImageFiles(image_folder, ["00.jpg"]))
    with torch.no_grad():
        encoder.dual.model.vision.projection.fill_(0)
    (image_folder / "05.jpg").write_bytes(b"damaged")
    with pytest.raises(UserError, match="features of length zero for some images"):
        encoder.images(ImageFiles(image_folder, ["00.jpg", "05.jpg"]))
    model = RandomEncoder()
    model.table[:] = 0
    with pytest.raises(UserError, match="features of length zero for some texts"):
        encode_texts(model, ["a"])
    model.table[:] = float("nan")
    with pytest.raises(UserError, match="non-finite features for some texts"):
        encode_texts(model, ["a"])
    with pytest.raises(UserError, match="no texts to encode"):
        encode_texts(model, [])


def test_prompts():
    assert fill(["{}!", "({})"], ["a", "b{x}"]) == ["a!", "(a)", "b{x}!", "(b{x})"]
    for lang in PHOTO:
        assert templates_of(PHOTO, lang)
    with pytest.raises(UserError, match="no prompts for language 'xx'"):
        templates_of(PHOTO, "xx")
    with pytest.raises(UserError, match="exactly one"):
        templates_of({"en": ["no place for a name"]}, "en")
