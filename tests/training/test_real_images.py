"""The full pipeline on real images: CIFAR-10 captioned in five languages, and 32 web pairs from img2dataset."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from mc2_hpc import jobs, load
from mc2_hpc.config import DataConfig
from mc2_hpc.curation.run import plan_run
from mc2_hpc.data.loader import TrainLoader
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.evaluation.zero_shot import build_classifier, top_k_accuracy
from mc2_hpc.tar import write_tar

# Class names and caption templates by language.
NAMES = {
    "en": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    "de": "Flugzeug Auto Vogel Katze Hirsch Hund Frosch Pferd Schiff Lastwagen".split(),
    "fr": "avion voiture oiseau chat cerf chien grenouille cheval navire camion".split(),
    "ru": "самолёт автомобиль птица кошка олень собака лягушка лошадь корабль грузовик".split(),
    "ja": "飛行機 自動車 鳥 猫 鹿 犬 カエル 馬 船 トラック".split(),
}
FORMS = {
    "en": ["a photo of a {}", "{}", "a small image of a {}"],
    "de": ["ein Foto: {}", "{}", "Bild von {}"],
    "fr": ["une photo de {}", "{}", "image : {}"],
    "ru": ["фотография: {}", "{}", "на снимке {}"],
    "ja": ["{}の写真", "{}", "写真、{}です"],
}
SHARES = [0.5, 0.2, 0.15, 0.1, 0.05]
STEPS = 300


@pytest.fixture(scope="module")
def curated(shared_data, tmp_path_factory):
    """10,000 curated training images with one caption each, and a tokenizer trained on the captions."""
    folder = tmp_path_factory.mktemp("cifar")
    rng = np.random.default_rng(0)
    table = pq.read_table(shared_data / "cifar10-train.parquet").slice(0, 10_000).to_pylist()
    (folder / "pool").mkdir()
    texts = []
    for number in range(10):
        rows = table[number::10]
        langs = rng.choice(list(NAMES), size=len(rows), p=SHARES)
        captions = [
            rng.choice(FORMS[lang]).format(NAMES[lang][NAMES["en"].index(row["label"])])
            for row, lang in zip(rows, langs, strict=True)
        ]
        texts += captions
        write_tar(folder / "pool" / f"{number:05d}.tar", ((f"{row['key']}.jpg", row["jpg"]) for row in rows))
        columns = {"key": [row["key"] for row in rows], "text": captions, "lang": langs.tolist()}
        pq.write_table(pa.table(columns), folder / "pool" / f"{number:05d}.parquet")
    (folder / "metadata").mkdir()
    for lang, names in NAMES.items():
        (folder / "metadata" / f"{lang}.json").write_text(json.dumps(names), encoding="utf-8")
    result = jobs.run(plan_run(folder / "pool", folder / "metadata", folder / "curated", t_en=200))
    train_tokenizer(texts, folder / "sp.model", vocab_size=300, style="xlmv")
    return folder, result


def test_balancing_lowers_the_head(curated):
    _, result = curated
    assert result["pack"]["images"] == 10_000
    balance = result["balance"]
    assert 0.45 < balance["english_share_before"] < 0.55
    assert balance["t"]["en"] == 200 and all(threshold >= 1 for threshold in balance["t"].values())


@pytest.mark.slow
def test_learns_cifar_in_five_languages(curated, shared_data, ranks_of, tmp_path):
    folder, _ = curated
    tokenizer = Tokenizer(folder / "sp.model", "xlmv")
    config = tmp_path / "cifar.yaml"
    config.write_text(
        json.dumps(
            {
                "output": str(tmp_path / "run"),
                "steps": STEPS,
                "global_batch": 128,
                "precision": "fp32",
                "model": {
                    "preset": "ViT-S-16-worldwide",
                    "embed_dim": 64,
                    "vision": {"image_size": 32, "patch_size": 8, "width": 128, "layers": 3, "head_width": 32},
                    "text": {"vocab_size": tokenizer.vocab_size, "width": 64, "heads": 2, "layers": 2},
                },
                "data": {
                    "train": str(folder / "curated/shards"),
                    "balance": str(folder / "curated/balance"),
                    "tokenizer": str(folder / "sp.model"),
                    "lanes": 32,
                    "workers": 0,
                },
                "optim": {"lr": 1e-3, "warmup": 50},
                "zero": {"stage": 2},
                "checkpoint": {"every": STEPS},
            }
        ),
        encoding="utf-8",
    )
    ranks_of(2, "-m", "mc2_hpc.cli", "train", config)
    clip = load(tmp_path / "run")
    test = pq.read_table(shared_data / "cifar10-test.parquet").slice(0, 1000).to_pylist()
    features = clip.encode_image([row["jpg"] for row in test])
    labels = torch.tensor([NAMES["en"].index(row["label"]) for row in test])
    accuracy = {}
    for lang, names in NAMES.items():
        classifier = build_classifier(clip.encode_text, names, FORMS[lang])
        accuracy[lang] = top_k_accuracy(features, classifier, labels, ks=(1,))[1]
    print(accuracy)
    # Chance is 10 %; 1,000 images put six standard errors below 16 %.
    assert min(accuracy.values()) > 0.2, accuracy
    assert accuracy["en"] > 0.3, accuracy


def test_reads_a_web_shard(shared_data, tmp_path):
    """A tar from img2dataset, with jpg, txt and json per pair, can be trained on without curation."""
    tokenizer = train_tokenizer(
        [f"word{i} and some others {i % 7}" for i in range(500)], tmp_path / "sp.model", vocab_size=120, style="xlmv"
    )
    config = DataConfig(
        train=str(shared_data / "cc12m-32.tar"), tokenizer=str(tmp_path / "sp.model"), lanes=4, workers=0
    )
    loader = TrainLoader(config, global_batch=8, image_size=64, tokenizer=tokenizer, rank=0, world_size=1)
    batches = [next(loader) for _ in range(4)]
    keys = [key for batch in batches for key in batch.keys]
    assert len(set(keys)) == 32  # one epoch: every pair once
    assert all(batch.images.shape == (8, 3, 64, 64) and batch.images.float().std() > 20 for batch in batches)
    assert not any(batch.skipped for batch in batches)
