"""open_clip and transformers models: features equal the library's own, numbers equal CLIP_benchmark's, no network."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import socket

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders import open_clip as ours_of_open_clip
from mc2_hpc.evaluation.dual_encoders import open_dual_encoder
from mc2_hpc.evaluation.encoder import Encoder
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.scoring import score
from mc2_hpc.evaluation.tasks import Captions, Classification, ClassTexts, Retrieval

CPU = torch.device("cpu")
TEXTS = [
    "a photo of a cat",
    "Ein Hund & zwei Katzen!",
    "кошка",
    "猫の写真",
    "a caption that is cut, of " + "words " * 90,
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A model may need nothing but its folder."""

    def refuse(*arguments):
        raise AssertionError(f"network access: {arguments[1:]}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_tokenizer(folder, *, bos="<s>", eos="</s>", pad="<pad>", unk="<unk>"):
    """A small fast tokenizer as saved by transformers, with unigram pieces from the test's texts."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    specials = [bos, pad, eos, unk]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=specials, unk_token=unk)
    tokenizer.train_from_iterator(TEXTS * 4, trainer)
    ids = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos} $A {eos}", special_tokens=ids)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos,
        "eos_token": eos,
        "pad_token": pad,
        "unk_token": unk,
        "model_max_length": 64,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def randomise(model):
    """Change every parameter from its initial value, so that a missing one is noticed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model.eval()


def open_clip_folder(folder, open_clip, name, preprocess, text, vision):
    """A random model with open_clip's config ``name``, shrunk, in the folder layout of ``push_to_hf_hub``."""
    config = open_clip.get_model_config(name)
    config["text_cfg"].update(text)
    config["vision_cfg"].update(vision)
    write_tokenizer(folder)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    built = json.loads(json.dumps(config))
    if "hf_model_name" in built["text_cfg"]:
        built["text_cfg"]["hf_model_name"] = str(folder / built["text_cfg"]["hf_model_name"])
        built["text_cfg"]["hf_model_pretrained"] = False
    custom = built.pop("custom_text", False) or "hf_model_name" in built["text_cfg"]
    model = (open_clip.CustomTextCLIP if custom else open_clip.CLIP)(**built)
    save_file(randomise(model).state_dict(), folder / "open_clip_model.safetensors")
    return folder


ROBERTA = {
    "model_type": "xlm-roberta",
    "vocab_size": 140,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 90,
    "pad_token_id": 1,
}
SIGLIP_CLEAN = {"width": 768, "heads": 12, "layers": 1, "vocab_size": 140}
OPEN_CLIP = {
    "ViT-B-32": ({}, {"layers": 2}, {"layers": 2}),
    "xlm-roberta-base-ViT-B-32": ({"mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}, {}, {"layers": 2}),
    "ViT-B-16-SigLIP2-256": (
        {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"},
        SIGLIP_CLEAN,
        {"timm_model_name": "shallow_siglip_256"},
    ),
}


@pytest.fixture(scope="session", params=OPEN_CLIP)
def folder(request, tmp_path_factory, open_clip):
    """An open_clip folder with random weights."""
    import timm

    @timm.models.register_model
    def shallow_siglip_256(pretrained=False, **options):
        return timm.create_model("vit_base_patch16_siglip_256", pretrained=pretrained, depth=2, **options)

    place = tmp_path_factory.mktemp("open_clip")
    if "roberta" in request.param:
        (place / "xlm-roberta-base").mkdir()
        (place / "xlm-roberta-base" / "config.json").write_text(json.dumps(ROBERTA))
    return open_clip_folder(place, open_clip, request.param, *OPEN_CLIP[request.param])


def library_of(folder, open_clip):
    """The folder loaded by open_clip itself: model, transform, tokenizer."""
    path = folder / "open_clip_config.json"
    before = path.read_text()
    values = json.loads(before)
    if "hf_model_name" in values["model_cfg"]["text_cfg"]:  # open_clip would look it up on the Hub
        values["model_cfg"]["text_cfg"]["hf_model_name"] = str(folder / "xlm-roberta-base")
        path.write_text(json.dumps(values))
    try:
        model, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")
    finally:
        path.write_text(before)


def test_features_are_open_clips(folder, open_clip, image_folder):
    model, transform, tokenizer = library_of(folder, open_clip)
    encoder = open_dual_encoder(folder, CPU)
    files = sorted(image_folder.iterdir())
    with torch.no_grad():
        pixels = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        images, texts = model.encode_image(pixels, normalize=True), model.encode_text(tokenizer(TEXTS), normalize=True)
        found = encoder.encode_images([encoder.preprocess(file.read_bytes()) for file in files])
        words = encoder.encode_texts(TEXTS)
    torch.testing.assert_close(found, images, atol=1e-5, rtol=0)
    torch.testing.assert_close(words, texts, atol=1e-5, rtol=0)
    assert texts.std(0).max() > 1e-3 and images.std(0).max() > 1e-3  # features differ between inputs
    torch.testing.assert_close(encoder.preprocess(Image.open(files[0])), pixels[0])
    bias = 0.0 if model.logit_bias is None else model.logit_bias.item()
    assert encoder.logits() == pytest.approx((model.logit_scale.exp().item(), bias))
    assert encoder.facts.format == "open_clip" and encoder.facts.vision_width == 768
    assert encoder.facts.image_size == pixels.shape[-1] and encoder.facts.patch_size in (16, 32)
    assert encoder.facts.context_length == tokenizer.context_length


def assert_teaches_the_same(encoder, files):
    """Squares of pixels and token ids, made in another process, have the features of images and texts."""
    side = encoder.facts.image_size
    squares = [Image.open(file).convert("RGB").resize((side, side)) for file in files]
    pixels = torch.stack([torch.from_numpy(np.array(square)).permute(2, 0, 1) for square in squares])
    captions = pickle.loads(pickle.dumps(encoder.captions))
    tokens = torch.cat([captions(TEXTS), captions(TEXTS)])
    assert tokens.shape[:2] == (2 * len(TEXTS), len(captions.pads))
    with torch.no_grad():
        found, expected = encoder.encode_pixels(pixels), encoder.encode_images(list(map(encoder.preprocess, squares)))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        words = encoder.encode_texts(TEXTS)
        torch.testing.assert_close(encoder.encode_tokens(tokens), torch.cat([words, words]), atol=1e-5, rtol=0)
        wider = torch.tensor(captions.pads)[None, :, None].expand(len(tokens), -1, 1)
        if tokens.shape[2] < encoder.facts.context_length:
            padded = encoder.encode_tokens(torch.cat([tokens, wider], 2))
            torch.testing.assert_close(padded, torch.cat([words, words]), atol=1e-5, rtol=0)


def test_an_open_clip_teacher(folder, image_folder):
    assert_teaches_the_same(open_dual_encoder(folder, CPU), sorted(image_folder.iterdir()))


def test_numbers_are_clip_benchmarks(folder, open_clip, ranks, image_folder):
    from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval

    model, transform, tokenizer = library_of(folder, open_clip)
    encoder = Encoder.load(folder, ranks, batch=4)
    files = sorted(path.name for path in image_folder.iterdir())
    images = ImageFiles(image_folder, files)
    pixels = torch.stack([transform(Image.open(image_folder / name).convert("RGB")) for name in files])
    features = encoder.images(images)

    words = ["cat", "Hund", "кошка", "猫", "photo", "zwei", "words", "caption", "Katzen", "写真"]
    captions = [f"a {word} of {words[index - 3]}" for index, word in enumerate(words)]
    task = Retrieval(images=images, languages={"en": Captions(texts=captions, images=range(10))})
    found = score(task, features, encoder).mean
    loader = [(pixels[start : start + 5], [[text] for text in captions[start : start + 5]]) for start in (0, 5)]
    theirs = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        assert found[f"text_to_image_R@{k}"] == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-6)
        assert found[f"image_to_text_R@{k}"] == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-6)

    names = ["cat", "Hund", "кошка", "猫", "words", "photo"]
    labels = [index % 6 for index in range(10)]
    classes = {"en": ClassTexts(classes=range(6), names=names, templates=["a photo of a {}", "{}"])}
    task = Classification(images=images, labels=[(label,) for label in labels], languages=classes)
    found = score(task, features, encoder).mean
    forms = ["a photo of a {c}", "{c}"]
    weights = zeroshot_classification.zero_shot_classifier(model, tokenizer, names, forms, "cpu", amp=False)
    loader = [(pixels, torch.tensor(labels))]
    logits, target = zeroshot_classification.run_classification(model, weights, loader, "cpu", amp=False)
    hit = logits.topk(5).indices == target[:, None]  # its accuracy() does not run with numpy 2.4
    assert found["top1"] == pytest.approx(hit[:, 0].float().mean().item())
    assert found["top5"] == pytest.approx(hit.any(1).float().mean().item())


def test_another_resize_is_another_identity(folder, open_clip):
    wide = Image.effect_noise((96, 48), 60).convert("RGB")
    encoders = {mode: open_dual_encoder(folder, CPU, eval_resize=mode) for mode in ("shortest", "squash", "longest")}
    assert {mode: encoder.facts.resize for mode, encoder in encoders.items()} == {mode: mode for mode in encoders}
    assert len({encoder.identity for encoder in encoders.values()}) == 3
    pixels = [encoder.preprocess(wide) for encoder in encoders.values()]
    assert not torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[1], pixels[2])
    with pytest.raises(UserError, match="eval_resize=crop: choose one of shortest, squash, longest"):
        open_dual_encoder(folder, CPU, eval_resize="crop")


def test_the_simple_tokenizer_comes_with_open_clip(tmp_path, open_clip):
    """The original CLIP models do not name a tokenizer, so their folders need no tokenizer files."""
    config = open_clip.get_model_config("ViT-B-32")
    config["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    config["vision_cfg"] |= {"layers": 1, "width": 64}
    model = randomise(open_clip.CLIP(**config))
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": {}}))
    encoder = open_dual_encoder(tmp_path, CPU)
    expected = model.encode_text(open_clip.SimpleTokenizer()(TEXTS), normalize=True)
    torch.testing.assert_close(encoder.encode_texts(TEXTS), expected, atol=1e-5, rtol=0)


def test_text_towers_known_by_name_are_transformers_own(transformers):
    """``xlm-roberta-base`` and ``-large`` load without the Hub; the numbers are their parameter counts there."""
    sizes = {"xlm-roberta-base": 278_043_648, "xlm-roberta-large": 559_890_432}
    for name, config in ours_of_open_clip.TEXT_TOWERS.items():
        values = {key: value for key, value in config.items() if key != "model_type"}
        with torch.device("meta"):
            model = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**values))
        assert sum(parameter.numel() for parameter in model.parameters()) == sizes[name]


