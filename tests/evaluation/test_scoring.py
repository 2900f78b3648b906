"""Scores of each kind of task against a naive computation, open_clip's functions and CLIP_benchmark's."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.embedding_quality import alignment, modality_gap, uniformity
from mc2_hpc.evaluation.encoder import PictureFeatures
from mc2_hpc.evaluation.geolocation import ridge_accuracy
from mc2_hpc.evaluation.scoring import class_weights, score
from mc2_hpc.evaluation.tasks import Captions, Choice, Classification, ClassTexts, Places, Question, Retrieval


class Shown:
    """Pictures that exist only as features."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count


def features_of(count: int, *, seed: int = 0, broken: tuple[int, ...] = ()) -> PictureFeatures:
    features = F.normalize(torch.randn(count, 16, generator=torch.Generator().manual_seed(seed)), dim=1)
    usable = torch.tensor([index not in broken for index in range(count)])
    return PictureFeatures(features * usable[:, None], usable)


NAMES = ["cat", "dog", "tree", "house", "boat", "moon", "road"]
FORMS = ["a photo of a {}.", "{}"]


@pytest.fixture
def seven_classes():
    return Classification(
        pictures=Shown(60),
        labels=[(index % 7,) for index in range(60)],
        languages={
            "en": ClassTexts(classes=range(7), names=NAMES, templates=FORMS),
            "de": ClassTexts(classes=[5, 1], names=["Mond", "Hund"], templates=["{}"]),
        },
    )


def test_zero_shot_equals_clip_benchmark_and_open_clip_for_every_picture(encoder, seven_classes, open_clip):
    from clip_benchmark.metrics import zeroshot_classification as peer

    pictures = features_of(60)
    weights = class_weights(seven_classes.languages["en"], "en", encoder)
    forms = [form.replace("{}", "{c}") for form in FORMS]
    theirs = peer.zero_shot_classifier(encoder.model, encoder.tokenize, NAMES, forms, "cpu", amp=False)
    torch.testing.assert_close(weights.T, theirs, atol=1e-6, rtol=0)
    builder = open_clip.build_zero_shot_classifier(
        encoder.model,
        encoder.tokenize,
        NAMES,
        [lambda c: f"a photo of a {c}.", lambda c: c],
        num_classes_per_batch=None,
    )
    torch.testing.assert_close(weights.T, builder, atol=1e-6, rtol=0)

    found = score(seven_classes, pictures, encoder)
    logits, target = pictures.features @ theirs, torch.tensor([index % 7 for index in range(60)])
    hit = logits.topk(5).indices == target[:, None]  # its accuracy() does not run with numpy 2.4
    assert found.groups["en"]["top1"] == pytest.approx(hit[:, 0].float().mean().item())
    assert found.groups["en"]["top5"] == pytest.approx(hit.any(1).float().mean().item())
    assert torch.equal((pictures.features @ weights.T).argmax(1), logits.argmax(1))


def test_a_language_sees_only_the_pictures_of_its_classes(encoder, seven_classes):
    pictures = features_of(60, broken=(1,))
    found = score(seven_classes, pictures, encoder)
    shown = [index for index in range(60) if index % 7 in (5, 1) and index != 1]
    assert found.counts == {"en": 59, "de": len(shown)} and found.skipped == {"undecodable_picture": 1}
    moon_dog = encoder.texts(["Mond", "Hund"])
    right = [(5, 1)[int((pictures.features[index] @ moon_dog.T).argmax())] == index % 7 for index in shown]
    assert found.groups["de"]["top1"] == pytest.approx(sum(right) / len(right))
    assert found.mean["top1"] == pytest.approx((found.groups["en"]["top1"] + found.groups["de"]["top1"]) / 2)


def test_any_of_a_pictures_classes_is_right(encoder):
    texts = {"en": ClassTexts(classes=range(7), names=NAMES, templates=["{}"])}
    one = Classification(pictures=Shown(30), labels=[(i % 7,) for i in range(30)], languages=texts)
    any_of = Classification(pictures=Shown(30), labels=[(i % 7, (i + 3) % 7) for i in range(30)], languages=texts)
    pictures = features_of(30)
    best = (pictures.features @ encoder.texts(NAMES).T).argmax(1).tolist()
    expected = sum(best[i] in (i % 7, (i + 3) % 7) for i in range(30)) / 30
    assert score(any_of, pictures, encoder).mean["top1"] == pytest.approx(expected)
    assert score(one, pictures, encoder).mean["top1"] <= expected


def test_mean_per_class_is_sklearns_balanced_accuracy(encoder):
    from sklearn.metrics import balanced_accuracy_score

    labels = [0] * 20 + [1] * 7 + [2] * 3
    texts = {"en": ClassTexts(classes=range(3), names=NAMES[:3], templates=["{}"])}
    task = Classification(pictures=Shown(30), labels=[(i,) for i in labels], languages=texts, metric="mean_per_class")
    pictures = features_of(30)
    best = (pictures.features @ encoder.texts(NAMES[:3]).T).argmax(1)
    found = score(task, pictures, encoder).mean["mean_per_class_top1"]
    assert found == pytest.approx(balanced_accuracy_score(labels, best.tolist()))


