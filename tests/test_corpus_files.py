"""Local files of the corpus: every format is read in parts, and every fault gives one sentence."""

import gzip
import json
import shutil
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet
import pytest
import yaml
import zstandard
from conftest import ROOT
from stages import refusal, run, write_mix

import download_corpus
from longyarn.config.load import complete
from longyarn.config.validation import with_defaults
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.data import local_files
from longyarn.data.documents import Collections, read_shards

SCHEMA = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text(encoding="utf-8"))
ENTRY = SCHEMA["properties"]["corpus"]["properties"]["files"]["items"]

RECORDS = [{"text": "One.", "n": 1}, {"text": "Two, naïve.", "n": 2}, {"text": "三。", "n": 3}]
TEXTS = {f"mine/part/{number}": record["text"] for number, record in enumerate(RECORDS)}


def entry(pattern, **keys) -> dict:
    """Return an entry of corpus.files with its defaults."""
    return with_defaults({"collection": "mine", "files": str(pattern)} | keys, ENTRY)


def arguments(directory: Path, *entries: dict) -> list:
    return [
        "--files", json.dumps(entries), "--cache", directory / "cache",
        "--manifest", directory / "corpus.json", "--output", directory / "corpus",
    ]  # fmt: skip


def corpus(directory: Path, *entries: dict, skip_bad=False) -> dict[str, str]:
    """Run the stage; return the texts by id."""
    run(download_corpus, *arguments(directory, *entries), *(["--skip-bad"] if skip_bad else []))
    return {
        d["id"]: d.get("text", d.get("messages")) for d in read_shards(directory / "corpus.json")
    }


def facts(directory: Path, collection="mine") -> dict:
    return manifest.read(directory / "corpus.json")["facts"]["collections"][collection]


def refused(directory: Path, *entries: dict, skip_bad=False) -> str:
    flag = ["--skip-bad"] if skip_bad else []
    sentence = refusal(download_corpus, *arguments(directory, *entries), *flag)
    assert not (directory / "corpus").exists() and not (directory / "corpus.json").exists()
    return sentence


def jsonl(records) -> bytes:
    return b"".join(json.dumps(record).encode() + b"\n" for record in records)


def write(kind: str, path: Path) -> None:
    """Write the records in a format."""
    table = pyarrow.Table.from_pylist(RECORDS)
    if kind == "jsonl":
        path.write_bytes(jsonl(RECORDS))
    elif kind == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=2)
    elif kind == "arrow":
        pyarrow.feather.write_feather(table, path, compression="uncompressed")
    else:
        with pyarrow.ipc.new_stream(path, table.schema) as stream:
            stream.write_table(table)


COMPRESS = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "stream"])
def test_records_of_every_format_plain_and_compressed(tmp_path, kind, ending):
    name = {"stream": "arrow"}.get(kind, kind)
    write(kind, tmp_path / "plain")
    content = COMPRESS[ending]((tmp_path / "plain").read_bytes())
    (tmp_path / f"part.{name}{ending}").write_bytes(content)
    assert corpus(tmp_path, entry(tmp_path / "part.*")) == TEXTS
    assert facts(tmp_path)["characters"] == sum(map(len, TEXTS.values()))


def test_text_and_markdown_are_a_document_each(tmp_path):
    books = tmp_path / "books"
    (books / "A Part").mkdir(parents=True)
    (books / "A Part" / "One Book.txt").write_bytes(b"\xef\xbb\xbftext\r\nmore\n\n")
    (books / "two.md").write_text("---\ntitle: Two\n---\n\n# Two\n\n---\n\nprose\n")
    (books / "三国.txt.gz").write_bytes(gzip.compress("话说".encode()))
    (books / "empty.txt").write_text(" \n")
    assert corpus(tmp_path, entry(books / "**" / "*.*", licence="mine alone")) == {
        "mine/a_part/one_book": "text\nmore\n",
        "mine/two": "# Two\n\n---\n\nprose\n",
        "mine/三国": "话说\n",
    }
    assert facts(tmp_path) == {
        "source": "files **/*.*", "licence": "mine alone", "documents": 3,
        "characters": 31, "empty_documents": 1, "bad_records": 0,
    }  # fmt: skip


