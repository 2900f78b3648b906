"""Scores of each kind of task against a naive computation, open_clip's functions and CLIP_benchmark's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.embedding_quality import alignment, modality_gap, uniformity
from mc2_hpc.evaluation.encoder import ImageFeatures
from mc2_hpc.evaluation.geolocation import ridge_accuracy
from mc2_hpc.evaluation.scoring import class_weights, score
from mc2_hpc.evaluation.tasks import Captions, Choice, Classification, ClassTexts, Places, Question, Retrieval


class Shown:
    """Images that exist only as features."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def features_of(count: int, *, seed: int = 0, broken: tuple[int, ...] = ()) -> ImageFeatures:
    features = F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=1)
    usable = torch.tensor([index not in broken for index in range(count)])
    return ImageFeatures(features * usable[:, None], usable)


NAMES = ["cat", "dog", "tree", "house", "boat", "moon", "road"]
FORMS = ["a photo of a {}.", "{}"]


@pytest.fixture
def seven_classes():
    return Classification(
        images=Shown(60),
        labels=[(index % 7,) for index in range(60)],
        languages={
            "en": ClassTexts(classes=range(7), names=NAMES, templates=FORMS),
            "de": ClassTexts(classes=[5, 1], names=["Mond", "Hund"], templates=["{}"]),
        },
    )


def test_zero_shot_equals_clip_benchmark_and_open_clip_for_every_image(encoder, seven_classes, open_clip):
    from clip_benchmark.metrics import zeroshot_classification as peer

    images = features_of(60)
    weights = class_weights(seven_classes.languages["en"], "en", encoder)
    forms = [form.replace("{}", "{c}") for form in FORMS]
    theirs = peer.zero_shot_classifier(encoder.dual.model, encoder.dual.tokenize, NAMES, forms, "cpu", amp=False)
    torch.testing.assert_close(weights.T, theirs, atol=1e-6, rtol=0)
    builder = open_clip.build_zero_shot_classifier(
        encoder.dual.model,
        encoder.dual.tokenize,
        NAMES,
        [lambda c: f"a photo of a {c}.", lambda c: c],
        num_classes_per_batch=None,
    )
    torch.testing.assert_close(weights.T, builder, atol=1e-6, rtol=0)

    found = score(seven_classes, images, encoder)
    logits, target = images.features @ theirs, torch.tensor([index % 7 for index in range(60)])
    hit = logits.topk(5).indices == target[:, None]  # its accuracy() does not run with numpy 2.4
    assert found.groups["en"]["top1"] == pytest.approx(hit[:, 0].float().mean().item())
    assert found.groups["en"]["top5"] == pytest.approx(hit.any(1).float().mean().item())
    assert torch.equal((images.features @ weights.T).argmax(1), logits.argmax(1))


def test_a_language_sees_only_the_images_of_its_classes(encoder, seven_classes):
    images = features_of(60, broken=(1,))
    found = score(seven_classes, images, encoder)
    shown = [index for index in range(60) if index % 7 in (5, 1) and index != 1]
    assert found.counts == {"en": 59, "de": len(shown)} and found.skipped == {"image_undecodable": 1}
    moon_dog = encoder.texts(["Mond", "Hund"])
    right = [(5, 1)[int((images.features[index] @ moon_dog.T).argmax())] == index % 7 for index in shown]
    assert found.groups["de"]["top1"] == pytest.approx(sum(right) / len(right))
    assert found.mean["top1"] == pytest.approx((found.groups["en"]["top1"] + found.groups["de"]["top1"]) / 2)


def test_any_of_a_images_classes_is_right(encoder):
    texts = {"en": ClassTexts(classes=range(7), names=NAMES, templates=["{}"])}
    one = Classification(images=Shown(30), labels=[(i % 7,) for i in range(30)], languages=texts)
    any_of = Classification(images=Shown(30), labels=[(i % 7, (i + 3) % 7) for i in range(30)], languages=texts)
    images = features_of(30)
    best = (images.features @ encoder.texts(NAMES).T).argmax(1).tolist()
    expected = sum(best[i] in (i % 7, (i + 3) % 7) for i in range(30)) / 30
    assert score(any_of, images, encoder).mean["top1"] == pytest.approx(expected)
    assert score(one, images, encoder).mean["top1"] <= expected


def test_mean_per_class_is_sklearns_balanced_accuracy(encoder):
    from sklearn.metrics import balanced_accuracy_score

    labels = [0] * 20 + [1] * 7 + [2] * 3
    texts = {"en": ClassTexts(classes=range(3), names=NAMES[:3], templates=["{}"])}
    task = Classification(images=Shown(30), labels=[(i,) for i in labels], languages=texts, metric="mean_per_class")
    images = features_of(30)
    best = (images.features @ encoder.texts(NAMES[:3]).T).argmax(1)
    found = score(task, images, encoder).mean["mean_per_class_top1"]
    assert found == pytest.approx(balanced_accuracy_score(labels, best.tolist()))


def test_a_language_without_images_has_no_number(encoder):
    languages = {
        "en": ClassTexts(classes=[0], names=["cat"], templates=["{}"]),
        "de": ClassTexts(classes=[9], names=["Mond"], templates=["{}"]),
    }
    task = Classification(images=Shown(4), labels=[(0,)] * 4, languages=languages)
    found = score(task, features_of(4), encoder)
    assert set(found.groups) == {"en"} and found.skipped == {"language_without_images": 1}


