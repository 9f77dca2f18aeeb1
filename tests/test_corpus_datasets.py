"""Data sets, read by the real client from a hub on this machine: budgets, resumption, refusals."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard
from conftest import ROOT
from stages import one_sentence

from longyarn.config.validation import with_defaults
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.data import documents, hub_datasets
from longyarn.data.columns import characters
from longyarn.data.documents import Collection, read_shards

SCHEMA = yaml.safe_load((ROOT / "schemas/config.schema.yaml").read_text(encoding="utf-8"))
ENTRY = SCHEMA["properties"]["corpus"]["properties"]["datasets"]["items"]
FILES = 8


def entry(repository, **keys) -> dict:
    """Return an entry of corpus.datasets with its defaults."""
    at = {"collection": "pg19", "repository": repository.name, "revision": repository.commit}
    return with_defaults(at | keys, ENTRY)


def stage(hub, directory: Path, *entries: dict, out="corpus", skip_bad=False) -> list:
    """Return the command of the stage and its environment."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    command = [
        sys.executable, ROOT / "scripts/download_corpus.py", "--datasets", json.dumps(entries),
        "--cache", directory / "cache", "--manifest", directory / f"{out}.json",
        "--output", directory / out, *(["--skip-bad"] if skip_bad else []),
    ]  # fmt: skip
    return list(map(str, command)), environment | hub.environment(directory / "home")


def bring(hub, directory: Path, *entries: dict, **options) -> list[dict]:
    """Run the stage; return the documents."""
    command, environment = stage(hub, directory, *entries, **options)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return list(read_shards(directory / f"{options.get('out', 'corpus')}.json"))


def facts(directory: Path, collection="pg19", out="corpus") -> dict:
    return manifest.read(directory / f"{out}.json")["facts"]["collections"][collection]


def noise(seed: int, size: int) -> str:
    """Return text that compresses to about half, so that transferred bytes measure what was read."""
    import random

    return "".join(random.Random(seed).choices("abcdefghijklmnop qrst", k=size))


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> Path:
    """Parquet: 8 files of 50 records of 4,000 characters, a third of them books."""
    directory = tmp_path_factory.mktemp("books")
    (directory / "data").mkdir()
    for file in range(FILES):
        rows = [
            {"text": noise(number, 4000), "meta": {"set": ["book", "web", "web"][number % 3]}, "key": number}
            for number in range(50 * file, 50 * file + 50)
        ]  # fmt: skip
        path = directory / "data" / f"train-{file:05}-of-{FILES:05}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    return directory


def sent(hub) -> int:
    """Return how many bytes of data files the hub has sent since the last call."""
    names = {r.file for r in hub.requests if r.file and r.file.endswith((".parquet", ".zst"))}
    total = sum(hub.sent(name) for name in names)
    hub.requests.clear()
    return total


