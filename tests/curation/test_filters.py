"""Filters: every dropped caption is counted under its reason, on every engine; bad filters get a one-line error."""

import importlib
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc import jobs
from mc2_hpc.cli import main
from mc2_hpc.curation.explain import explain
from mc2_hpc.curation.filters import Length, Pattern, parse_filter
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.matched import read_matched
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local, Ray, Slurm
from mc2_hpc.reading.json_file import ANYTHING, read_json

MODULE = '''
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc


@dataclass(frozen=True)
class Words:
    """Drops captions with a word of the list, and everything in one language."""

    words: Path
    lang: str = ""
    loudly: bool = False

    def drop_reasons(self, rows):
        listed = self.words.read_text(encoding="utf-8").split()
        return [self.reason(text, lang, listed) for text, lang in zip(*(rows[c].to_pylist() for c in ("text", "lang")))]

    def reason(self, text, lang, listed):
        if lang == self.lang:
            return "LANGUAGE" if self.loudly else "language"
        return "listed_word" if set(text.split()) & set(listed) else None


class Answers:
    """Answers what it is told to."""

    def __init__(self, answer: str):
        self.answer = answer

    def drop_reasons(self, rows):
        return eval(self.answer, {"rows": rows, "pa": pa, "pc": pc})


class Picky:
    def __init__(self, least: int, listed: Path = Path("none")):
        if least > 9:
            raise RuntimeError("too much")
        self.listed = listed

    def drop_reasons(self, rows):
        return [None] * len(rows)


class NoMethod:
    def filter(self, rows):
        return True


class OtherMethod:
    def drop_reasons(self):
        return []


not_a_class = len
'''


@pytest.fixture
def module(tmp_path, monkeypatch, module_of) -> str:
    """Name of a module of filters in the working folder, where ``mc2`` finds user modules."""
    monkeypatch.chdir(tmp_path)
    return module_of(MODULE)


@pytest.fixture
def pool(make_pool) -> Path:
    """Four shards of 20 English captions (``a big dog 1``) and 10 German ones (``Hund und Katze 0``)."""
    return make_pool(4)


LENGTH = "mc2_hpc.curation.filters.Length"
PATTERN = "mc2_hpc.curation.filters.Pattern"


def match(pool: Path, out: Path, *filters, engine=None):
    return jobs.run(plan_match(pool, pool.parent / "metadata", out, filters=filters), engine)


@pytest.fixture
def listed(module, tmp_path):
    """Drops captions 1 and 2 of each shard (English) and 27 (German)."""
    (tmp_path / "words.txt").write_text("1 2 27")
    return parse_filter([f"{module}.Words", f"words={tmp_path}/words.txt", "lang=xx", "loudly=true"])


def test_options_have_the_types_of_the_constructor(module, tmp_path):
    words = parse_filter([f"{module}.Words", "words=a b.txt", "loudly=true", "lang=1e3"])
    assert words.arguments == {"words": "a b.txt", "loudly": True, "lang": "1e3"}
    loaded = words.load()
    assert loaded.words == Path("a b.txt") and loaded.loudly is True
    assert parse_filter([f"{module}.Picky", "least=3"]).arguments == {"least": 3}
    assert parse_filter([f"{module}.Picky", "least=3", "listed=a"]).load().listed == Path("a")
    assert parse_filter([PATTERN, "drop=a=b,(c|d)"]).load() == Pattern(drop="a=b,(c|d)")