def test_columns_by_name_and_inside_others(tmp_path):
    records = [{"meta": {"body": f"text {n}"}, "key": f"k{n}"} for n in range(3)]
    (tmp_path / "a.jsonl").write_bytes(jsonl(records))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "b.parquet")
    both = [
        entry(tmp_path / name, collection=name[0], column="meta.body", id_column="key")
        for name in ("a.jsonl", "b.parquet")
    ]
    found = corpus(tmp_path, *both)
    assert found == {f"{name}/k{n}": f"text {n}" for name in "ab" for n in range(3)}


def test_an_instruction_set_becomes_messages(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        jsonl([
            {"instruction": "Add.", "input": "1 and 2", "output": "3"},
            {"instruction": "Say hello.", "input": "", "output": "Hello."},
            {"instruction": "Say nothing.", "input": None, "output": " "},
        ])
    )  # fmt: skip
    talk = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    talk.append({"role": "assistant", "content": "A"})
    extra = [message | {"weight": 1} for message in talk]
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"messages": extra}]))
    alpaca = {"instruction_column": "instruction", "input_column": "input"}
    found = corpus(
        tmp_path,
        entry(tmp_path / "a.jsonl", collection="a", answer_column="output", **alpaca),
        entry(tmp_path / "b.jsonl", collection="b", messages_column="messages"),
    )
    assert found == {
        "a/a/0": [
            {"role": "user", "content": "Add.\n\n1 and 2"}, {"role": "assistant", "content": "3"},
        ],
        "a/a/1": [
            {"role": "user", "content": "Say hello."}, {"role": "assistant", "content": "Hello."},
        ],
        "b/b/0": talk,
    }  # fmt: skip
    assert facts(tmp_path, "a")["empty_documents"] == 1, "an answer of blanks is none"


def test_equal_files_elsewhere_give_an_equal_manifest_and_others_do_not(tmp_path):
    manifests = []
    for place in ("here", "there", "changed"):
        (tmp_path / place / "texts").mkdir(parents=True)
        text = "other" if place == "changed" else "text"
        (tmp_path / place / "texts" / "a.txt").write_text(text)
        corpus(tmp_path / place, entry(tmp_path / place / "texts" / "*.txt"))
        manifests.append((tmp_path / place / "corpus.json").read_text())
    assert manifests[0] == manifests[1]
    assert json.loads(manifests[2])["settings"] != json.loads(manifests[0])["settings"]
    assert str(tmp_path) not in "".join(manifests)


