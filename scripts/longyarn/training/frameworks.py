"""Exports of a run to another training framework: the patched model, the sequences and the settings.

The model's config.json already has the new RoPE, so the framework needs no option for it. The sequences
are written as a `datasets` directory: tokenized, packed and labeled as training here reads them.
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
from longyarn.data.packed_dataset import Packed
from longyarn.data.pieces import PADDING
from longyarn.rope import transformers4
from longyarn.training import deepspeed_setup, identity
from longyarn.training.inputs import Inputs


@dataclass(frozen=True)
class Export:
    """What a framework is given.

    ``head``: the comments at the top of its settings. ``settings``: the settings themselves.
    ``notes``: what they cannot express. ``columns`` and ``rows``: the data set; ``total``: its number
    of rows where that is known. ``deepspeed``: the section `training` that DeepSpeed's configuration
    is made from. ``command``: starts the training.
    """

    framework: str
    head: list[str]
    settings: dict
    notes: list[str]
    columns: Sequence[str]
    rows: Iterator[dict]
    total: int | None
    deepspeed: dict
    command: str


def epochs(inputs: Inputs) -> float:
    """Return the passes over the sequences; for a number of steps, enough whole passes for them."""
    settings = inputs.settings
    if settings["steps"] is None:
        return settings["epochs"]
    return -(-settings["steps"] * settings["batch_size"] // inputs.pack["sequences"])


def pieces(data: Packed, row: int) -> list[tuple[slice, bool]]:
    """Return where each piece of a sequence lies, and whether it is padding."""
    these = slice(*data.piece_offsets[row : row + 2])
    lengths, documents = data.piece_lengths[these].tolist(), data.piece_documents[these].tolist()
    found, begin = [], 0
    for length, document in zip(lengths, documents, strict=True):
        found.append((slice(begin, begin + length), document == PADDING))
        begin += length
    return found


def trained_modules(inputs: Inputs) -> tuple[list[str], list[str], bool]:
    """Return the modules that get an adapter and those that are trained whole.

    Each is the last part of a name. The third value says whether a trained embedding is also the
    model's output head.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from longyarn.models import lora

    trust, settings = inputs.base["trust_remote_code"], inputs.settings["lora"]
    config = AutoConfig.from_pretrained(inputs.model, trust_remote_code=trust)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    targets, whole, tied = lora.chosen(model, settings)
    leaves = {name.rpartition(".")[2] for name in targets}
    return sorted(leaves), whole, tied and settings["train_embeddings"]


def not_expressed(settings: dict, lacking: dict[str, object]) -> list[str]:
    """Return a note for each setting in use that a framework does not have.

    ``lacking``: the settings that it does not have, each with the value that means "not used".
    """
    return [
        f"training.{key} {settings[key]} cannot be expressed"
        for key, unused in lacking.items()
        if settings[key] != unused
    ]


def needs_transformers5(inputs: Inputs) -> list[str]:
    """Return a note if transformers 4 does not know the RoPE of the exported model, else nothing."""
    kind = read_json(inputs.model / "config.json")["model_type"]
    rope = inputs.rope
    if transformers4.rope_keys(kind, rope.rope_parameters) or rope.method == "none":
        return []
    return [
        f"transformers 4 has no scaled RoPE for models of type {kind} and would train without it; "
        "use transformers 5"
    ]


def results_directory(output: Path) -> str:
    """Return where the framework writes its results, relative to the payload ``output``.

    It lies beside the run, because everything inside the run is sealed and archived with it.
    """
    return f"../../{output.parent.name}-{output.name}"


def write(arguments: argparse.Namespace, script: Path, inputs: Inputs, export: Export) -> None:
    """Write an export and its manifest, and print what the framework's settings cannot express."""
    for note in export.notes:
        print(f"{script.stem}: warning: {note}", file=sys.stderr)
    with new_directory(arguments.output) as directory:
        write_model(inputs, directory / "model")
        size = 4 * len(export.columns) * len(inputs.data) * inputs.length
        require_space(directory, size, "the packed sequences as a data set")
        rows = progress(export.rows, export.total, "export")
        count = write_dataset(directory / "dataset", export.columns, rows)
        if "deepspeed" in export.settings:
            configuration = deepspeed_setup.configuration(export.deepspeed)
            write_json(directory / export.settings["deepspeed"], configuration)
        write_settings(directory / "train.yaml", export)
        write_readme(directory / "README.md", export, arguments.output)
    manifest.write(
        arguments.manifest,
        script=script,
        settings=arguments.settings,
        inputs=identity.input_manifests(arguments),
        files=[file for file in arguments.output.rglob("*") if file.is_file()],
        facts={
            "directory": arguments.output.name,
            "rows": count,
            "not_expressed": export.notes,
        },
    )


