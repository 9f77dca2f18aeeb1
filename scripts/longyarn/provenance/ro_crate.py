"""The record of a run as an RO-Crate of the profile Provenance Run Crate 0.5.

The workflow is the main entity; an action stands for the run and one for each job, with its script,
inputs, outputs, settings, times, machine and image. Every file has its size and SHA-256.
https://www.researchobject.org/workflow-run-crate
"""

import hashlib
import json
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote

from longyarn.core import run_directory
from longyarn.provenance.job_history import Job, jobs_of

VERSION = "1.1"  # of RO-Crate, which the profiles 0.5 build on
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
RUN_TERMS = "https://w3id.org/ro/terms/workflow-run#"
# Those of the profiles that RO-Crate's own context lacks.
TERMS = ("sha256", "containerImage", "ContainerImage", "SIFImage", "DockerImage", "registry",
         "resourceUsage")  # fmt: skip
LICENCE = "https://spdx.org/licenses/Apache-2.0"
DONE = "http://schema.org/CompletedActionStatus"
MAIN = f"{run_directory.WORKFLOW}/Snakefile"
FORMATS = {
    ".html": "text/html", ".json": "application/json", ".jsonl": "application/jsonl",
    ".md": "text/markdown", ".png": "image/png", ".py": "text/x-python", ".svg": "image/svg+xml",
    ".tsv": "text/tab-separated-values", ".yaml": "application/yaml",
    **dict.fromkeys(("", ".txt", ".log", ".smk", ".in", ".def", ".Dockerfile"), "text/plain"),
}  # fmt: skip


def build(
    run: Path, hashes: dict[str, str], manifests: dict[str, dict], image_hashes: dict[str, str]
) -> dict:
    """Return the content of ro-crate-metadata.json.

    ``hashes`` has the SHA-256 of each file of the run. ``image_hashes`` has that of images which are a
    file here, by name.
    """
    from rocrate.rocrate import ROCrate

    crate = ROCrate(version=VERSION)
    crate.metadata.extra_terms.update({term: RUN_TERMS + term for term in TERMS})
    jobs = jobs_of(run, hashes, manifests)
    writer = Writer(crate, run, hashes, manifests, image_hashes)
    writer.root(jobs)
    writer.files()
    writer.workflow(jobs)
    for job in jobs:
        writer.job(job)
    writer.engine(jobs)
    return crate.metadata.generate()


def local(name: str) -> str:
    """Return the identifier of an entity that is no file."""
    return f"#{quote(name)}"


