"""``mc2`` except training: metadata, curation and conversion as a user runs them."""

import io
import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mc2_hpc.cli import main
from mc2_hpc.tar import write_tar


@pytest.fixture
def pool(tmp_path):
    """Two shards of 20 grey images with English and German captions."""
    data = io.BytesIO()
    Image.new("RGB", (32, 32), "grey").save(data, "JPEG")
    for shard in range(2):
        keys = [f"{shard}{number:02d}" for number in range(20)]
        texts = ["a red house" if int(key) % 2 else "ein rotes Haus" for key in keys]
        langs = ["en" if int(key) % 2 else "de" for key in keys]
        (tmp_path / "pool").mkdir(exist_ok=True)
        write_tar(tmp_path / "pool" / f"{shard}.tar", ((f"{key}.jpg", data.getvalue()) for key in keys))
        pq.write_table(pa.table({"key": keys, "text": texts, "lang": langs}), tmp_path / "pool" / f"{shard}.parquet")
    return tmp_path / "pool"


@pytest.fixture
def metadata(tmp_path, capsys):
    """Metadata built by the command line from one corpus per language."""
    for lang, text in (("en", "the red house\na house\n"), ("de", "das Haus\nein Haus\n")):
        (tmp_path / "sources" / lang).mkdir(parents=True)
        (tmp_path / "sources" / lang / "corpus.txt").write_text(text * 3, encoding="utf-8")
    caps = ["--cap", "unigram_share=1", "--cap", "bigram_share=1"]
    assert main(["metadata", "build", str(tmp_path / "sources"), "--out", str(tmp_path / "metadata"), *caps]) == 0
    assert json.loads(capsys.readouterr().out)
    return tmp_path / "metadata"


def test_metadata_has_numbers_and_words(metadata):
    entries = json.loads((metadata / "en.json").read_text(encoding="utf-8"))
    assert entries[:3] == ["0", "1", "2"] and {"red", "house"} <= set(entries)


def test_stages_alone_equal_all_in_turn(pool, metadata, tmp_path, capsys):
    common = ["--workers", "1", "--out"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    place = ["--metadata", str(metadata)]
    assert main(["curate", "run", str(pool), *place, "--t-en", "5", *common, str(whole)]) == 0
    assert main(["curate", "match", str(pool), *place, *common, str(parts / "matched")]) == 0
    matched = str(parts / "matched")
    assert main(["curate", "balance", matched, *place, "--t-en", "5", *common, str(parts / "balance")]) == 0
    assert main(["curate", "pack", str(pool), "--matched", matched, *common, str(parts / "shards")]) == 0
    capsys.readouterr()
    for name in ("balance/balance.json", "balance/probs/de.npy", "shards/0.tar", "shards/1.parquet"):
        assert (whole / name).read_bytes() == (parts / name).read_bytes(), name
    balance = json.loads((whole / "balance/balance.json").read_text(encoding="utf-8"))
    assert balance["t"]["en"] == 5 and balance["t"]["de"] >= 1


@pytest.mark.parametrize(
    "words, message",
    [
        (["metadata", "build", "nowhere", "--out", "x"], "nowhere: no language folders"),
        (["metadata", "build", "nowhere", "--out", "x", "--cap", "words=3"], "choose one of unigrams"),
        (["metadata", "build", "nowhere", "--out", "x", "--cap", "titles=many"], "'many' is not a number"),
        (["metadata", "build", "nowhere", "--out", "x", "--segmenter", "ja"], "--segmenter ja: write LANG=NAME"),
        (["metadata", "build", "nowhere", "--out", "x", "--hourly-views", "0"], "--hourly-views 0: must be"),
        (["metadata", "fetch", "--out", "x"], "nothing to fetch"),
        (["metadata", "fetch", "--out", "x", "--wiki", "sw"], "--wiki needs --date"),
        (["metadata", "fetch", "--out", "x", "--pageviews", "noon"], "page views 'noon': write YYYYMMDD-HH"),
        (["curate", "run", "nowhere", "--metadata", "y", "--t-en", "5", "--out", "x", "--workers", "0"], "--workers 0"),
        (["convert", "nowhere", "--to", "open_clip", "--out", "x"], "nowhere"),
        (["bench", "nothing"], "no such benchmark; choose one of checkpoint, contrastive, curation"),
    ],
)
def test_bad_input_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("mc2: ") and error.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_curation_names_what_is_missing(pool, tmp_path, capsys):
    assert (
        main(["curate", "run", str(pool), "--metadata", str(tmp_path), "--t-en", "5", "--out", str(tmp_path / "o")])
        == 2
    )
    assert capsys.readouterr().err.splitlines()[-1].startswith("mc2: ")


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.startswith("mc2_hpc ")


def test_a_terminal_of_ascii_shows_what_it_can(tmp_path):
    """Captions and names in any language are printed as escapes and do not crash."""
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    code = "from mc2_hpc.cli import main; print('before'); code = main(['--help'])"
    command = [sys.executable, "-c", f"import sys\ntry:\n {code}\nexcept SystemExit: print('\u732b', flush=True)"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0 and result.stdout.endswith("\\u732b\n"), result.stderr
    command = [sys.executable, "-m", "mc2_hpc.cli", "train", str(tmp_path / "läufe.yaml")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2 and result.stderr.endswith("l\\xe4ufe.yaml: no such config file\n")


@pytest.mark.parametrize("words", [["eval", "N", "--shards", "x"], ["convert", "N", "--to", "hf", "--out", "x"]])
def test_a_name_that_no_file_can_have(words, capsys):
    name = "9" * 5000
    assert main([name if word == "N" else word for word in words]) == 2
    assert capsys.readouterr().err == f"mc2: {name[:60]}...: a name that is too long for a file\n"


def test_a_locale_without_unicode_writes_names_in_it(tmp_path):
    metadata = tmp_path / "m\u00e4ta"
    metadata.mkdir()
    (metadata / "de.json").write_text('["W\u00f6rter"]', encoding="utf-8")
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    words = ["curate", "explain", "W\u00f6rter", "--lang", "de", "--metadata", str(metadata), "--json", "\u732b.json"]
    command = [sys.executable, "-m", "mc2_hpc.cli", *words]
    result = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, timeout=120)
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "\u732b.json").read_text(encoding="utf-8"))
    assert [match["entry"] for match in found["matches"]] == ["W\u00f6rter"]


def test_a_benchmark_runs_in_the_checkout_and_writes_where_it_was_told(tmp_path, monkeypatch):
    """From any folder: benchmarks are modules in the checkout's root."""
    started = []
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: started.append((a[0], k)) or subprocess.CompletedProcess(a, 3)
    )
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "train", "--quick", "--json", "row.json"]) == 3
    ((command, options),) = started
    row = str(tmp_path / "row.json")
    assert command == [sys.executable, "-m", "benchmarks.bench_train", "--quick", "--json", row]
    assert (options["cwd"] / "benchmarks" / "bench_train.py").is_file()


def test_a_very_long_message_is_shortened_in_the_middle(tmp_path, capsys):
    name = "x" * 100 + "/"
    assert main(["convert", f"{tmp_path}/{name * 30}end", "--to", "open_clip", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mc2: {tmp_path}/xxx") and " [...] " in error and "end: no such folder" in error
    assert len(error) < 820 and error.count("\n") == 1
