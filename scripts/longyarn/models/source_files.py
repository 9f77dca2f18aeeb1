"""The safetensors files of a model directory."""

from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import read_json


def tensor_files(model_directory: Path) -> list[Path]:
    """Return the safetensors files of a model directory, in shard order."""
    model_directory = Path(model_directory)
    index = model_directory / "model.safetensors.index.json"
    if index.is_file():
        names = read_json(index).get("weight_map")
        if not names:
            raise UserError(f"{index} has no weight_map; restore it from where the model came")
        if outside := [name for name in names.values() if "/" in name]:
            raise UserError(
                f"{index} names {outside[0]}, which is not beside it; restore the index"
            )
        return [model_directory / name for name in sorted(set(names.values()))]
    single = model_directory / "model.safetensors"
    if not single.is_file():
        raise UserError(
            f"{model_directory} has no model.safetensors; Longyarn loads safetensors only, so convert "
            "the weights first"
        )
    return [single]