@pytest.mark.parametrize(
    "damage, message",
    [
        ("no weights", "no weights"),
        ("other weights", "open_clip cannot load it"),
        ("no config", "not an open_clip config"),
        ("unknown tower", "its text tower 'somebody/bert' is from transformers, and its config is missing"),
        ("standard deviation in text", r"\$\.preprocess_cfg\.std\[2\]: expected a number, found text"),
        ("pickled code", "open_clip cannot load it"),
        ("other names", "Missing key.*`mc2 convert .* --to mc2 --out NEW` may still read it"),
        ("integers", "open_clip_model.safetensors: holds I32, no floating-point weights"),
        ("a pipe", "open_clip_model.safetensors: is a named pipe"),
        ("a pipe beside them", "vocab.txt: is a named pipe"),
    ],
)
def test_broken_open_clip_folders_are_one_line(damage, message, tmp_path, open_clip):
    text, vision = {"layers": 1, "width": 64, "heads": 2}, {"layers": 1, "width": 64}
    folder = open_clip_folder(tmp_path / "model", open_clip, "ViT-B-32", {}, text, vision)
    weights, config = folder / "open_clip_model.safetensors", folder / "open_clip_config.json"
    if damage == "no weights":
        weights.unlink()
    elif damage == "other weights":
        save_file({"nothing": torch.zeros(1)}, weights)
    elif damage == "no config":
        config.write_text('{"model_cfg": []}')
    elif damage == "unknown tower":
        values = json.loads(config.read_text())
        values["model_cfg"]["text_cfg"]["hf_model_name"] = "somebody/bert"
        config.write_text(json.dumps(values))
    elif damage == "standard deviation in text":
        values = json.loads(config.read_text())
        values["preprocess_cfg"]["std"] = [0.27, 0.26, "0.28"]
        config.write_text(json.dumps(values))
    elif damage in ("other names", "integers"):
        change = (
            (lambda name, t: (f"_orig_mod.{name}", t)) if damage == "other names" else (lambda name, t: (name, t.int()))
        )
        save_file(dict(change(name, tensor) for name, tensor in load_file(weights).items()), weights)
    elif damage.startswith("a pipe"):
        pipe = weights if damage == "a pipe" else folder / "vocab.txt"
        pipe.unlink(missing_ok=True)
        os.mkfifo(pipe)
    else:
        weights.unlink()

        class Code:
            def __reduce__(self):
                return (open, (str(tmp_path / "ran"), "w"))

        (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Code()))
    with pytest.raises(UserError, match=message) as error:
        open_dual_encoder(folder, CPU)
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


