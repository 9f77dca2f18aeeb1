"""The stages of a run, in order: what each one writes, and how a finished run treats it.

Every list of stages is read from this table. A new stage is one row here, together with
``rules/<name>.smk``, ``scripts/<name>.py`` and ``tests/test_<name>.py``.
"""

from dataclasses import dataclass
from typing import Literal

# What decides how much memory a stage needs: the libraries alone, worker processes, rows of a data set,
# one tensor of the model, the whole model, or a training process.
Memory = Literal["libraries", "workers", "rows", "tensor", "model", "training"]
# What decides how long a stage takes: nothing that grows, the text of the corpus, reading the weights,
# reading the weights of every model in the run, evaluating a model, or training it.
Time = Literal["short", "text", "weights", "all_weights", "evaluation", "training"]


@dataclass(frozen=True)
class Stage:
    """One stage. Paths are relative to the run's directory.

    ``manifest`` is the stage's target without its ending, and the directory of its ``payload`` if it has
    one. ``variants`` is a directory with one manifest for each variant. ``files`` are outputs that no
    manifest lists. ``key`` is the name under which other manifests, and the report, list this stage as
    their input.
    """

    name: str
    manifest: str = ""
    payload: str = ""
    variants: str = ""
    files: tuple[str, ...] = ()
    key: str = ""
    purgeable: bool = False  # a finished run can do without the payload
    bundled: bool = True  # the payload goes into the archive
    sealed: bool = True  # runs before the seal, so its log and timing do not change later
    memory: Memory = "libraries"
    time: Time = "short"
    passes: int = 0  # how often the weights are read or written
    replaces: str = ""  # the stage whose outputs this one writes instead


DOWNLOAD_MODEL = Stage(
    "download_model", "base", "base", variants="models", key="base", purgeable=True, time="weights", passes=5,
)  # fmt: skip
DOWNLOAD_CORPUS = Stage(
    "download_corpus", "corpus", "corpus", key="corpus", purgeable=True, bundled=False, memory="rows",
    time="text",
)  # fmt: skip
PATCH_ROPE = Stage("patch_rope", variants="rope", key="rope")
TOKENISE = Stage(
    "tokenise", "tokens", "tokens", key="tokens", purgeable=True, memory="workers", time="text"
)
PACK = Stage("pack", "pack", "pack", key="pack", purgeable=True, bundled=False, time="text")
EXPORT_LLAMAFACTORY = Stage(
    "export_llamafactory",
    "llamafactory",
    "llamafactory",
    purgeable=True,
    bundled=False,
    time="text",
)
EXPORT_AXOLOTL = Stage(
    "export_axolotl", "axolotl", "axolotl", purgeable=True, bundled=False, time="text"
)
TRAIN = Stage("train", "trained", "trained", key="train", memory="training", time="training")
ADOPT = Stage("adopt", "trained", "trained", time="weights", passes=5, replaces="train")
CHECKPOINT = Stage("checkpoint", "trained", "trained")
MERGE = Stage("merge", "merged", "merged", key="merge", memory="tensor", time="weights", passes=3)
PERPLEXITY = Stage("perplexity", variants="perplexity", memory="model", time="evaluation")
PASSKEY = Stage("passkey", variants="passkey", memory="model", time="evaluation")
HARNESS = Stage("harness", variants="harness", memory="model", time="evaluation")
SWEEP = Stage("sweep", files=("sweep.json", "sweep.md", "sweep.png", "sweep.svg"))
REPORT = Stage("report", files=("report.json", "report.html", "figures"))
GATE = Stage("gate", "verified", files=("NOT_VERIFIED.txt",))
EXPORT = Stage("export", "export", "export", time="weights", passes=2)
PUSH = Stage("push", "push", sealed=False, time="weights", passes=5)
PROVENANCE = Stage(
    "provenance", "provenance", files=("SHA256SUMS",), sealed=False, time="all_weights", passes=1
)
BUNDLE = Stage("bundle", sealed=False, time="all_weights", passes=2)
PLAN = Stage("plan", sealed=False)

STAGES = (
    DOWNLOAD_MODEL, DOWNLOAD_CORPUS, PATCH_ROPE, TOKENISE, PACK, EXPORT_LLAMAFACTORY, EXPORT_AXOLOTL, TRAIN,
    ADOPT, CHECKPOINT, MERGE, PERPLEXITY, PASSKEY, HARNESS, SWEEP, REPORT, GATE, EXPORT, PUSH, PROVENANCE,
    BUNDLE, PLAN,
)  # fmt: skip
BY_NAME = {stage.name: stage for stage in STAGES}

# The stages that evaluate a variant.
INSTRUMENTS = tuple(stage.name for stage in STAGES if stage.time == "evaluation")
# The stages that the report is made from and that run once, or once in each phase, by ``key``.
REPORTED = {stage.key: stage.name for stage in STAGES if stage.key and stage is not PATCH_ROPE}
# What a run makes after its report, with a manifest of its own.
AFTER_THE_REPORT = tuple(
    stage.name for stage in STAGES[STAGES.index(REPORT) + 1 :] if stage.manifest and stage.sealed
)
VARIANT_DIRECTORIES = tuple(stage.variants for stage in STAGES if stage.variants)
PURGEABLE = tuple(stage.payload for stage in STAGES if stage.purgeable)
NOT_BUNDLED = tuple(stage.payload for stage in STAGES if not stage.bundled)
# These run after the seal, or while it is made.
UNSEALED = tuple(stage.name for stage in STAGES if not stage.sealed)