def test_a_language_without_pictures_has_no_number(encoder):
    languages = {
        "en": ClassTexts(classes=[0], names=["cat"], templates=["{}"]),
        "de": ClassTexts(classes=[9], names=["Mond"], templates=["{}"]),
    }
    task = Classification(pictures=Shown(4), labels=[(0,)] * 4, languages=languages)
    found = score(task, features_of(4), encoder)
    assert set(found.groups) == {"en"} and found.skipped == {"language_without_pictures": 1}


def test_retrieval_equals_clip_benchmark(encoder):
    from clip_benchmark.metrics import zeroshot_retrieval as peer

    texts = [f"a photo of {name} {number}" for number in range(4) for name in NAMES]
    owners = [index // 2 for index in range(28)]
    task = Retrieval(pictures=Shown(14), languages={"en": Captions(texts=texts, pictures=owners)})
    pictures = features_of(14)
    found = score(task, pictures, encoder).groups["en"]

    class Model(torch.nn.Module):
        def encode_image(self, images):
            return images

        def encode_text(self, tokens):
            return encoder.model.encode_text(tokens)

    loader = [(pictures.features[i : i + 7], [texts[2 * j : 2 * j + 2] for j in range(i, i + 7)]) for i in (0, 7)]
    theirs = peer.evaluate(Model(), loader, encoder.tokenize, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        assert found[f"text_to_image_R@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert found[f"image_to_text_R@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)


def test_the_embedding_of_pairs_is_of_each_pictures_first_caption(encoder):
    task = Retrieval(pictures=Shown(3), languages={"en": Captions(texts=["c", "a", "b", "x"], pictures=[2, 0, 1, 0])})
    pictures = features_of(3)
    found = score(task, pictures, encoder).embedding["en"]
    text = encoder.texts(["a", "b", "c"])
    assert found["alignment"] == pytest.approx(alignment(pictures.features, text))
    assert found["modality_gap"] == pytest.approx(modality_gap(pictures.features, text))
    assert found["uniformity_text"] == pytest.approx(uniformity(text))
    assert found["uniformity_image"] == pytest.approx(uniformity(pictures.features))


def test_captions_of_broken_pictures_are_left_out_and_counted(encoder):
    captions = Captions(texts=["cat", "dog", "tree"], pictures=[0, 1, 2])
    task = Retrieval(pictures=Shown(3), languages={"en": captions})
    found = score(task, features_of(3, broken=(1,)), encoder)
    assert found.counts == {"en": 2}
    assert found.skipped == {"undecodable_picture": 1, "caption_without_picture": 1}
    with pytest.raises(UserError, match="no caption has a picture"):
        score(task, features_of(3, broken=(0, 1, 2)), encoder)


def test_choice_takes_the_closest_option(encoder):
    questions = [
        Question(picture=i, options=[f"{n} {i}" for n in NAMES[:4]], answer=i % 4, group="ab"[i % 2]) for i in range(12)
    ]
    task = Choice(pictures=Shown(12), variants={"LOCAL": questions, "EN": questions[:6]})
    pictures = features_of(12, broken=(2,))
    found = score(task, pictures, encoder)
    right = {
        i: int((pictures.features[i] @ encoder.texts(list(q.options)).T).argmax()) == q.answer
        for i, q in enumerate(questions)
        if i != 2
    }
    assert found.mean["LOCAL"] == pytest.approx(sum(right.values()) / 11)
    assert found.mean["EN"] == pytest.approx(sum(right[i] for i in (0, 1, 3, 4, 5)) / 5)
    odd = [right[i] for i in range(1, 12, 2)]
    assert found.groups["b"]["LOCAL"] == pytest.approx(sum(odd) / len(odd))
    assert found.skipped["question_without_picture"] == 2


def test_ridge_equals_sklearns_on_standardised_features():
    from sklearn.linear_model import Ridge
    from sklearn.preprocessing import StandardScaler

    features = features_of(400).features.double().numpy()
    labels = (torch.arange(400) % 6).numpy()
    labels[:200][labels[:200] == 5] = 4  # place 5 is nowhere to learn from
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
        pictures=Shown(90),
        places={"country": [str(int(label)) for label in labels]},
        train=range(45),
        test=range(45, 90),
    )
    from mc2_hpc.evaluation.scoring import _places

    found = _places(task, PictureFeatures(features, torch.ones(90, dtype=torch.bool)))
    assert found.mean == {"5_shot": 1.0, "10_shot": 1.0, "25_shot": 1.0} and found.counts == {"country": 45}


def test_alignment_uniformity_and_gap_by_their_formulas():
    image, text = features_of(50).features.double(), features_of(50, seed=1).features.double()
    assert alignment(image, text) == pytest.approx(((image - text) ** 2).sum(1).mean().item())
    pairs = [torch.exp(-2 * ((image[i] - image[j]) ** 2).sum()) for i in range(50) for j in range(50) if i != j]
    assert uniformity(image, tile=7) == pytest.approx(math.log(sum(pairs) / len(pairs)), abs=1e-9)
    assert modality_gap(image, text) == pytest.approx((image.mean(0) - text.mean(0)).norm().item())
    assert alignment(image, image) == 0 and modality_gap(text, text) == 0
