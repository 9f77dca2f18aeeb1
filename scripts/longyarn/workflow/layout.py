"""Where each job of a run reads and writes: paths by phase, cell and variant.

All paths are relative to the run directory, as Snakemake names them. A *stem* is the path of a stage's
result without ending: the manifest is ``<stem>.json`` and the payload, if there is one, lies in ``<stem>/``.
A phase or a cell is named by its directory below the run, with a slash at the end; the run itself is "".
"""

from pathlib import Path

from longyarn.config import sweep_cells, variants
from longyarn.config.phases import parts, phases
from longyarn.core.files import ROOT, from_here, located, read_json
from longyarn.stages import PATCH_ROPE


def workflow_file(name: str) -> str:
    """Return a file of the workflow by its name below the workflow's directory."""
    return str(from_here(ROOT / name))


def files_of(source: str, patterns: tuple[str, ...]) -> list[str]:
    """Return the files of a local model, so that a change of them is noticed; none of a model of the hub."""
    directory = located(source)
    return sorted({str(file) for pattern in patterns for file in directory.glob(pattern)})


def phase_name(wildcards) -> str:
    """Return the phase or cell of a job; a checkpoint at some step belongs to the run itself."""
    name = getattr(wildcards, "phase", "")
    return "" if name.startswith("step-") else name


def trained_rope(config: dict) -> str:
    """Return the RoPE variant that training with this configuration starts from."""
    method = config["rope"]["method"]
    return "base" if method == "none" else method


class Layout:
    """The paths of one run.

    ``run`` is the run's directory. ``phases`` and ``cells`` hold the whole configuration of each phase and
    of each cell of a sweep. ``published`` and ``other_runs`` name the variants that have weights of their
    own. Raises ``UserError`` if a variant is the model of a run that is not finished.
    """

    def __init__(self, config: dict) -> None:
        evaluation, results = config["evaluation"], config["paths"]["results"]
        self.config = config
        self.run = f"{results}/{config['run']}"
        self.phases = phases(config)
        self.cells = sweep_cells.cells(config)
        self._configurations = parts(config)
        self._changes = sweep_cells.places(config)
        self.variants = evaluation["variants"]
        defined = {name: evaluation["more_variants"].get(name, {}) for name in self.variants}
        self.published = [name for name, entry in defined.items() if "source" in entry]
        self.other_runs = {
            name: f"{results}/{entry['run']}" for name, entry in defined.items() if "run" in entry
        }
        self._rope_of_other_runs = {
            name: str(variants.of_run(Path(run), name).with_suffix(""))
            for name, run in self.other_runs.items()
        }

    def configuration(self, phase: str = "") -> dict:
        """Return the whole configuration of the jobs of a phase or cell."""
        return self._configurations[phase]

    def holder(self, phase: str, stage: str) -> str:
        """Return the directory that holds a stage's result for a phase or cell: cells share equal results."""
        if phase not in self._changes:
            return phase
        return sweep_cells.directory(sweep_cells.shared(self._changes[phase], stage))

    def base(self, phase: str = "") -> str:
        """Return the stem of the model that a phase starts from: the base, or that of the phase before."""
        names = list(self.phases)
        number = names.index(phase) if phase in names else 0
        return f"{self.run}/{names[number - 1]}merged" if number else f"{self.run}/base"

    def rope(self, phase: str = "") -> str:
        """Return the stem of the RoPE that a phase or cell trains with."""
        variant = trained_rope(self.configuration(phase))
        return f"{self.run}/{self.holder(phase, PATCH_ROPE.name)}rope/{variant}"

    def pack(self, phase: str = "") -> str:
        """Return the stem of the training sequences of a phase or cell."""
        return f"{self.run}/{self.holder(phase, 'pack')}pack"

    def weights_of(self, variant: str, phase: str = "") -> str:
        """Return the stem of a variant's weights.

        An untrained variant is the base with other RoPE settings. ``step-<number>`` is a checkpoint of the
        trained variant.
        """
        if phase:  # only the trained variant differs between cells
            return f"{self.run}/{phase}merged"
        if variant in self.other_runs:
            return f"{self.other_runs[variant]}/merged"
        if variant in self.published:
            return f"{self.run}/models/{variant}"
        if variant.startswith("step-"):
            return f"{self.run}/{variant}/merged"
        return f"{self.run}/merged" if variant == "trained" else f"{self.run}/base"

    def rope_of(self, variant: str, phase: str = "") -> str:
        """Return the stem of a variant's RoPE."""
        if phase:
            return self.rope(phase)
        if variant in self.other_runs:
            return self._rope_of_other_runs[variant]
        if variant == "trained" or variant.startswith("step-"):
            return self.rope()
        return f"{self.run}/rope/{variant}"

    def source_of(self, variant: str | None = None) -> dict:
        """Return source and revision of the model to download: the base, or a published variant."""
        defined = self.config["evaluation"]["more_variants"]
        return defined.get(variant, self.config["model"])

    def products(self) -> list[str]:
        """Return the files that a run is asked for."""
        names = ("report.html", "merged.json", "merged", "export.json", "export", "verified.json")
        return [f"{self.run}/{name}" for name in names]

    def downloads(self) -> list[str]:
        """Return the manifests and payloads of everything that comes from the network."""
        stems = ["base", "corpus", *(f"models/{name}" for name in self.published)]
        if self.config["training"]["source"]:
            stems.append("trained")
        return [f"{self.run}/{stem}{ending}" for stem in stems for ending in (".json", "")]

    def reported_ropes(self) -> dict[str, str]:
        """Return the stem of each RoPE that the report shows, by variant."""
        shown = {"base", trained_rope(self.config), *self.variants} - {"trained"}
        return {name: self.rope_of(name) for name in sorted(shown)}

    def reported_models(self) -> dict[str, str]:
        """Return the stem of each model in the report that is neither the base nor trained in this run."""
        return {name: self.weights_of(name) for name in [*self.other_runs, *self.published]}

    def reported_phases(self) -> dict[str, str]:
        """Return the stem of each result of the phases before the last, by the name of its job."""
        found = {}
        for name in list(self.phases)[:-1]:
            rope = trained_rope(self.phases[name])
            results = {
                f"patch_rope.{rope}": f"rope/{rope}", "pack": "pack", "train": "trained", "merge": "merged",
            }  # fmt: skip
            found |= {f"{name}{job}": f"{self.run}/{name}{stem}" for job, stem in results.items()}
        return found

    def evaluations(self, instrument: str) -> dict[str, str]:
        """Return the stem of each variant's result of an instrument."""
        if instrument == "harness" and not self.config["evaluation"]["harness"]["tasks"]:
            return {}
        return {name: f"{self.run}/{instrument}/{name}" for name in self.variants}

    def outcome(self) -> str:
        """Return what the report found and where it lies, or nothing if there is no report."""
        report = Path(self.run) / "report"
        if not report.with_suffix(".json").is_file():
            return ""
        verdict = read_json(report.with_suffix(".json"))["verdict"]["sentence"]
        return f"\n{verdict}\nThe report: {report.with_suffix('.html')}"