def test_drops_are_counted_in_stats_balance_and_report(pool, listed, module, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    words = ["curate", "run", str(pool), "--metadata", "metadata", "--t-en", "10", "--out", "out", "--workers", "1"]
    flags = ["--filter", f"{module}.Words", "words=words.txt", "--filter", LENGTH, "max_characters=11"]
    assert main([*words, *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    # Of a shard's 30 captions, 27 are not listed; 4, 5, 7 and 8 in English have the 11 characters of "a big dog 4".
    drops = {"listed_word": 4 * 3, "too_long": 4 * (27 - 4)}
    assert result["match"]["drops"] == result["balance"]["drops"] == drops
    assert (result["match"]["rows"], result["match"]["captions"]) == (120, {"en": 16})
    defaults = {"min_characters": 0, "min_words": 0, "max_words": None}  # recorded too: they decide as much
    assert read_json(tmp_path / "out" / "matched" / "match.json", ANYTHING)["filters"] == [
        {"name": f"{module}.Words", "arguments": {"words": "words.txt", "lang": "", "loudly": False}},
        {"name": LENGTH, "arguments": {"max_characters": 11, **defaults}},
    ]
    page = (tmp_path / "out" / "report" / "curation.html").read_text(encoding="utf-8")
    assert "listed_word" in page and "too_long" in page


def test_the_examples_filter(examples):
    """The filter in examples/ is loaded by name, and each of its reasons occurs."""
    one = parse_filter(["caption_filters.NoAdvertisements", "most_prices=1"]).load()
    texts = ["a red car", "a red car for $5", "from $5 to 7 €", "red cars, buy now"]
    assert one.drop_reasons(pa.table({"text": texts})) == [None, None, "price", "call_to_buy"]


def test_rows_that_are_kept_are_those_without_a_filter(pool, listed, tmp_path):
    match(pool, tmp_path / "plain")
    match(pool, tmp_path / "filtered", listed)
    for shard in range(4):
        rows, kept = (read_matched(tmp_path / name / f"{shard}.parquet").to_pylist() for name in ("plain", "filtered"))
        assert kept == [row for row in rows if not {"1", "2", "27"} & set(row["text"].split())]
        assert len(kept) == len(rows) - 3


def test_workers_find_the_module_and_change_nothing(pool, listed, tmp_path, outputs):
    one = match(pool, tmp_path / "one", listed, engine=Local())
    assert match(pool, tmp_path / "two", listed, engine=Local(2)) == one
    assert outputs(tmp_path / "one") == outputs(tmp_path / "two")


def test_ray_finds_the_module(pool, listed, tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'mc2_hpc[ray]')")
    assert match(pool, tmp_path / "out", listed, engine=Ray(workers=2))["drops"] == {"listed_word": 12}


def test_slurm_finds_the_module(slurm_cluster, pool, listed, tmp_path, monkeypatch):
    for name in ("SLURM_CONF", "PATH"):
        monkeypatch.setenv(name, slurm_cluster.env[name])
    monkeypatch.setattr("mc2_hpc.jobs.slurm_queue.POLL_S", 0.5)
    engine = Slurm({"partition": slurm_cluster.partition, "time": "10"}, tasks=2, wait=True)
    assert match(pool, tmp_path / "out", listed, engine=engine)["drops"] == {"listed_word": 12}


def test_other_filters_refuse_the_folder(pool, listed, tmp_path):
    match(pool, tmp_path / "filtered", listed)
    match(pool, tmp_path / "filtered", listed)  # the same filters continue
    match(pool, tmp_path / "plain")
    longer = parse_filter([LENGTH, "min_words=2"])
    for folder, filters in (("filtered", ()), ("filtered", (listed, longer)), ("plain", (listed,))):
        with pytest.raises(UserError, match="match.json: this folder was made with another filters"):
            match(pool, tmp_path / folder, *filters)


def test_folders_without_filters_are_as_they_were(pool, tmp_path):
    """Pools made before filters existed, or without filters, have the same bytes."""
    match(pool, tmp_path / "out")
    assert "filters" not in read_json(tmp_path / "out" / "match.json", ANYTHING)


def test_explain_names_the_reason(pool, listed, tmp_path):
    match(pool, tmp_path / "out", listed)
    told = [explain(f"a dog {n}", tmp_path / "metadata", matched=tmp_path / "out", lang="en") for n in (1, 3)]
    assert [one.drop_reason for one in told] == ["listed_word", None]


@pytest.mark.parametrize(
    "words, message",
    [
        (["Length"], "--filter Length: write it as package.module.Name; built in, in mc2_hpc.filters: Length, "),
        (["no.such.Filter"], "--filter no.such.Filter: no module 'no.such' can be imported"),
        (["{}.Nothing"], "module {} has no 'Nothing'"),
        (["broken_{}.Filter"], "module broken_{} fails to load: ZeroDivisionError: division by zero (broken_{}.py:1)"),
        (["needs_{}.Filter"], "no module 'needs_{}' can be imported (no module 'not_there')"),
        (["{}.not_a_class"], "is not a class; a filter is a class with a method drop_reasons(rows)"),
        (["{}.NoMethod"], "a filter needs a method drop_reasons(self, rows)"),
        (["{}.OtherMethod"], "a filter needs a method drop_reasons(self, rows)"),
        (["{}.Words"], "missing a required argument: 'words'; its options: (words: pathlib"),
        (["{}.Words", "pool"], "--filter {}.Words pool: write it as --filter package.module.Class key=value"),
        (["{}.Words", "least=1"], "no option 'least'; it has words, lang, loudly"),
        (["{}.Words", "words=x", "loudly=perhaps"], "--filter {}.Words loudly=perhaps: Expected `bool`, got `str`"),
        (["{}.Picky", "least=many"], "--filter {}.Picky least=many: Expected `int`, got `str`"),
        (["{}.Picky", "least=10"], "--filter {}.Picky: constructing it failed: RuntimeError: too much"),
        ([LENGTH, "min_words=5", "max_words=2"], "no length is from 5 to 2"),
        ([PATTERN], "give drop=REGEX, keep=REGEX, or both"),
        ([PATTERN, "drop=("], "'(' is not a valid regular expression"),
    ],
)
def test_a_filter_that_cannot_be_made_is_one_line(pool, module, tmp_path, capsys, words, message):
    (tmp_path / f"broken_{module}.py").write_text("1 / 0")
    (tmp_path / f"needs_{module}.py").write_text("import not_there")
    words = [word.format(module) for word in words]
    command = ["curate", "match", str(pool), "--metadata", "metadata", "--out", "out", "--filter", *words]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert message.format(*[module] * 2) in error and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "answer, message",
    [
        ("1 / 0", "drop_reasons raised ZeroDivisionError: division by zero (<string>:1)"),
        ("(None if row else 1 / 0 for row in range(30))", "drop_reasons raised ZeroDivisionError"),
        ("True", "drop_reasons must return None (keep) or a string (the reason) for each of 30 rows, not bool"),
        ("'too_short'", "for each of 30 rows, not str"),
        ("None", "for each of 30 rows, not NoneType"),
        ("[None]", "for each of 30 rows, but returned 1"),
        ("[True] * 30", "for each of 30 rows; one of them is True"),
        ("[(False, 'short')] * 30", "one of them is (False, 'short')"),
        ("[''] * 30", "'' is not a reason; use a short name such as 'too_short'"),
        ("['a\\nb'] * 30", "is not a reason"),
        ("pa.array([1] * 30)", "it returned a column of int64"),
        ("pc.utf8_length(rows['text'])", "it returned a column of int"),
    ],
)
def test_an_answer_that_is_none_is_one_line(pool, module, tmp_path, answer, message):
    (pool / "0.parquet").rename(tmp_path / "one.parquet")
    for path in pool.iterdir():
        path.unlink()
    (tmp_path / "one.parquet").rename(pool / "0.parquet")
    with pytest.raises(UserError) as error:
        match(pool, tmp_path / "out", parse_filter([f"{module}.Answers", f"answer={answer}"]))
    told = str(error.value)
    assert told.startswith(f"filter {module}.Answers: ") and message in told and told.isprintable(), told
    assert not (tmp_path / "out" / "0.parquet").exists()


@pytest.mark.parametrize(
    "answer", ["pa.nulls(30)", "[None] * 30", "pa.array(['x'] * 15 + [None] * 15).dictionary_encode()"]
)
def test_answers_that_arrow_knows(make_pool, module, tmp_path, answer):
    drops = match(make_pool(1), tmp_path / "out", parse_filter([f"{module}.Answers", f"answer={answer}"]))["drops"]
    assert drops == ({"x": 15} if "x" in answer else {})


def reasons(one, texts):
    rows = pa.table({name: pa.array(texts, pa.large_string()) for name in ("key", "text", "lang")})
    return one.drop_reasons(rows).to_pylist()


@given(st.lists(st.text("a é犬 \u00a0\n", max_size=12)), st.integers(0, 4), st.integers(4, 8))
def test_length_equals_a_naive_count(texts, least, most):
    def naive(count):
        return "too_short" if count < least else "too_long" if count > most else None

    stripped = [text.strip() for text in texts]
    assert reasons(Length(min_characters=least, max_characters=most), texts) == [naive(len(text)) for text in stripped]
    words = [naive(len(text.split()) or 1) for text in stripped]  # matching never gets a blank caption
    assert reasons(Length(min_words=least, max_words=most), texts) == words


def test_pattern():
    texts = ["a dog", "see http://x", "犬", "a"]
    assert reasons(Pattern(drop="https?://"), texts) == [None, "pattern", None, None]
    assert reasons(Pattern(keep=r"\p{Latin}{2}", reason="not_latin"), texts) == [None, None, "not_latin", "not_latin"]
    assert reasons(Pattern(keep="a", drop="dog"), texts) == ["pattern", "pattern", "pattern", None]


def test_a_pool_in_pieces_and_empty_shards(make_pool, listed, tmp_path, monkeypatch):
    pool = make_pool(2)
    empty = pa.table({name: pa.array([], pa.string()) for name in ("key", "text", "lang")})
    pq.write_table(empty, pool / "9.parquet")
    whole = match(pool, tmp_path / "whole", listed)
    monkeypatch.setattr("mc2_hpc.curation.pool.captions.BATCH_ROWS", 7)
    assert match(pool, tmp_path / "pieces", listed) == whole


def test_the_example_of_the_docs(make_pool, tmp_path, monkeypatch, capsys):
    """The class and the command in docs/curation.md, unchanged."""
    docs = (Path(__file__).parents[2] / "docs" / "curation.md").read_text(encoding="utf-8")
    code = docs.partition("```python\n")[2].partition("```")[0]
    command = next(line for line in docs.splitlines() if "--filter my_filters." in line)
    make_pool(2)
    (tmp_path / "my_filters.py").write_text(code, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_filters", raising=False)  # of the other page with an example
    importlib.invalidate_caches()
    words = command.strip().removeprefix("mc2 ").split()
    assert main([*words, "--workers", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["drops"] == {"digits": 2 * 20}
