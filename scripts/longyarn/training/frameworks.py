"""What a run hands over to another framework: the patched model, the packed sequences and the settings.

The model's config.json has the new RoPE, so the framework needs no option for it. The sequences are
written as a `datasets` directory, tokenised, packed and labelled as training here reads them.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.console import progress
from longyarn.core.files import (
    link_weights,
    new_directory,
    read_json,
    require_space,
    sha256,
    write_json,
    write_text,
)
from longyarn.data import packing
from longyarn.data.packed_dataset import Packed
from longyarn.models.rope_checks import check_config
from longyarn.rope import transformers4
from longyarn.rope.record import patched_config
from longyarn.training import deepspeed_setup

IGNORED = -100  # a label that counts in no loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of an export."""
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of the RoPE settings")
    parser.add_argument("--pack", type=Path, required=True, help="manifest of the packed sequences")
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="config section `training`, as JSON"
    )
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")


@dataclass(frozen=True)
class Run:
    """What is handed over: facts of the base, of its RoPE and of the pack, and section `training`."""

    model: Path
    base: dict
    rope: dict
    pack: dict
    data: Packed
    training: dict

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Run":
        """Read what the arguments of an export name."""
        base, pack = manifest.read(arguments.base)["facts"], manifest.read(arguments.pack)
        masks = pack["facts"]["document_masks"]
        return cls(
            model=arguments.base.parent / base["directory"],
            base=base,
            rope=manifest.read_facts(arguments.rope),
            pack=pack["facts"],
            data=Packed(arguments.pack.parent / next(iter(pack["files"])), masks),
            training=arguments.settings,
        )

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.pack["sequence_length"]

    @property
    def masks(self) -> bool:
        """Whether the pieces of a sequence are hidden from one another."""
        return self.pack["document_masks"]

    @property
    def epochs(self) -> float:
        """Passes over the sequences; for a number of steps, as many whole ones as they take."""
        training = self.training
        if training["steps"] is None:
            return training["epochs"]
        return -(-training["steps"] * training["batch_size"] // self.pack["sequences"])

    def pieces(self, row: int) -> list[tuple[slice, bool]]:
        """Return where each piece of a sequence lies, and whether it is padding."""
        these = slice(*self.data.piece_offsets[row : row + 2])
        found, begin = [], 0
        for length, document in zip(
            self.data.piece_lengths[these].tolist(),
            self.data.piece_documents[these].tolist(),
            strict=True,
        ):
            found.append((slice(begin, begin + length), document == packing.PADDING))
            begin += length
        return found


def write_model(run: Run, directory: Path) -> None:
    """Write the base with the run's RoPE in its config.json, in both forms; weights are linked.

    Both, because a framework on transformers 4 would not see that of today, and train unscaled.
    """
    from transformers import AutoConfig

    directory.mkdir()
    link_weights(run.model, directory)
    config = patched_config(
        read_json(run.model / "config.json"),
        run.rope["rope_parameters"],
        run.rope["max_position_embeddings"],
        run.rope["full_attention"],
    )
    trust = run.base["trust_remote_code"]
    loaded = AutoConfig.from_pretrained(run.model, trust_remote_code=trust)
    config = transformers4.with_old_keys(config, run.rope["rope_parameters"], loaded)
    write_json(directory / "config.json", config)
    written = AutoConfig.from_pretrained(directory, trust_remote_code=trust)
    check_config(written, run.rope, directory / "config.json")


def today_alone(run: Run) -> list[str]:
    """Return a note where transformers 4 does not know the RoPE of the model that is handed over."""
    kind = read_json(run.model / "config.json")["model_type"]
    if transformers4.rope_keys(kind, run.rope["rope_parameters"]) or run.rope["method"] == "none":
        return []
    return [
        f"transformers 4 has no scaled RoPE for models of type {kind} and would train them without it, "
        "so use transformers 5"
    ]


def results(arguments: argparse.Namespace) -> str:
    """Return the directory of what the framework makes, as seen from the payload.

    Beside the run's: what lies in the run is sealed and archived with it.
    """
    return f"../../{arguments.output.parent.name}-{arguments.output.name}"


def source(arguments: argparse.Namespace) -> str:
    """Return the trained model as `training.source` names it.

    Not by an absolute path: README.md has it, and its hash would be another on each machine.
    """
    above = arguments.output.parent.parent
    shown = Path("<paths.results>") if above.is_absolute() else above
    return (shown / Path(results(arguments)).name / "trained").as_posix()


def modules(run: Run) -> tuple[list[str], list[str], bool]:
    """Return the last parts of the names of what gets an adapter and of what is trained whole.

    And whether an embedding is trained that is the output head as well.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from longyarn.models import lora

    trust = run.base["trust_remote_code"]
    config = AutoConfig.from_pretrained(run.model, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    targets, whole, tied = lora.chosen(model, run.training["lora"])
    leaves = {name.rpartition(".")[2] for name in targets}
    return sorted(leaves), whole, tied and run.training["lora"]["train_embeddings"]


def write_dataset(
    run: Run, directory: Path, columns: Sequence[str], rows: Iterator[dict], total: int | None
) -> int:
    """Write ``rows`` of integers, in all those of the pack, as a `train` that datasets.load_from_disk reads.

    One row at a time, without a copy in a cache; equal rows give equal bytes. Returns how many there were.
    """
    import pyarrow

    size = 4 * len(columns) * len(run.data) * run.length
    require_space(directory.parent, size, "the packed sequences as a data set")
    kind = {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "int32"}}
    features = dict.fromkeys(columns, kind)
    about = json.dumps({"info": {"features": features}})
    schema = pyarrow.schema(
        [(name, pyarrow.list_(pyarrow.int32())) for name in features],
        metadata={"huggingface": about},
    )
    place, count = directory / "train", 0
    place.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    with (
        pyarrow.OSFile(str(place / name), "wb") as file,
        pyarrow.ipc.new_stream(file, schema) as writer,
    ):
        for row in progress(rows, total, "export"):
            lists = {key: [value] for key, value in row.items()}
            writer.write_batch(pyarrow.RecordBatch.from_pydict(lists, schema=schema))
            count += 1
    write_json(directory / "dataset_dict.json", {"splits": ["train"]})
    write_json(place / "dataset_info.json", {"features": features})
    state = {
        "_data_files": [{"filename": name}],
        "_fingerprint": sha256(place / name)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_json(place / "state.json", state)
    return count


def write(
    arguments: argparse.Namespace,
    script: Path,
    run: Run,
    name: str,
    head: list[str],
    settings: tuple[dict, list[str]],
    dataset: tuple[Sequence[str], Iterator[dict], int | None],
    training: dict,
    command: str,
) -> None:
    """Write an export and its manifest, and say on stderr what the framework's settings cannot express.

    ``name`` is the framework's, ``head`` the comments above its settings. ``settings``: those, and notes of
    what they do not say. ``dataset``: columns, rows, and how many where that is known. ``training``: the
    section that DeepSpeed's settings are made from.
    """
    values, notes = settings
    for note in notes:
        print(f"{script.stem}: warning: {note}", file=sys.stderr)
    with new_directory(arguments.output) as directory:
        write_model(run, directory / "model")
        rows = write_dataset(run, directory / "dataset", *dataset)
        if "deepspeed" in values:
            write_json(directory / values["deepspeed"], deepspeed_setup.configuration(training))
        write_settings(directory / "train.yaml", values, head, notes)
        write_readme(directory / "README.md", name, command, arguments, notes)
    publish(arguments, script, rows, notes)


def write_settings(file: Path, values: dict, head: list[str], notes: list[str]) -> None:
    """Write settings as YAML below a head of comments; ``notes`` are what they do not say."""
    import yaml

    said = [*head, *(f"Not the same: {note}." for note in notes)]
    lines = [f"# {line}" for line in said] + [""]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True)
    write_text(file, "\n".join(lines) + "\n" + text)


def write_readme(
    file: Path, name: str, command: str, arguments: argparse.Namespace, notes: list[str]
) -> None:
    """Write how to train with a framework, and how the result comes back."""
    place, back = results(arguments), source(arguments)
    differing = "".join(f"- {note}\n" for note in notes) or "- nothing that we know of\n"
    write_text(
        file,
        f"""# This run, for {name}

`model/` is the base with the run's RoPE in its config.json. Give {name} no RoPE option of its own: it would
extend what is extended already. `dataset/` has the sequences, tokenised, packed and labelled. `train.yaml`
has the settings of this run's section `training`.

Train, in this directory:

```sh
{command}
```

The result lies in `{place}`, outside the run. Training goes on from a checkpoint that lies there, so
move an older result away first.

Bring the result back: add to the run's configuration

```yaml
training:
  source: {back}
```

and run Snakemake as before. Training here is left out; merge, evaluation, report and gate are as ever.

What differs from training here:

{differing}""",
    )


def publish(arguments: argparse.Namespace, script: Path, rows: int, notes: list[str]) -> None:
    """Write the manifest of an export."""
    files = sorted(file for file in arguments.output.rglob("*") if file.is_file())
    manifest.write(
        arguments.manifest,
        script=script,
        settings=arguments.settings,
        inputs={name: getattr(arguments, name) for name in ("base", "rope", "pack")},
        files=files,
        facts={"directory": arguments.output.name, "rows": rows, "not_expressed": notes},
    )


def unsaid(training: dict, keys: dict[str, object]) -> list[str]:
    """Return a note for each setting that a framework does not have and that says something here.

    ``keys``: the settings it does not have, with the value at which each says nothing.
    """
    return [
        f"training.{key} {training[key]} cannot be expressed"
        for key, nothing in keys.items()
        if training[key] != nothing
    ]