def clip_like(transformers, kind):
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = {**tower, "image_size": 64, "patch_size": 16}
    specials = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    text = {**tower, **specials, "vocab_size": 140, "max_position_embeddings": 40}
    classes = {
        "clip": ("CLIPConfig", "CLIPModel", "CLIPImageProcessor", {"projection_dim": 48}),
        "metaclip_2": ("MetaClip2Config", "MetaClip2Model", "CLIPImageProcessor", {"projection_dim": 48}),
        "siglip": ("SiglipConfig", "SiglipModel", "SiglipImageProcessor", {}),
        "siglip2": ("Siglip2Config", "Siglip2Model", "Siglip2ImageProcessor", {}),
    }
    config, model, processor, more = classes[kind]
    if kind == "siglip2":
        del vision["image_size"]
        vision |= {"num_patches": 16}
    built = getattr(transformers, config)(text_config=text, vision_config=vision, **more)
    sizes = {"siglip2": {"patch_size": 16, "max_num_patches": 16}, "siglip": {"size": {"height": 64, "width": 64}}}
    default = {"size": {"shortest_edge": 64}, "crop_size": {"height": 64, "width": 64}}
    return getattr(transformers, model)(built), getattr(transformers, processor)(**sizes.get(kind, default))


@pytest.fixture(params=["clip", "metaclip_2", "siglip", "siglip2"])
def theirs(request, tmp_path, transformers):
    """A folder saved by transformers, with its model and image processor."""
    model, processor = clip_like(transformers, request.param)
    randomise(model).save_pretrained(tmp_path / "hf")
    processor.save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    return tmp_path / "hf", model, processor, request.param


