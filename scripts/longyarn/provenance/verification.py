"""Checks a sealed run: each file against every record of it, and the records against each other.

The records are SHA256SUMS, the crate and the manifests.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from longyarn import stages
from longyarn.core import run_directory, superseded
from longyarn.core.errors import UserError
from longyarn.core.lineage import chain
from longyarn.provenance import checksums, ro_crate
from longyarn.provenance.crate_entities import FIGURES

# Written with the crate or after it, so the crate cannot list them.
AFTER_THE_CRATE = {run_directory.CRATE, run_directory.PROVENANCE, run_directory.OWN_RECORD}


class Run:
    """A run: its files, what its records say about them, and their real hashes.

    To create one hashes every file that a record lists.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.broken: list[str] = []
        self.names = set(run_directory.everything(path))
        self.sums = self.attempt(lambda: checksums.read(path))
        self.crate = self.attempt(lambda: ro_crate.listed(self.json(run_directory.CRATE)))
        self.manifests = run_directory.manifests(path, sorted(self.names))
        self.makers = run_directory.Makers(self.manifests)
        # Each directory of a payload, and the stage that wrote it. No manifest lists the figures.
        self.payloads = {FIGURES: stages.REPORT.name} if self.sums or self.crate else {}
        for name, one in self.manifests.items():
            self.payloads |= dict.fromkeys(
                run_directory.payload_directories(name, one), one["stage"]
            )
        self.purged = set(self.find_purged())
        self.records = self.find_records()
        self.real = checksums.hashes(
            path, sorted(self.records.keys() & self.names), "verify, bytes"
        )

    def attempt(self, read: Callable[[], dict]) -> dict:
        """Return what ``read`` returns; if it fails, add a sentence to ``broken`` and return nothing."""
        try:
            return read()
        except UserError as error:
            self.broken.append(str(error))
        except FileNotFoundError:
            if (self.path / run_directory.SEAL).is_file():  # a missing seal is reported by itself
                self.broken.append(f"{self.said(run_directory.CRATE)} is missing; restore it")
        except (ValueError, KeyError, TypeError, AttributeError):
            self.broken.append(
                f"{self.said(run_directory.CRATE)} was changed: it is not a crate anymore"
            )
        return {}

    def json(self, name: str):
        """Return the content of a JSON file."""
        return json.loads((self.path / name).read_bytes())

    def said(self, name: str) -> str:
        """Return a file and the stage that made it, to begin a sentence."""
        makers = getattr(self, "makers", run_directory.Makers({}))
        return f"{self.path / name}, made by {makers.stage(name) or 'no known stage'},"

    def find_purged(self) -> Iterator[str]:
        """Yield payload directories that are gone completely and that a finished run can do without."""
        for directory in self.payloads:
            gone = not any(file.startswith(f"{directory}/") for file in self.names)
            if gone and PurePosixPath(directory).name in stages.PURGEABLE:
                yield directory

    def find_records(self) -> dict[str, dict[str, str]]:
        """Return, for each file, the SHA-256 that each record lists for it, by the record's name."""
        found: dict[str, dict[str, str]] = {}
        for name, digest in self.sums.items():
            found.setdefault(name, {})[run_directory.SEAL] = digest
        for name, (_, digest) in self.crate.items():
            found.setdefault(name, {})[run_directory.CRATE] = digest
        for name, one in self.manifests.items():
            for file, entry in run_directory.payload(name, one).items():
                found.setdefault(file, {})[name] = entry["sha256"]
        for file, digest in (
            self.manifests.get(run_directory.PROVENANCE, {}).get("inputs", {}).items()
        ):
            found.setdefault(file, {})[run_directory.PROVENANCE] = digest
        return found

    def findings(self) -> Iterator[str]:
        """Yield one sentence for each mismatch."""
        yield from self.broken
        yield from self.of_files()
        yield from self.of_records()
        yield from self.of_payloads()
        yield from self.of_chain()

    def of_files(self) -> Iterator[str]:
        """Compare each file with every record of it; if only some differ, those records were changed."""
        for name, records in sorted(self.records.items()):
            if name not in self.names:
                if not any(name.startswith(f"{directory}/") for directory in self.purged):
                    yield f"{self.said(name)} is missing, and {listing(records)}; restore it"
                continue
            other = [record for record, digest in records.items() if digest != self.real[name]]
            if other and len(other) == len(records):
                doubt = ", or that was changed" if len(other) == 1 else ""
                yield f"{self.said(name)} was changed: {listing(other)} with another SHA-256{doubt}"
                continue
            for record in other:
                yield (
                    f"{self.said(record)} was changed: it lists {name} with another SHA-256 than the file "
                    "and its other records have"
                )

    def of_records(self) -> Iterator[str]:
        """Compare what SHA256SUMS and the crate list; neither may lack a file of the other."""
        if self.sums:
            own = AFTER_THE_CRATE & (self.names | {run_directory.CRATE, run_directory.PROVENANCE})
            for name in sorted({*self.crate, run_directory.CONFIG, *own} - {*self.sums}):
                yield f"{self.said(run_directory.SEAL)} was changed: it lacks {name}"
        if self.crate:
            for name in sorted({*self.sums} - {*self.crate, *AFTER_THE_CRATE}):
                yield (
                    f"{self.said(run_directory.CRATE)} was changed: it lacks {name}, which "
                    f"{run_directory.SEAL} lists"
                )
        for name, (size, digest) in self.crate.items():
            if self.real.get(name) == digest and (self.path / name).stat().st_size != size:
                yield f"{self.said(run_directory.CRATE)} was changed: it lists {name} with another size"

    def strays(self) -> Iterator[tuple[str, str]]:
        """Yield each file in a payload's directory that no record lists, together with the directory."""
        for name in sorted(self.names - self.records.keys()):
            above = [str(parent) for parent in PurePosixPath(name).parents]
            holder = next((directory for directory in above if directory in self.payloads), None)
            empty = not (self.path / name).stat().st_size
            if holder and not (name.rpartition("/")[2] == run_directory.TIMESTAMP and empty):
                yield name, holder

    def of_payloads(self) -> Iterator[str]:
        """Yield one sentence for each file that was added to a payload, such as merged/evil.py."""
        for name, holder in self.strays():
            stage = self.payloads[holder]
            yield f"{self.path / name} lies in {holder}/, where {stage} did not put it; remove it"

    def of_chain(self) -> Iterator[str]:
        """Follow the report's manifests, and those after it, back to the base and the corpus."""
        try:
            report = self.json(run_directory.REPORT)
            jobs = superseded.followed(self.manifests, report)
            jobs = {job: name for job, name in jobs.items() if name in self.real}
            _, broken = chain(
                {job: self.manifests[name] for job, name in jobs.items()},
                {job: self.real[name] for job, name in jobs.items()},
                report["rope"]["trained"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
            yield f"the manifests of {self.path} cannot be followed, because one is missing or broken"
            return
        for sentence in broken:
            yield f"in {self.path}, {sentence[:-1].replace('the one reported here', 'there is now')}"

    def outdated(self) -> list[str]:
        """Return the manifests of an earlier state; none if the report cannot be read."""
        try:
            return superseded.outdated(self.manifests, self.real, self.json(run_directory.REPORT))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return []  # ``findings`` says what is wrong


def listing(records) -> str:
    """Return which records list something, with their verb: "merged.json lists it"."""
    names = sorted(records)
    if len(names) == 1:
        return f"{names[0]} lists it"
    return f"{', '.join(names[:-1])} and {names[-1]} list it"
