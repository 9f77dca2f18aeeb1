"""The entities that a run's RO-Crate consists of: files, values, libraries, images."""

import json
from pathlib import Path, PurePosixPath
from urllib.parse import quote

from longyarn.core import run_directory

RUN_TERMS = "https://w3id.org/ro/terms/workflow-run#"
LICENSE = "https://spdx.org/licenses/Apache-2.0"
FIGURES = "figures"  # the one directory that no manifest lists
MAIN = f"{run_directory.WORKFLOW}/Snakefile"
FORMATS = {
    ".html": "text/html", ".json": "application/json", ".jsonl": "application/jsonl",
    ".md": "text/markdown", ".png": "image/png", ".py": "text/x-python", ".rst": "text/x-rst",
    ".svg": "image/svg+xml",
    ".tsv": "text/tab-separated-values", ".yaml": "application/yaml",
    **dict.fromkeys(("", ".txt", ".log", ".smk", ".in", ".def", ".Dockerfile"), "text/plain"),
}  # fmt: skip


def local(name: str) -> str:
    """Return the identifier of an entity that is not a file."""
    return f"#{quote(name)}"


class Entities:
    """Adds entities to a crate and returns them; an entity that is there already is returned as it is."""

    def __init__(self, crate, run: Path, hashes: dict, manifests: dict, image_hashes: dict) -> None:
        self.crate, self.run = crate, run
        self.hashes, self.manifests, self.image_hashes = hashes, manifests, image_hashes
        self.parts: dict[str, object] = {}  # files and directories by name

    def entity(self, identifier: str, kind: str | list[str], **properties):
        """Return the entity with this identifier, added if it is new; empty properties are left out."""
        from rocrate.model.contextentity import ContextEntity

        known = self.crate.get(identifier)
        if known is not None:
            return known
        kept = {
            key: value[0] if isinstance(value, list) and len(value) == 1 else value
            for key, value in properties.items()
            if value not in (None, [], "")
        }
        return self.crate.add(ContextEntity(self.crate, identifier, {"@type": kind} | kept))

    def value(self, identifier: str, name: str, value: object, **more):
        """Return a named value; a value that is not a number or a text is written as JSON."""
        plain = isinstance(value, int | float | str) and not isinstance(value, bool)
        written = value if plain and value != "" else json.dumps(value, ensure_ascii=False)
        return self.entity(local(identifier), "PropertyValue", name=name, value=written, **more)

    def library(self, name: str, version: str):
        """Return a library in one version."""
        url = f"https://pypi.org/project/{name}/{quote(version)}/"
        if name == "python":
            url = f"https://www.python.org/downloads/release/python-{version.replace('.', '')}/"
        return self.entity(
            url, "SoftwareApplication", name=name, softwareVersion=version, url=url
        )  # fmt: skip

    def image(self, image: str | None):
        """Return the container image that a job ran in, or None."""
        if not image:
            return None
        address, _, digest = image.removeprefix("docker://").partition("@sha256:")
        in_registry = "://" in image
        return self.entity(
            local(f"image/{image}"), "ContainerImage", name=address,
            additionalType={"@id": RUN_TERMS + ("DockerImage" if in_registry else "SIFImage")},
            registry=address.partition("/")[0] if in_registry else None,
            sha256=digest or self.image_hashes.get(image),
        )  # fmt: skip

    def files(self) -> None:
        """Add every file with its size and hash, and the payload directories."""
        for name, digest in self.hashes.items():
            suffix = PurePosixPath(name).suffix
            properties = {
                "contentSize": str((self.run / name).stat().st_size),
                "sha256": digest,
                "encodingFormat": FORMATS.get(suffix, "application/octet-stream"),
            }
            if name == MAIN:
                from rocrate.model.computationalworkflow import ComputationalWorkflow

                kind = ["File", "SoftwareSourceCode", "ComputationalWorkflow", "HowTo"]
                self.parts[name] = self.crate.add_workflow(
                    self.run / name, name, main=True, lang="snakemake", cls=ComputationalWorkflow,
                    properties=properties | {"@type": kind, "name": "Longyarn", "license": LICENSE},
                )  # fmt: skip
            else:
                self.parts[name] = self.crate.add_file(self.run / name, name, properties=properties)
        for name, one in self.manifests.items():
            for directory in run_directory.payload_directories(name, one):
                self.directory(directory)
        self.directory(FIGURES)

    def directory(self, name: str) -> None:
        """Add a directory with its files; nothing if it was purged."""
        inside = [part for file, part in self.parts.items() if file.startswith(f"{name}/")]
        if inside and name not in self.parts:
            properties = {"name": name, "hasPart": inside if len(inside) > 1 else inside[0]}
            added = self.crate.add_dataset(self.run / name, name, properties=properties)
            self.parts[name] = added

    def at(self, names: list[str]) -> list:
        """Return the entities of these files and directories; those that are not here are left out."""
        return [self.parts[name] for name in dict.fromkeys(names) if name in self.parts]