def test_two_data_sets_a_filter_and_a_budget_that_bounds_what_is_fetched(hub, tmp_path, books):
    """Parquet through its configuration; JSON Lines in zstd, beside a loading script, by file names."""
    lines = tmp_path / "lines"
    (lines / "train").mkdir(parents=True)
    (lines / "lines.py").write_text("raise SystemExit('this script was run')\n")
    for file in range(FILES):
        rows = [{"text": noise(9000 + 50 * file + n, 4000)} for n in range(50)]
        content = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
        (lines / "train" / f"part_{file}.jsonl.zst").write_bytes(zstandard.compress(content))
    parquet, jsonl = hub.dataset("an/books", books), hub.dataset("an/lines", lines)
    found = bring(
        hub,
        tmp_path,
        entry(
            parquet, filter={"meta.set": "book"}, id_column="key", characters=60_000, licence="CC0"
        ),
        entry(jsonl, collection="lines", data_files=["train/*.jsonl.zst"], characters=60_000),
    )
    assert [d["id"] for d in found[:15]] == [f"pg19/{n}" for n in range(0, 45, 3)]
    assert [d["id"] for d in found[15:]] == [f"lines/{n}" for n in range(15)]
    assert found[1]["text"] == noise(3, 4000) and found[16]["text"] == noise(9001, 4000)
    assert facts(tmp_path) == {
        "source": f"an/books at {parquet.commit}", "licence": "CC0", "documents": 15,
        "characters": 60_000, "empty_documents": 0, "bad_records": 0, "records_read": 43,
        "ended_by": "characters",
    }  # fmt: skip
    whole = sum(file.stat().st_size for root in (books, lines) for file in root.rglob("*.*"))
    fetched = sent(hub)
    assert fetched < 0.3 * whole, f"{fetched} of {whole} bytes"
    bring(
        hub,
        tmp_path,
        entry(parquet, filter={"meta.set": "book"}, id_column="key", characters=60_000),
        entry(jsonl, collection="lines", data_files=["train/*.jsonl.zst"], characters=60_000),
        out="again",
    )
    assert not hub.requests, "cached documents are not requested again"
    first, again = (list((tmp_path / name).iterdir()) for name in ("corpus", "again"))
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in again]


def test_killed_and_started_again_it_goes_on_after_its_last_shard(hub, tmp_path):
    """Six files hold two shards of 34 MB. The text compresses well, which keeps the test quick."""
    (tmp_path / "set" / "data").mkdir(parents=True)
    for file in range(6):
        rows = [{"text": f"{file} {row} " + "long text " * 100_000} for row in range(12)]
        path = tmp_path / "set" / "data" / f"train-{file:05}-of-00006.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4)
    repository = hub.dataset("an/set", tmp_path / "set")
    last = "data/train-00005-of-00006.parquet"
    hub.slow(last, 60)
    command, environment = stage(hub, tmp_path, entry(repository))
    running = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    cache, deadline = tmp_path / "cache" / "datasets", time.monotonic() + 100
    while not any(
        r.file == last or r.path.endswith(last) for r in hub.requests if r.method == "GET"
    ):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    running.send_signal(signal.SIGKILL)
    running.wait()
    (position,) = cache.glob("*/position.json")
    before = json.loads(position.read_text())
    assert before["shards"] == 1 and not before["finished"]
    shard = position.with_name("documents-00000.jsonl")
    written = shard.stat().st_mtime_ns
    hub.heal()
    hub.requests.clear()
    resumed = bring(hub, tmp_path, entry(repository))
    assert shard.stat().st_mtime_ns == written, "the finished shard was not written again"
    assert json.loads(position.read_text())["finished"]
    assert [d["id"] for d in resumed] == [f"pg19/{n}" for n in range(72)]
    assert [d["text"][:4] for d in resumed] == [
        f"{f} {r} "[:4] for f in range(6) for r in range(12)
    ]
    assert facts(tmp_path)["records_read"] == 72
    assert not hub.asked("data/train-00001-of-00006.parquet"), "what was taken is not fetched again"
    assert hub.asked("data/train-00004-of-00006.parquet")
    assert hub_datasets.last_position(position.parent)["finished"]
    shard.unlink()
    assert hub_datasets.last_position(position.parent) == hub_datasets.START


def refused(hub, directory: Path, wrong: dict, skip_bad=False) -> str:
    command, environment = stage(hub, directory, wrong, skip_bad=skip_bad)
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert not (directory / "corpus.json").exists()
    return one_sentence(done.stderr.splitlines()[-1])