def test_features_are_transformers_own(theirs, transformers, image_folder):
    folder, model, processor, kind = theirs
    encoder = open_dual_encoder(folder, CPU)
    files = sorted(image_folder.iterdir())
    opened = [Image.open(file).convert("RGB") for file in files]
    padding = "max_length" if kind.startswith("siglip") else True
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(TEXTS, padding=padding, truncation=True, max_length=40, return_tensors="pt")
    if kind.startswith("siglip"):
        tokens.pop("attention_mask")
    tokens.pop("token_type_ids", None)
    with torch.no_grad():
        images = model.get_image_features(**processor(images=opened, return_tensors="pt")).pooler_output
        texts = model.get_text_features(**tokens).pooler_output
        found = encoder.encode_images([encoder.preprocess(file.read_bytes()) for file in files])
        words = encoder.encode_texts(TEXTS)
    torch.testing.assert_close(found, F.normalize(images, dim=-1), atol=1e-5, rtol=0)
    torch.testing.assert_close(words, F.normalize(texts, dim=-1), atol=1e-5, rtol=0)
    assert encoder.facts.format == "hf" and encoder.facts.vision_width == 64 and encoder.facts.patch_size == 16
    assert encoder.facts.image_size == 64 and encoder.facts.context_length == 40
    scale, bias = encoder.logits()
    assert scale == pytest.approx(model.logit_scale.exp().item())
    assert bias == pytest.approx(getattr(model, "logit_bias", torch.zeros(1)).item())