def test_a_large_file_is_never_held_whole(tmp_path):
    record = json.dumps({"text": "word " * 20_000}).encode() + b"\n"
    with gzip.open(tmp_path / "a.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(400):  # 40 MB
            file.write(record)
    found = local_files.read(entry(tmp_path / "a.jsonl.gz"), Collections().open("mine", "files"))
    tracemalloc.start()
    assert sum(1 for _ in found) == 400
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4e6


# Faults in files


BAD = {
    "not JSON": (b'{"text": "cut off\n', "a.jsonl line 2 is not JSON (Invalid control char"),
    "not UTF-8": (b'{"text": "\xff"}\n', "a.jsonl line 2 is not utf-8 ('utf-8' codec can't"),
    "no column": (b'{"body": "x"}\n', "a.jsonl line 2 has no column 'text'; it has 'body'"),
    "no object": (b"[1]\n", "a.jsonl line 2 is not an object with columns"),
    "a number": (b'{"text": 7}\n', "a.jsonl line 2 has a number in 'text' instead of text"),
    "a surrogate": (b'{"text": "\\ud800"}\n', "a.jsonl line 2 has half of a surrogate pair"),
    "nested too deep": (b"[" * 100_000 + b"\n", "a.jsonl line 2 is not JSON"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_line_stops_or_is_counted(tmp_path, case):
    line, sentence = BAD[case]
    good = jsonl(RECORDS[:1])
    (tmp_path / "a.jsonl").write_bytes(good + line + b"\n" + good)
    said = refused(tmp_path, entry(tmp_path / "*.jsonl"))
    assert f"{tmp_path}/{sentence}" in said
    assert "correct it or its entry in corpus, or set corpus.skip_bad to true to skip" in said
    assert list(corpus(tmp_path, entry(tmp_path / "*.jsonl"), skip_bad=True)) == [
        "mine/a/0", "mine/a/2",
    ]  # fmt: skip
    found = facts(tmp_path)
    assert (found["documents"], found["bad_records"]) == (2, 1)
    assert found["bad_examples"][0].startswith(sentence)


MESSAGES = {
    "text": ("hello", "has text as its messages instead of a list"),
    "no role": ([{"content": "x"}], "has a message without role and content"),
    "a role": (
        [{"role": "tool", "content": "x"}],
        "has a message with the role 'tool', not one of s",
    ),
    "content": ([{"role": "user", "content": 1}], "has a number in 'content'"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_a_bad_conversation(tmp_path, case):
    value, sentence = MESSAGES[case]
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"messages": value}]))
    said = refused(tmp_path, entry(tmp_path / "a.jsonl", messages_column="messages"))
    assert f"a.jsonl line 1 {sentence}" in said


def test_text_of_another_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("naïve".encode("latin-1"))
    (tmp_path / "b.txt").write_text("b")
    assert "a.txt is not utf-8 (" in refused(tmp_path, entry(tmp_path / "*.txt"))
    assert corpus(tmp_path, entry(tmp_path / "*.txt"), skip_bad=True) == {"mine/b": "b\n"}
    found = corpus(tmp_path, entry(tmp_path / "a.txt", encoding="latin-1"))
    assert found == {"mine/a": "naïve\n"}


def test_parquet_whose_text_is_not_utf8(tmp_path):
    broken = pyarrow.array([b"good", b"\xff\xfe", b"good too"]).cast(pyarrow.string(), safe=False)
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), tmp_path / "a.parquet")
    assert "a.parquet record 1 is not utf-8" in refused(tmp_path, entry(tmp_path / "a.parquet"))
    found = corpus(tmp_path, entry(tmp_path / "a.parquet"), skip_bad=True)
    assert list(found.values()) == ["good", "good too"]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_without_the_column(tmp_path, kind):
    write(kind, tmp_path / f"a.{kind}")
    said = refused(tmp_path, entry(tmp_path / "a.*", column="body"), skip_bad=True)
    assert (
        f"a.{kind} has no column 'body'; it has 'text', 'n'; correct the column in corpus" in said
    )