REFUSED = {
    "split": ({"split": "trein"}, "Bad split: trein. Available splits: ['train']); correct config, s"),
    "column": ({"column": "body"}, "record 0 has no column 'body'; it has 'text', 'meta', 'key'; cor"),
    "repository": ({"repository": "an/other"}, "the hub does not have the data set an/other, or it is p"),
    "null": ({"revision": None}, "corpus.datasets has no revision of an/books; set the commit that y"),
    "gated": ({"repository": "an/gated", "data_files": ["*.parquet"]}, "the hub gates the data set a"),
    "files": ({"data_files": ["x/*.parquet"]}, "an/books cannot be read as configured (At least one va"),
    "kind": ({"data_files": ["x/*.csv"]}, "name files of one format: Parquet, Arrow or JSON Lines"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_had_is_one_sentence(hub, tmp_path, books, case):
    changes, sentence = REFUSED[case]
    repository = hub.dataset("an/books", books)
    if case == "gated":
        changes = changes | {"revision": hub.dataset("an/gated", books, gated=True).commit}
    assert sentence in refused(hub, tmp_path, entry(repository) | changes)


def test_a_loading_script_is_refused_and_not_run(hub, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text("raise SystemExit('run')")
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "a"}\n')
    said = refused(hub, tmp_path, entry(hub.dataset("an/set", tmp_path / "set")))
    assert "an/set needs a loading script, which Longyarn does not run; name its Parquet or" in said


def test_a_malformed_file_of_the_hub(hub, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text('{"text": "a"}\n{"text": \n')
    said = refused(hub, tmp_path, entry(hub.dataset("an/set", tmp_path / "set")))
    assert "an/set cannot be read (" in said


def test_what_the_client_raises_is_one_sentence():
    from datasets import exceptions
    from huggingface_hub.errors import OfflineModeIsEnabled

    at = {"repository": "an/set"}
    damaged = (pyarrow.ArrowInvalid("no JSON"), zstandard.ZstdError("cut"), EOFError("cut"))
    for error in (*damaged, exceptions.DatasetGenerationError("broken")):
        with (
            pytest.raises(UserError, match="an/set cannot be read"),
            hub_datasets.loading_errors(at),
        ):
            raise error
    with (
        pytest.raises(UserError, match="on a machine with a network"),
        hub_datasets.loading_errors(at),
    ):
        raise OfflineModeIsEnabled("offline")
    with pytest.raises(RuntimeError, match="ours"), hub_datasets.loading_errors(at):
        raise RuntimeError("ours")


# Choosing documents of a stream; the tests above cover the client.


def choose(rows: list, skip_bad=False, **keys) -> tuple[list[dict], dict, Collection]:
    """Return the documents chosen from rows, the position after them, and the counts."""
    at = {"collection": "c", "repository": "an/set", "revision": "0" * 40}
    wanted = with_defaults(at | keys, ENTRY)
    position, collection = dict(hub_datasets.START), Collection("an/set", None, skip_bad)
    return list(hub_datasets.chosen(wanted, rows, position, collection)), position, collection


ROWS = [{"text": "x" * size, "kind": size % 2} for size in (5, 0, 20, 8, 30, 9)]


@pytest.mark.parametrize(
    ("keys", "sizes", "ended_by"),
    [
        ({}, [5, 20, 8, 30, 9], "end"),
        ({"min_characters": 10}, [20, 30], "end"),
        ({"filter": {"kind": 1}}, [5, 9], "end"),
        ({"characters": 25}, [5, 20], "characters"),
        ({"characters": 26}, [5, 20, 8], "characters"),
        ({"characters": 25, "filter": {"kind": 0}}, [20, 8], "characters"),
        ({"read_at_most": 30, "filter": {"kind": 1}}, [5], "read_at_most"),
    ],
    ids=str,
)
def test_what_is_chosen_of_a_stream(keys, sizes, ended_by):
    found, position, _ = choose(ROWS, **keys)
    assert [len(d["text"]) for d in found] == sizes
    assert position["ended_by"] == ended_by
    assert position["characters"] == sum(sizes) == sum(map(characters, found))


def test_bad_records_are_counted_and_a_wrong_entry_is_not_read_to_its_end():
    rows = [{"text": "a"}, {"text": 1}, {"other": "b"}, {"text": "\ud800"}, {"text": "c"}]
    found, _, collection = choose(rows, skip_bad=True)
    assert [d["id"] for d in found] == ["c/0", "c/4"]
    assert collection.bad_records == 3
    with pytest.raises(UserError, match="an/set record 1 has a number in 'text'"):
        choose(rows)
    endless = ({"body": "b"} for _ in iter(int, 1))
    with pytest.raises(UserError, match="the first 100 records of an/set are all bad"):
        choose(endless, skip_bad=True)
    with pytest.raises(UserError, match=r"record 0 has no column 'meta\.set'"):
        choose(ROWS, filter={"meta.set": "book"})


def test_the_cache_knows_settings_apart():
    at = {"collection": "c", "repository": "an/set", "revision": "0" * 40}
    one = with_defaults(at, ENTRY)
    changes = ({"revision": "1" * 40}, {"characters": 9}, {"filter": {"a": 1}}, {"collection": "d"})
    keys = {hub_datasets.key(one | change, False) for change in ({}, *changes)}
    assert len(keys | {hub_datasets.key(one, True)}) == 6
    assert hub_datasets.key(one | {"licence": "CC0"}, False) in keys, (
        "no text depends on its licence"
    )


def test_shards_end_with_the_document_that_fills_them(tmp_path):
    texts = iter([{"id": f"c/{n}", "text": "x" * 100} for n in range(7)])
    sizes = []
    while documents.write_shard(tmp_path / "shard", texts, size=300):
        sizes.append(len(list(documents.read_shard(tmp_path / "shard"))))
    assert sizes == [3, 3, 1]


# Checks before the first job


def test_the_preflight_asks_for_files_and_data_sets(hub, workspace, tmp_path, books, monkeypatch):
    for name, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(name, value)
    at = {"collection": "pg19", "repository": "an/books"}
    commit = hub.dataset("an/books", books).commit

    def told(files: list) -> str:
        datasets = [at | {"revision": commit}]
        corpus = {"packages": [], "held_out": [], "held_out_documents": {"pg19": 1}}
        overrides = {"corpus": corpus | {"files": files, "datasets": datasets}}
        done = workspace.snakemake("preflight", overrides=overrides, check=False)
        assert "Traceback" not in done.stdout
        return done.stdout

    assert f"corpus: ok: an/books at {commit}" in told([])
    missing = [{"collection": "mine", "files": "texts/*.md"}]
    assert "error: corpus.files finds no file that matches 'texts/*.md'" in told(missing)


def test_access_is_refused_in_one_sentence(hub, tmp_path, books):
    """Runs in its own process, because the client reads the hub's address when it is imported."""
    code = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from longyarn.core.errors import UserError\nfrom longyarn.data import hub_datasets\n"
        "for entry in json.loads(sys.argv[2]):\n"
        "    try:\n        hub_datasets.check_access(entry)\n        print('ok')\n"
        "    except UserError as error:\n        print(error)\n"
    )
    repository = hub.dataset("an/books", books)
    gated = hub.dataset("an/gated", books, gated=True)
    changes = ({}, {"revision": "0" * 40}, {"repository": "an/no"})
    wrong = [*(entry(repository) | change for change in changes), entry(gated)]
    command = [sys.executable, "-c", code, str(ROOT / "scripts"), json.dumps(wrong)]

    def said(**variables) -> list[str]:
        environment = os.environ | hub.environment(tmp_path / "home") | variables
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    fine, revision, other, licence = said()
    assert fine == "ok"
    assert revision.startswith("the data set an/books has no revision 000")
    assert other.startswith(
        "the hub does not have the data set an/no, or it is private: correct corpus.datasets"
    )
    assert licence.startswith("the hub gates the data set an/gated: accept its terms on its page")
    for line in said(HF_HUB_OFFLINE="1"):
        assert line.startswith("the hub did not deliver the data set an/")
        assert "run `snakemake prefetch` on a machine with a network" in line