def test_a_tokenizer_without_a_mask(theirs):
    """As transformers' own pipelines, which pass on what the tokenizer gives; CLIP's causal towers need no mask."""
    folder, *_ = theirs
    masked = open_dual_encoder(folder, CPU).encode_texts(TEXTS)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_input_names": ["input_ids"]}))
    encoder = open_dual_encoder(folder, CPU)
    assert list(encoder.tokenize(TEXTS)) == ["input_ids"] and len(encoder.captions.pads) == 1
    torch.testing.assert_close(encoder.encode_texts(TEXTS), masked, atol=1e-6, rtol=0)


def test_a_transformers_teacher(theirs, image_folder):
    folder, *_, kind = theirs
    encoder = open_dual_encoder(folder, CPU)
    if kind == "siglip2":
        assert encoder.facts.resize == "patches"  # no teacher
        return
    assert_teaches_the_same(encoder, sorted(image_folder.iterdir()))


def test_transformers_images_can_be_resized_otherwise(theirs):
    folder, *_, kind = theirs
    if kind == "siglip2":
        with pytest.raises(UserError, match="eval_resize=squash: not supported by the image processor"):
            open_dual_encoder(folder, CPU, eval_resize="squash")
        return
    wide = Image.effect_noise((128, 64), 60).convert("RGB")
    shortest, squash = (open_dual_encoder(folder, CPU, eval_resize=mode) for mode in ("shortest", "squash"))
    middle = wide.crop((32, 0, 96, 64))
    torch.testing.assert_close(
        shortest.preprocess(wide)["pixel_values"], squash.preprocess(middle)["pixel_values"], atol=1e-5, rtol=0
    )
    assert not torch.equal(shortest.preprocess(wide)["pixel_values"], squash.preprocess(wide)["pixel_values"])
    with pytest.raises(UserError, match="eval_resize=longest: not supported by the image processor"):
        open_dual_encoder(folder, CPU, eval_resize="longest")


def test_broken_transformers_folders_are_one_line(tmp_path, transformers):
    model, processor = clip_like(transformers, "clip")
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(UserError, match="transformers cannot load it") as error:  # no tokenizer
        open_dual_encoder(tmp_path, CPU)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    with pytest.raises(UserError, match="model_type is 'bert'; supported transformers models are clip, metaclip_2"):
        open_dual_encoder(tmp_path, CPU)


def test_a_missing_library_names_the_extra(tmp_path, monkeypatch, transformers):
    import importlib

    def absent(name):
        raise ModuleNotFoundError(f"No module named {name!r}")

    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(UserError, match=r"pip install 'mc2_hpc\[eval\]'"):
        open_dual_encoder(tmp_path, CPU)


def test_ours_takes_open_and_encoded_images_alike(tiny_checkpoint, noise):
    encoder = open_dual_encoder(tiny_checkpoint, CPU)
    data = noise(3)
    assert torch.equal(encoder.preprocess(data), encoder.preprocess(Image.open(io.BytesIO(data))))
    assert dataclasses.asdict(encoder.facts)["step"] is None and encoder.logits()[1] == 0
    squash = open_dual_encoder(tiny_checkpoint, CPU, eval_resize="squash")
    assert squash.identity != encoder.identity and not torch.equal(squash.preprocess(data), encoder.preprocess(data))
    with pytest.raises(UserError, match="choose shortest or squash"):
        open_dual_encoder(tiny_checkpoint, CPU, eval_resize="longest")


def test_a_text_tower_known_by_name_needs_no_config(tmp_path, open_clip, monkeypatch):
    """As published by laion: the folder names the tower, and the Hub has its config."""
    (tmp_path / "model" / "xlm-roberta-base").mkdir(parents=True)
    (tmp_path / "model" / "xlm-roberta-base" / "config.json").write_text(json.dumps(ROBERTA))
    vision = {"layers": 1, "width": 64}
    folder = open_clip_folder(tmp_path / "model", open_clip, "xlm-roberta-base-ViT-B-32", {}, {}, vision)
    expected = open_dual_encoder(folder, CPU).encode_texts(TEXTS)
    shutil.rmtree(folder / "xlm-roberta-base")
    monkeypatch.setitem(ours_of_open_clip.TEXT_TOWERS, "xlm-roberta-base", ROBERTA)
    assert torch.equal(open_dual_encoder(folder, CPU).encode_texts(TEXTS), expected)