class Writer:
    """Puts a run's entities into a crate."""

    def __init__(self, crate, run: Path, hashes: dict, manifests: dict, image_hashes: dict) -> None:
        self.crate, self.run = crate, run
        self.hashes, self.manifests, self.image_hashes = hashes, manifests, image_hashes
        self.parts: dict[str, object] = {}  # files and directories by name

    def entity(self, identifier: str, kind: str | list[str], **properties):
        """Return the entity of this identifier, added if it is new."""
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

    def root(self, jobs: list[Job]) -> None:
        """Describe the crate itself."""
        root = self.crate.root_dataset
        report = json.loads((self.run / run_directory.REPORT).read_bytes())
        root["name"] = f"Longyarn run {self.run.name}"
        root["description"] = report["verdict"]["sentence"]
        root["license"] = (
            "The workflow is under the Apache License 2.0. The model keeps the licence of its base, and "
            "each source of the corpus its own."
        )
        ends = [job.environment["end"] for job in jobs if job.environment]
        if ends:
            root["datePublished"] = max(ends)
        root["conformsTo"] = [
            self.entity(
                url, "CreativeWork", name=name, version=url.rpartition("/")[2]
            )
            for url, name in PROFILES.items()
        ]  # fmt: skip

    def files(self) -> None:
        """Add every file with size and hash, and the directories of payloads."""
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
                    properties=properties | {"@type": kind, "name": "Longyarn", "license": LICENCE},
                )  # fmt: skip
            else:
                self.parts[name] = self.crate.add_file(self.run / name, name, properties=properties)
        for name, one in self.manifests.items():
            for directory in run_directory.payload_directories(name, one):
                self.directory(directory)
        self.directory("figures")

    def directory(self, name: str) -> None:
        """Add a directory with the files that it has; none where it was purged."""
        inside = [part for file, part in self.parts.items() if file.startswith(f"{name}/")]
        if inside and name not in self.parts:
            properties = {"name": name, "hasPart": inside if len(inside) > 1 else inside[0]}
            added = self.crate.add_dataset(self.run / name, name, properties=properties)
            self.parts[name] = added

    def at(self, names: list[str]) -> list:
        """Return the entities of those of these files and directories that are there."""
        return [self.parts[name] for name in dict.fromkeys(names) if name in self.parts]

    def workflow(self, jobs: list[Job]) -> None:
        """Describe the workflow: its scripts as tools and steps, what goes in and what comes out."""
        main = self.crate.mainEntity
        commits = {job.environment.get("commit") for job in jobs} - {None}
        main["version"] = " ".join(sorted(commits)) or jobs[-1].code
        tools, steps = [], []
        for position, stage in enumerate(dict.fromkeys(job.stage for job in jobs)):
            tool = self.tool(stage, jobs)
            tools.append(tool)
            steps.append(
                self.entity(
                    f"{MAIN}#{stage}", "HowToStep", name=stage, position=str(position), workExample=tool
                )
            )  # fmt: skip
        main["hasPart"], main["step"] = tools, steps
        ports = {
            "input": {"config.yaml": "File"},
            "output": {"merged": "Dataset", "report.html": "File"},
        }
        for side, names in ports.items():
            main[side] = [
                self.port(name, kind) for name, kind in names.items() if name in self.parts
            ]
        run = self.entity(
            "#run", "CreateAction", name=f"The run {self.run.name}", instrument=main,
            description="All jobs of this run; those that were done before are counted in.",
            object=self.at(["config.yaml", "base"]), result=self.at(["merged", "report.html"]),
            actionStatus=DONE, **self.times([job.environment for job in jobs if job.environment]),
        )  # fmt: skip
        self.crate.root_dataset.append_to("mentions", run)

    def port(self, name: str, kind: str):
        """Return the formal parameter that a file or directory of the run is an example of."""
        parameter = self.crate.add_formal_parameter(
            name,
            kind,
            identifier=local(f"parameter/{name}"),
            properties={"workExample": self.parts[name]},
        )
        self.parts[name]["exampleOfWork"] = parameter
        return parameter

    def tool(self, stage: str, jobs: list[Job]):
        """Return the script of a stage, with the libraries that it ran with."""
        own = [job for job in jobs if job.stage == stage]
        libraries = dict.fromkeys(pair for job in own for pair in job.versions.items())
        name = f"{run_directory.WORKFLOW}/scripts/{stage}.py"
        tool = self.parts.get(name) or self.entity(local(f"tool/{stage}"), "SoftwareSourceCode")
        if name in self.parts:
            tool.properties()["@type"] = ["File", "SoftwareSourceCode"]
        tool["name"] = stage
        tool["version"] = " ".join(sorted({job.code for job in own}))
        if libraries:
            tool["softwareRequirements"] = [self.library(*pair) for pair in libraries]
        return tool

    def library(self, name: str, version: str):
        """Return a library at its version."""
        url = f"https://pypi.org/project/{name}/{quote(version)}/"
        if name == "python":
            url = f"https://www.python.org/downloads/release/python-{version.replace('.', '')}/"
        return self.entity(
            url, "SoftwareApplication", name=name, softwareVersion=version, url=url
        )  # fmt: skip

    def job(self, job: Job) -> None:
        """Add the action of a job, and what set it off."""
        found = job.environment
        settings = [
            self.value(f"setting/{job.name}/{key}", key, value)
            for key, value in job.settings.items()
        ]
        action = self.entity(
            local(f"job/{job.name}"), "CreateAction", name=job.name,
            description=f"The stage {job.stage} of Longyarn; it ended with exit status 0.",
            instrument=self.tool_of(job.stage), actionStatus=DONE,
            object=[*self.at(job.inputs), *self.sources(job), *settings], result=self.at(job.outputs),
            **self.times([found] if found else []),
            containerImage=self.image(found.get("image")), additionalProperty=self.machine(job),
            resourceUsage=self.usage(job),
        )  # fmt: skip
        self.entity(
            local(f"control/{job.name}"), "ControlAction", name=f"start {job.name}", object=action,
            instrument={"@id": f"{MAIN}#{job.stage}"}, actionStatus=DONE,
        )  # fmt: skip
        self.crate.root_dataset.append_to("mentions", action)

    def tool_of(self, stage: str):
        """Return the script of a stage as ``workflow`` has added it."""
        name = f"{run_directory.WORKFLOW}/scripts/{stage}.py"
        return self.parts.get(name) or self.crate.get(local(f"tool/{stage}"))

    def value(self, identifier: str, name: str, value: object, **more):
        """Return a named value; what is no number or text is written as JSON."""
        plain = isinstance(value, int | float | str) and not isinstance(value, bool)
        written = value if plain and value != "" else json.dumps(value, ensure_ascii=False)
        return self.entity(local(identifier), "PropertyValue", name=name, value=written, **more)

    def sources(self, job: Job) -> list:
        """Return where a model or a corpus came from, with revision and licence where they are known."""
        facts = self.manifests.get(job.target, {}).get("facts", {})
        if job.stage in ("download_model", "adopt"):
            kept = {"version": facts.get("revision"), "name": Path(str(facts.get("source"))).name}
            if not str(facts.get("source")).startswith(("/", "~")):
                kept["name"] = facts.get("source")
            return [self.entity(local(f"source/{job.name}"), "CreativeWork", **kept)]
        if job.stage == "download_corpus":
            return [
                self.entity(
                    local(f"source/{job.name}/{name}"), "CreativeWork", name=name,
                    description=one.get("source"), license=one.get("licence"),
                )
                for name, one in facts.get("collections", {}).items()
            ]  # fmt: skip
        return []

    def machine(self, job: Job) -> list:
        """Return what is known of the machine and the workflow's state, as named values."""
        keys = ("cpu", "cores", "memory", "gpus", "system", "kernel", "python", "commit", "dirty")
        found = []
        for key in keys:
            if (value := job.environment.get(key)) in (None, []):
                continue
            digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
            found.append(self.value(f"environment/{key}/{digest}", key, value))
        return found

    def image(self, image: str | None):
        """Return the container image that a job ran in."""
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

    def usage(self, job: Job) -> list:
        """Return the seconds and the peak memory of a job, by the names that the profile gives them."""
        if not job.timing:
            return []
        figures = {
            "s": (job.timing.seconds, "https://qudt.org/vocab/unit/SEC"),
            "max_rss": (job.timing.peak_memory_mb, "https://qudt.org/vocab/unit/MegaBYTE"),
        }
        return [
            self.value(
                f"usage/{job.name}/{key}", key, value, propertyID=RUN_TERMS + key, unitCode=unit
            )
            for key, (value, unit) in figures.items()
            if value is not None
        ]  # fmt: skip

    def engine(self, jobs: list[Job]) -> None:
        """Add Snakemake, which set the jobs off."""
        import importlib.metadata

        version = importlib.metadata.version("snakemake")
        self.entity(
            "#engine", "OrganizeAction", name=f"Snakemake {version}",
            instrument=self.library("snakemake", version), result={"@id": "#run"}, actionStatus=DONE,
            object=[{"@id": local(f"control/{job.name}")} for job in jobs],
        )  # fmt: skip

    @staticmethod
    def times(environments: list[dict]) -> dict:
        """Return when the first of some jobs started and the last one ended."""
        if not environments:
            return {}
        return {
            "startTime": min(one["start"] for one in environments),
            "endTime": max(one["end"] for one in environments),
        }


def listed(crate: dict) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of each file that a crate lists, by name."""
    return {
        unquote(entity["@id"]): (int(entity["contentSize"]), entity["sha256"])
        for entity in crate["@graph"]
        if "sha256" in entity and "contentSize" in entity
    }
