"""The record of a run as an RO-Crate of the profile Provenance Run Crate 0.5.

The workflow is the main entity. One action stands for the run and one for each job, with its script, inputs,
outputs, settings, times, machine and image. Every file has its size and SHA-256.
https://www.researchobject.org/workflow-run-crate
"""

import hashlib
import json
from pathlib import Path
from urllib.parse import unquote

from longyarn.core import run_directory
from longyarn.provenance.crate_entities import MAIN, RUN_TERMS, Entities, local
from longyarn.provenance.job_history import Job, jobs_of
from longyarn.stages import ADOPT, DOWNLOAD_CORPUS, DOWNLOAD_MODEL, MERGE

VERSION = "1.1"  # of RO-Crate, which version 0.5 of the profiles builds on
PROFILES = {
    "https://w3id.org/ro/wfrun/process/0.5": "Process Run Crate",
    "https://w3id.org/ro/wfrun/workflow/0.5": "Workflow Run Crate",
    "https://w3id.org/ro/wfrun/provenance/0.5": "Provenance Run Crate",
    "https://w3id.org/workflowhub/workflow-ro-crate/1.0": "Workflow RO-Crate",
}
# Terms of the profiles that RO-Crate's own context lacks.
TERMS = ("sha256", "containerImage", "ContainerImage", "SIFImage", "DockerImage", "registry",
         "resourceUsage")  # fmt: skip
DONE = "http://schema.org/CompletedActionStatus"


def build(
    run: Path, hashes: dict[str, str], manifests: dict[str, dict], image_hashes: dict[str, str]
) -> dict:
    """Return the content of ro-crate-metadata.json.

    ``hashes`` has the SHA-256 of each file of the run, ``image_hashes`` that of each image that is a file
    here, by name.
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


class Writer(Entities):
    """Writes what a run did into a crate: the workflow, its jobs, and Snakemake."""

    def root(self, jobs: list[Job]) -> None:
        """Describe the crate itself."""
        root = self.crate.root_dataset
        report = json.loads((self.run / run_directory.REPORT).read_bytes())
        root["name"] = f"Longyarn run {self.run.name}"
        root["description"] = report["verdict"]["sentence"]
        root["license"] = (
            "The workflow is under the Apache License 2.0. The model keeps the license of its base, and "
            "each source of the corpus keeps its own."
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

    def workflow(self, jobs: list[Job]) -> None:
        """Describe the workflow: its scripts as tools and steps, its inputs and its outputs."""
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
            "input": {run_directory.CONFIG: "File"},
            "output": {MERGE.payload: "Dataset", "report.html": "File"},
        }
        for side, names in ports.items():
            main[side] = [
                self.port(name, kind) for name, kind in names.items() if name in self.parts
            ]
        run = self.entity(
            "#run", "CreateAction", name=f"The run {self.run.name}", instrument=main,
            description="All jobs of this run, including those that had finished before.",
            object=self.at([run_directory.CONFIG, DOWNLOAD_MODEL.payload]),
            result=self.at([MERGE.payload, "report.html"]),
            actionStatus=DONE, **times([job.environment for job in jobs if job.environment]),
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
        """Return a stage's script, with the libraries that it ran with."""
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

    def tool_of(self, stage: str):
        """Return a stage's script, which ``workflow`` added before."""
        name = f"{run_directory.WORKFLOW}/scripts/{stage}.py"
        return self.parts.get(name) or self.crate.get(local(f"tool/{stage}"))

    def job(self, job: Job) -> None:
        """Add the action of a job, and the action that started it."""
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
            **times([found] if found else []),
            containerImage=self.image(found.get("image")), additionalProperty=self.machine(job),
            resourceUsage=self.usage(job),
        )  # fmt: skip
        self.entity(
            local(f"control/{job.name}"), "ControlAction", name=f"start {job.name}", object=action,
            instrument={"@id": f"{MAIN}#{job.stage}"}, actionStatus=DONE,
        )  # fmt: skip
        self.crate.root_dataset.append_to("mentions", action)

    def sources(self, job: Job) -> list:
        """Return where a job's model or corpus came from, with revision and license if they are known."""
        facts = self.manifests.get(job.target, {}).get("facts", {})
        if job.stage in (DOWNLOAD_MODEL.name, ADOPT.name):
            kept = {"version": facts.get("revision"), "name": Path(str(facts.get("source"))).name}
            if not str(facts.get("source")).startswith(("/", "~")):
                kept["name"] = facts.get("source")
            return [self.entity(local(f"source/{job.name}"), "CreativeWork", **kept)]
        if job.stage == DOWNLOAD_CORPUS.name:
            return [
                self.entity(
                    local(f"source/{job.name}/{name}"), "CreativeWork", name=name,
                    description=one.get("source"), license=one.get("licence"),
                )
                for name, one in facts.get("collections", {}).items()
            ]  # fmt: skip
        return []

    def machine(self, job: Job) -> list:
        """Return what is recorded about a job's machine and the workflow's commit, as named values."""
        keys = ("cpu", "cores", "memory", "gpus", "system", "kernel", "python", "commit", "dirty")
        found = []
        for key in keys:
            if (value := job.environment.get(key)) in (None, []):
                continue
            digest = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
            found.append(self.value(f"environment/{key}/{digest}", key, value))
        return found

    def usage(self, job: Job) -> list:
        """Return the seconds and the peak memory of a job, under the profile's names."""
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
        """Add Snakemake, which started the jobs."""
        import importlib.metadata

        version = importlib.metadata.version("snakemake")
        self.entity(
            "#engine", "OrganizeAction", name=f"Snakemake {version}",
            instrument=self.library("snakemake", version), result={"@id": "#run"}, actionStatus=DONE,
            object=[{"@id": local(f"control/{job.name}")} for job in jobs],
        )  # fmt: skip


def times(environments: list[dict]) -> dict:
    """Return when the first of some jobs started and when the last one ended."""
    if not environments:
        return {}
    return {
        "startTime": min(one["start"] for one in environments),
        "endTime": max(one["end"] for one in environments),
    }


def listed(crate: dict) -> dict[str, tuple[int, str]]:
    """Return the size and SHA-256 of each file that a crate lists, by name."""
    return {
        unquote(entity["@id"]): (int(entity["contentSize"]), entity["sha256"])
        for entity in crate["@graph"]
        if "sha256" in entity and "contentSize" in entity
    }