@pytest.mark.parametrize("name", ["jsonl.gz", "jsonl.zst", "txt.gz", "parquet", "arrow"])
@pytest.mark.parametrize("damage", ["cut off", "another kind"])
def test_a_damaged_file(tmp_path, name, damage):
    kind, _, ending = name.partition(".")
    write("jsonl" if kind == "txt" else kind, tmp_path / "plain")
    content = COMPRESS[f".{ending}" if ending else ""]((tmp_path / "plain").read_bytes())
    content = content[: len(content) * 2 // 3] if damage == "cut off" else b"no such file at all"
    (tmp_path / f"a.{name}").write_bytes(content)
    said = refused(tmp_path, entry(tmp_path / "a.*"), skip_bad=True)
    assert f"a.{name} is damaged or not a" in said and "; restore it" in said


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst"])
def test_a_compressed_file_without_a_byte(tmp_path, name):
    (tmp_path / name).touch()
    assert f"{name} is empty" in refused(tmp_path, entry(tmp_path / "a.*"), skip_bad=True)


def test_patterns_and_names(tmp_path):
    said = refused(tmp_path, entry("nowhere/**/*.txt"))
    assert "corpus.files finds no file that matches 'nowhere/**/*.txt'; correct the pattern" in said
    (tmp_path / "a.pdf").write_bytes(b"x")
    said = refused(tmp_path, entry(tmp_path / "*.pdf"))
    assert "a.pdf does not tell its format; set format in corpus.files (text, markdown" in said
    (tmp_path / "b.txt").write_text(" ")
    said = refused(tmp_path, entry(tmp_path / "*.txt"))
    assert "collection mine has no documents (1 empty, 0 bad); correct its entry in corpus" in said
    (tmp_path / "b.md").write_text("b")
    (tmp_path / "b.txt").write_text("b")
    said = refused(tmp_path, entry(tmp_path / "b.*"))
    assert "two documents have the id 'mine/b'; change the collection or name of one" in said


CORPUS = {
    "held_out": ["mine/a"],
    "files": [{"collection": "mine", "files": "*.txt"}],
}
MISTAKES = {
    "empty": ({"files": []}, "corpus is empty; state corpus.packages, corpus.files or corpus.dat"),
    "names": (
        {"files": [CORPUS["files"][0]] * 2},
        "two sources of corpus have the collection 'mine'; give one another name",
    ),
    "half": (
        {"files": [CORPUS["files"][0] | {"instruction_column": "i"}]},
        "collection 'mine' of corpus has part of an instruction set; state instruction_column and",
    ),
    "both": (
        {
            "files": [
                CORPUS["files"][0]
                | {"instruction_column": "i", "answer_column": "a", "messages_column": "m"}
            ]
        },
        "states messages_column and instruction_column; leave one null",
    ),
    "format": (
        {"files": [CORPUS["files"][0] | {"format": "pdf"}]},
        "must be one of text, markdown, jsonl, parquet, arrow, null",
    ),
    "counted": (
        {"held_out_documents": {"mein": 2}},
        "corpus.held_out_documents names the collection 'mein', which no source has; the corpus has",
    ),
    "conversations cut": (
        {"files": [CORPUS["files"][0] | {"messages_column": "messages"}]},
        "mix.packing concat would cut the conversations of 'mine', so that answers lose their questions",
    ),
    "none counted": ({"held_out": [], "held_out_documents": {"x": None}}, "nothing is held out"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_in_the_config_is_one_sentence(case):
    from test_config import MINIMAL, SCHEMA_PATH

    changes, sentence = MISTAKES[case]
    with pytest.raises(UserError) as caught:
        complete(MINIMAL | {"corpus": CORPUS | changes}, SCHEMA_PATH)
    assert sentence in str(caught.value)


def test_a_mix_of_sources_through_the_chain_and_what_a_changed_file_reruns(workspace):
    """Markdown, JSON Lines and Parquet become packed sequences; then one of the files changes."""
    texts = workspace.directory / "texts"
    overrides = {"corpus": write_mix(texts)}
    workspace.snakemake("results/tests/pack.json", overrides=overrides)
    results = workspace.directory / "results" / "tests"
    found = manifest.read(results / "corpus.json")["facts"]["collections"]
    assert {name: each["documents"] for name, each in found.items()} == {
        "books": 2, "short": 40, "rows": 4,
    }  # fmt: skip
    packed = manifest.read(results / "pack.json")["facts"]
    assert packed["sequences"] == 16
    held_out = manifest.read(results / "tokens.json")["facts"]["held_out"]
    assert [document["id"] for document in held_out] == ["books/book0", "rows/rows/0"]
    assert "download_corpus" not in workspace.planned(overrides, "results/tests/pack.json")
    (texts / "book1.md").write_text("# Another\n\n" + "Here we go. " * 3000)
    planned = workspace.planned(overrides, "results/tests/pack.json")
    assert {"download_corpus", "tokenise", "pack"} <= planned.keys()
    shutil.rmtree(workspace.directory / "results")
