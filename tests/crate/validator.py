"""The RO-Crate validator, in an environment of its own below .cache/, with no network.

The crate names RO-Crate's context by its address. What is at that address also comes with the library
`rocrate`, in a later version; the terms that moved since are set back. The validator finds it in its cache.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parents[1] / ".cache" / "tests" / "rocrate-validator"
CONTEXT = "https://w3id.org/ro/crate/1.1/context"
# Bioschemas' terms as RO-Crate 1.1 has them.
OF_1_1 = {
    "ComputationalWorkflow": "https://bioschemas.org/ComputationalWorkflow",
    "FormalParameter": "https://bioschemas.org/FormalParameter",
    "input": "https://bioschemas.org/ComputationalWorkflow#input",
    "output": "https://bioschemas.org/ComputationalWorkflow#output",
}
# In the validator's environment: asks for the address once, answered from a file.
FILL = """
import io, sys
from requests import Response
from requests.adapters import BaseAdapter
from requests_cache import CachedSession
from urllib3 import HTTPResponse

class File(BaseAdapter):
    def send(self, request, **options):
        answer = Response()
        answer.status_code, answer.url, answer.request = 200, request.url, request
        answer.headers["Content-Type"] = "application/ld+json"
        content = io.BytesIO(open(sys.argv[2], "rb").read())
        answer.raw = HTTPResponse(content, answer.headers, 200, preload_content=False)
        return answer
    def close(self):
        pass

session = CachedSession(sys.argv[1], backend="sqlite", expire_after=-1)
session.mount("https://", File())
session.get(sys.argv[3])
"""


def environment() -> Path:
    """Return the programs of the validator's environment, made when it is not there."""
    pins = HERE / "validator.txt"
    whole = ENVIRONMENT / "whole"
    if whole.is_file() and whole.read_text() == pins.read_text():
        return ENVIRONMENT / "bin"
    shutil.rmtree(ENVIRONMENT, ignore_errors=True)
    for command in (
        [sys.executable, "-m", "venv", ENVIRONMENT],
        [ENVIRONMENT / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "-r", pins],
    ):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no validator: {done.stderr.strip().splitlines()[-1]}")
    shutil.copyfile(pins, whole)
    return ENVIRONMENT / "bin"


def cache(directory: Path) -> Path:
    """Write the validator's cache of what it would ask the network for."""
    from rocrate.vocabs import RO_CRATE

    context = directory / "context.json"
    context.write_text(json.dumps({"@context": RO_CRATE["@context"] | OF_1_1}))
    command = [environment() / "python", "-c", FILL, directory / "cache", context, CONTEXT]
    subprocess.run(list(map(str, command)), check=True)
    return directory / "cache"


def issues(crate: Path, profile: str, cached: Path, metadata_only: bool = False) -> list[str]:
    """Return what of the required is amiss with a crate by a profile."""
    found = cached.with_name("issues.json")
    found.unlink(missing_ok=True)
    options = ["--offline", "--cache-path", cached, "--profile-identifier", profile]
    options += ["--requirement-severity", "required", "--verbose", "--no-paging"]
    options += ["--output-format", "json", "--output-file", found]
    options += ["--metadata-only"] if metadata_only else []
    command = [environment() / "rocrate-validator", "--disable-color", "validate", *options, crate]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert found.is_file(), done.stdout + done.stderr
    said = json.loads(found.read_text())
    assert said["passed"] == (not said["issues"])
    return [issue["message"] for issue in said["issues"]]
