"""Settings mean what is written: texts, numbers, overrides, references, and one-line errors."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.reading.settings import PathName, Prose, typed, typed_arguments
from mc2_hpc.reading.yaml_file import Section, read_yaml

WORDS = [
    "2024_11",
    "1:30",
    "on",
    "no",
    "1e3",
    "007",
    "0x10",
    "0o7",
    ".5",
    "1_000",
    "2024-11-28",
    "yes",
    "=",
    "{en,de}/*",
]


@dataclass(frozen=True, kw_only=True)
class Part:
    name: str = "part"
    share: float = 0.5
    size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Whole:
    title: str = "untitled"
    note: Prose = ""
    folder: PathName | None = None
    steps: int = 1
    rate: float = 0.1
    fast: bool = False
    scale: tuple[float, float] = (0.5, 1.0)
    languages: list[str] = field(default_factory=list)
    sources: str | list[str] = ""
    part: Part = field(default_factory=Part)
    parts: dict[str, Part] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)
    later: Section = Section({}, "")


def test_only_a_path_has_a_home(read, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    found = read("title: ~/x\nfolder: ~/x\n")
    assert (found.title, found.folder) == ("~/x", "/home/ann/x")
    assert read("title: a", "folder=~nobody-here/x").folder == "~nobody-here/x"
    assert read("title: a", "folder=null").folder is None


@pytest.fixture
def read(tmp_path):
    def read(text, *overrides):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return typed(Whole, read_yaml(path, "config file"), overrides, source=str(path))

    return read


@pytest.mark.parametrize("word", [*WORDS[:-1], "run#3", "a:b"])
def test_a_text_is_the_text_that_was_written(read, word):
    found = read(f"title: {word}\nfolder: {word}\nlanguages: [{word}, 'no']\n")
    assert found == Whole(title=word, folder=word, languages=[word, "no"])


@pytest.mark.parametrize(
    "word", [*WORDS, "run #3", "'q'", '"q"', "a: b", "[x", "~", " x", "null", "#", "&a", "!x", "*x"]
)
def test_the_text_of_an_override_is_literal(read, word):
    assert read("steps: 2", f"title={word}") == Whole(title=word, steps=2)


def test_quotes_of_a_file_are_yamls(read):
    assert read("title: 'run #3'\nfolder: \"null\"\n") == Whole(title="run #3", folder="null")
    assert read("folder: null", "folder=x").folder == "x" and read("folder: x", "folder=null").folder is None
    assert read("note: |\n  two\n  lines\n").note == "two\nlines\n"


@pytest.mark.parametrize("word, number", [("3", 3), ("-3", -3), ("500_000", 500_000), ("+1", 1), (" 7 ", 7)])
def test_whole_numbers(read, word, number):
    assert read(f"steps: {word}").steps == read("{}", f"steps={word}").steps == number


@pytest.mark.parametrize("word, number", [("3", 3.0), ("1e-4", 1e-4), (".5", 0.5), ("1.", 1.0), ("4.0E+2", 400.0)])
def test_numbers(read, word, number):
    found = read(f"rate: {word}").rate
    assert found == read("{}", f"rate={word}").rate == number and isinstance(found, float)


@pytest.mark.parametrize("word, value", [("on", True), ("true", True), ("No", False), ("off", False), ("FALSE", False)])
def test_booleans(read, word, value):
    assert read(f"fast: {word}").fast is read("{}", f"fast={word}").fast is value


def test_what_has_no_type_is_what_it_looks_like(read):
    found = read("anything: {a: 1, b: 1.5, c: true, d: ~, e: on, f: '1', g: 007, h: 2024_11, i: [x, 1e3]}").anything
    assert found == {
        **{"a": 1, "b": 1.5, "c": True, "d": None, "e": "on", "f": "1", "g": "007", "h": "2024_11"},
        "i": ["x", 1000.0],
    }


def test_overrides_reach_into_sections(read):
    found = read(
        "part: {name: x, size: 3}\nparts: {a: {size: 1}}", "part={size: 4}", "parts.a.share=1", "parts.b.size=2"
    )
    assert found.part == Part(name="x", size=4)
    assert found.parts == {"a": Part(size=1, share=1.0), "b": Part(size=2)}
    assert read("{}", "scale=[0.1, 1]", "languages=[en, no]", "anything.x=[1]") == Whole(
        scale=(0.1, 1.0), languages=["en", "no"], anything={"x": [1]}
    )


def test_one_text_or_several(read):
    assert read("sources: [a, 007]").sources == ["a", "007"] and read("sources: 1e3").sources == "1e3"
    assert read("{}", "sources=[a, b]").sources == ["a", "b"] and read("{}", "sources=[ab]*.tar").sources == "[ab]*.tar"


def test_anchors_and_merge_keys(read):
    found = read("parts:\n  a: &a {name: x, size: 1}\n  b: *a\n  c:\n    <<: *a\n    size: 2\n")
    assert found.parts == {"a": Part(name="x", size=1), "b": Part(name="x", size=1), "c": Part(name="x", size=2)}


def test_references(read):
    found = read(
        "title: ${part.name}/x\nfolder: ${title}/y\nnote: $${title} and $x\npart: {size: 2}", "steps=${part.size}"
    )
    assert found == Whole(title="part/x", folder="part/x/y", note="${title} and $x", steps=2, part=Part(size=2))
    assert read("later: {a: '${title}'}", "title=x").later.entries["a"].text == "x"


def test_a_section_that_is_typed_later(read):
    later = read("later: {share: 0.25}", "later.name=007").later
    assert typed(Part, later, source="f") == Part(name="007", share=0.25)
    with pytest.raises(UserError, match=r"run.yaml, line 1: row: unknown key 'shar'; did you mean 'share'\?"):
        typed(Part, read("later: {shar: 1}").later, source="f", within="row: ")


def test_arguments_of_a_function(read):
    def reader(path, names: str = "", train: int = 3, words: "dict[str, list[str]] | None" = None):
        pass

    later = read("later: {names: 007, train: 5, words: {no: [on]}}").later
    assert typed_arguments(reader, later.entries, within="") == {"names": "007", "train": 5, "words": {"no": ["on"]}}
    with pytest.raises(UserError, match="line 1: options.train: must be a whole number in decimal digits, not 'many'"):
        typed_arguments(reader, read("later: {train: many}").later.entries, within="options.")


def test_plain_values_have_exact_types():
    assert typed(Whole, {"steps": 3, "rate": 1, "scale": (0, 1)}, source="f") == Whole(
        steps=3, rate=1.0, scale=(0.0, 1.0)
    )
    assert typed(Whole, {"title": "${title}"}, source="f").title == "${title}"
    for values in (
        {"steps": True},
        {"steps": "3"},
        {"steps": 3.0},
        {"fast": 1},
        {"title": 3},
        {"rate": False},
        {"part": []},
    ):
        with pytest.raises(UserError, match=f"^f: {next(iter(values))}: must be"):
            typed(Whole, values, source="f")


@pytest.mark.parametrize(
    "text, message",
    [
        ("steps: 1\nsteps: 2\n", "line 2: the key 'steps' occurs twice; first in "),
        ("part: {name: a, name: b}", "line 1: the key 'name' occurs twice"),
        ("steps: 1\n\trate: 1\n", "not valid YAML: line 2: a tab where blanks are expected"),
        ("", "line 1: is empty"),
        ("# only words\n", "line 1: is empty"),
        ("---\n...\n", "line 1: is empty"),
        ("- 1\n", "not a mapping of keys"),
        ("a: [1", "not valid YAML: line 1: "),
        ("a: 1\n---\nb: 2\n", "line 2: a second document"),
        ("rate: .inf", "line 1: rate: must be a finite number"),
        ("steps: 1\nrate: nan", "line 2: rate: must be a finite number"),
        ("rate: 1e999", "rate: must be a finite number"),
        ("steps: 1e3", "steps: must be a whole number in decimal digits, not '1e3'"),
        ("steps: 010", "steps: must be a whole number in decimal digits, not '010'"),
        ("steps: 1:30", "steps: must be a whole number in decimal digits, not '1:30'"),
        ("steps: " + "9" * 5000, "has more than 18 digits"),
        ("rate: true", "rate: must be a number, not 'true'"),
        ("fast: maybe", "fast: must be true or false, not 'maybe'"),
        ("title:\n", "title: must be text; quote it if you mean empty text"),
        ("title: [a]", "title: must be text, not a list"),
        ("part: 3", "part: must be a section of keys, not '3'"),
        ("languages: en", "languages: must be a list, such as [first, second], not 'en'"),
        ("scale: [1]", "scale: must be a list of 2 values, not 1"),
        ("scale: [0, x]", "scale[1]: must be a number, not 'x'"),
        ("stepps: 1", "unknown key 'stepps'; did you mean 'steps'?"),
        ("steps: !!int 3", "the tag tag:yaml.org,2002:int: tags are not supported"),
        ("title: !!python/object:os.system x", "tags are not supported"),
        ("[a]: 1", "a key must be one word or text"),
        ("title: *a", "line 1: *a: no such anchor before this line"),
        ("title: &a [*a]", "*a: no such anchor"),
        ("<<: 3", "<<: needs a mapping"),
        ('title: "a\\0b"', "title: the character '\\x00' is not allowed"),
        ('title: "a\\nb"', "title: the character '\\n' is not allowed"),
        (b"title: a\nnote: \xff\n", "line 2: byte 0xff is not UTF-8"),
        (b"title: \x07", "not valid YAML: line 1: the character '\\x07' is not allowed"),
        ("title: ${oc.env:HOME}", "'${oc.env:HOME}' is not ${key.sub} of another setting; write a literal one as $${"),
        ("title: ${HOME}", "${HOME}: there is no such setting"),
        ("title: ${", "'${' is not ${key.sub}"),
        ("title: ${part}", "${part}: there is no such setting"),
        ("title: ${parts}\nparts: {}", "${parts}: is a section of keys, not a single value"),
        ("title: ${folder}\nfolder: ${title}", "refers to itself"),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_one_line_says_what_and_where(read, text, message):
    with pytest.raises(UserError) as error:
        read(text)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "word, message",
    [
        ("[=5", "override '[=5': unknown key '['"),
        ("=x", "override '=x': write it as key.sub=value"),
        ("part..name=1", "override 'part..name=1': write it as key.sub=value"),
        ("steps", "override 'steps': write it as key.sub=value"),
        ("scale[0]=0.5", "set the list as a whole: scale=[first, second]"),
        ("scale.0=0.5", "scale is a value, not a section of keys"),
        ("steps.x=1", "steps is a value, not a section of keys"),
        ("part.nam=x", "unknown key 'part.nam'; did you mean 'part.name'?"),
        ("part=3", "part: is a section of keys: write part.sub=value"),
        ("scale=[0.5", "scale: not valid YAML: line 1: "),
        ("scale={", "scale: not valid YAML: line 1: "),
        ("steps=", "steps: must be a whole number in decimal digits, not ''"),
        ("rate=inf", "override 'rate=inf': rate: must be a finite number"),
        ("title=\udcff", "title: the character '\\udcff' is not allowed"),
        ("title[0]=" + "[" * 5000, "[[[['...: set the list as a whole: title=[first, second]"),
        ("x" * 5000 + "=1", "xxx'...: unknown key 'xxx"),
        ("title=${oc.env:HOME}", "is not ${key.sub} of another setting"),
    ],
)
def test_one_line_for_an_override(read, word, message):
    with pytest.raises(UserError) as error:
        read("{}", word)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 500


def test_what_is_too_deep_or_too_much_ends_soon(read):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    for text, message in (
        ("title: " + "[" * 100_000, "nested more than 50 levels deep"),
        ("title: " + "{a: " * 100_000, "nested more than 50 levels deep"),
        (bomb, "more than 100,000 values after expanding aliases"),
        ("#" * (1 << 20) + "\n", "larger than 1,048,576 bytes"),
    ):
        with pytest.raises(UserError, match=message):
            read(text)