def write_model(inputs: Inputs, directory: Path) -> None:
    """Write the base with the run's RoPE in its config.json; the weights are linked.

    The RoPE is written in both forms, because a framework on transformers 4 would not see the current
    one and would train without scaling.
    """
    from transformers import AutoConfig

    directory.mkdir()
    link_weights(inputs.model, directory)
    rope, trust = inputs.rope, inputs.base["trust_remote_code"]
    config = rope.patched(read_json(inputs.model / "config.json"))
    loaded = AutoConfig.from_pretrained(inputs.model, trust_remote_code=trust)
    config = transformers4.with_old_keys(config, rope.rope_parameters, loaded)
    write_json(directory / "config.json", config)
    written = AutoConfig.from_pretrained(directory, trust_remote_code=trust)
    rope.check_config(written, directory / "config.json")


def write_dataset(directory: Path, columns: Sequence[str], rows: Iterator[dict]) -> int:
    """Write rows of int32 lists as a split `train` for ``datasets.load_from_disk``.

    One row at a time, without a copy in a cache; equal rows give equal bytes. Returns their number.
    """
    import pyarrow

    kind = {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "int32"}}
    features = dict.fromkeys(columns, kind)
    schema = pyarrow.schema(
        [(name, pyarrow.list_(pyarrow.int32())) for name in features],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    split, count = directory / "train", 0
    split.mkdir(parents=True)
    name = "data-00000-of-00001.arrow"
    with (
        pyarrow.OSFile(str(split / name), "wb") as file,
        pyarrow.ipc.new_stream(file, schema) as writer,
    ):
        for row in rows:
            lists = {key: [value] for key, value in row.items()}
            writer.write_batch(pyarrow.RecordBatch.from_pydict(lists, schema=schema))
            count += 1
    write_json(directory / "dataset_dict.json", {"splits": ["train"]})
    write_json(split / "dataset_info.json", {"features": features})
    state = {
        "_data_files": [{"filename": name}],
        "_fingerprint": sha256(split / name)[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_json(split / "state.json", state)
    return count


def write_settings(file: Path, export: Export) -> None:
    """Write the settings as YAML below comments that say what they cannot express."""
    import yaml

    comments = [*export.head, *(f"Not the same: {note}." for note in export.notes)]
    lines = [f"# {line}" for line in comments] + [""]
    text = yaml.safe_dump(export.settings, sort_keys=False, allow_unicode=True)
    write_text(file, "\n".join(lines) + "\n" + text)


def write_readme(file: Path, export: Export, output: Path) -> None:
    """Write how to train with the framework, and how to use the result in this run.

    The README names no absolute path, because its hash would then differ from machine to machine.
    """
    results = results_directory(output)
    root = output.parent.parent
    shown = Path("<paths.results>") if root.is_absolute() else root
    source = (shown / Path(results).name / "trained").as_posix()
    differing = "".join(f"- {note}\n" for note in export.notes) or "- nothing that we know of\n"
    write_text(
        file,
        f"""# This run, for {export.framework}

- `model/`: the base model, with the run's RoPE in its config.json. Set no RoPE option in
  {export.framework}: it would extend the context a second time.
- `dataset/`: the training sequences, tokenized, packed and labeled.
- `train.yaml`: the settings of this run's section `training`.

Train, in this directory:

```sh
{export.command}
```

The result is written to `{results}`, outside the run. {export.framework} resumes from a checkpoint that it
finds there, so move an older result away first.

To use the result, add this to the run's configuration:

```yaml
training:
  source: {source}
```

Then run Snakemake as before. It skips its own training; merge, evaluation, report and gate stay the same.

What differs from training in Longyarn:

{differing}""",
    )