def test_retrieval_equals_clip_benchmark(encoder):
    from clip_benchmark.metrics import zeroshot_retrieval as peer

    texts = [f"a photo of {name} {number}" for number in range(4) for name in NAMES]
    owners = [index // 2 for index in range(28)]
    task = Retrieval(images=Shown(14), languages={"en": Captions(texts=texts, images=owners)})
    images = features_of(14)
    found = score(task, images, encoder).groups["en"]

    class Model(torch.nn.Module):
        def encode_image(self, images):
            return images

        def encode_text(self, tokens):
            return encoder.dual.model.encode_text(tokens)

    loader = [(images.features[i : i + 7], [texts[2 * j : 2 * j + 2] for j in range(i, i + 7)]) for i in (0, 7)]
    theirs = peer.evaluate(Model(), loader, encoder.dual.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        assert found[f"text_to_image_R@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert found[f"image_to_text_R@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)


def test_the_embedding_of_pairs_is_of_each_images_first_caption(encoder):
    task = Retrieval(images=Shown(3), languages={"en": Captions(texts=["c", "a", "b", "x"], images=[2, 0, 1, 0])})
    images = features_of(3)
    found = score(task, images, encoder).embedding["en"]
    text = encoder.texts(["a", "b", "c"])
    assert found["alignment"] == pytest.approx(alignment(images.features, text))
    assert found["modality_gap"] == pytest.approx(modality_gap(images.features, text))
    assert found["uniformity_text"] == pytest.approx(uniformity(text))
    assert found["uniformity_image"] == pytest.approx(uniformity(images.features))


def test_captions_of_broken_images_are_left_out_and_counted(encoder):
    captions = Captions(texts=["cat", "dog", "tree"], images=[0, 1, 2])
    task = Retrieval(images=Shown(3), languages={"en": captions})
    found = score(task, features_of(3, broken=(1,)), encoder)
    assert found.counts == {"en": 2}
    assert found.skipped == {"image_undecodable": 1, "caption_without_image": 1}
    with pytest.raises(UserError, match="no caption has an image"):
        score(task, features_of(3, broken=(0, 1, 2)), encoder)


def test_choice_takes_the_closest_option(encoder):
    questions = [
        Question(image=i, options=[f"{n} {i}" for n in NAMES[:4]], answer=i % 4, group="ab"[i % 2]) for i in range(12)
    ]
    task = Choice(images=Shown(12), variants={"LOCAL": questions, "EN": questions[:6]})
    images = features_of(12, broken=(2,))
    found = score(task, images, encoder)
    right = {
        i: int((images.features[i] @ encoder.texts(list(q.options)).T).argmax()) == q.answer
        for i, q in enumerate(questions)
        if i != 2
    }
    assert found.mean["LOCAL"] == pytest.approx(sum(right.values()) / 11)
    assert found.mean["EN"] == pytest.approx(sum(right[i] for i in (0, 1, 3, 4, 5)) / 5)
    odd = [right[i] for i in range(1, 12, 2)]
    assert found.groups["b"]["LOCAL"] == pytest.approx(sum(odd) / len(odd))
    assert found.skipped["question_without_image"] == 2


def test_ridge_equals_sklearns_on_standardised_features():
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    features = features_of(400).features.double().numpy()
    labels = (torch.arange(400) % 6).numpy()
    labels[:200][labels[:200] == 5] = 4  # place 5 has no training images
    train, test = list(range(200)), list(range(200, 400))
    chosen = [index for place in range(5) for index in [i for i in train if labels[i] == place][:10]]
    scaler = StandardScaler().fit(features[chosen])
    scaler.scale_ += 1e-5

    def inputs(rows):
        return np.hstack([scaler.transform(features[rows]), np.full((len(rows), 1), 100.0)])

    targets = 2.0 * (labels[chosen][:, None] == np.arange(5)) - 1
    model = Ridge(alpha=2.0**10, fit_intercept=False).fit(inputs(chosen), targets)
    expected = (model.predict(inputs(test)).argmax(1) == labels[test]).mean()
    found = ridge_accuracy(
        features_of(400).features, torch.tensor(labels), torch.tensor(train), torch.tensor(test), shots=10
    )
    assert found == pytest.approx(expected) and 0 < expected < 5 / 6


def test_places_that_are_apart_are_told_apart():
    centres = F.normalize(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), dim=1)
    labels = torch.arange(90) % 3
    features = F.normalize(centres[labels] + 0.05 * features_of(90).features, dim=1)
    task = Places(
        images=Shown(90),
        places={"country": [str(int(label)) for label in labels]},
        train=range(45),
        test=range(45, 90),
    )
    from mc2_hpc.evaluation.scoring import _places

    found = _places(task, ImageFeatures(features, torch.ones(90, dtype=torch.bool)))
    assert found.mean == {"5_shot": 1.0, "10_shot": 1.0, "25_shot": 1.0} and found.counts == {"country": 45}


def test_alignment_uniformity_and_gap_by_their_formulas():
    image, text = features_of(50).features.double(), features_of(50, seed=1).features.double()
    assert alignment(image, text) == pytest.approx(((image - text) ** 2).sum(1).mean().item())
    pairs = [torch.exp(-2 * ((image[i] - image[j]) ** 2).sum()) for i in range(50) for j in range(50) if i != j]
    assert uniformity(image, tile=7) == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-9)
    assert modality_gap(image, text) == pytest.approx((image.mean(0) - text.mean(0)).norm().item())
    assert alignment(image, image) == 0 and modality_gap(text, text) == 0
