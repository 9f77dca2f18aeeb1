"""The files of a model directory: which of them a run needs, and whether they are complete."""

from pathlib import Path

from longyarn.core.errors import UserError
from longyarn.core.files import located, read_json

# Glob patterns of the files beside the weights; only the top directory of a repository is searched.
SETTINGS = (
    "model.safetensors.index.json", "config.json", "generation_config.json", "tokenizer*.json",
    "tokenizer*.model*", "special_tokens_map.json", "added_tokens.json", "vocab*.json", "vocab*.txt",
    "merges.txt", "chat_template.j*", "LICENSE*",
)  # fmt: skip
CODE = ("*.py",)
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SAFETENSORS = ".safetensors"

# The inputs of the rules: when one of these files of a local source changes, its stage runs again.
BASE_MODEL_FILES = (*SETTINGS, *CODE, f"*{SAFETENSORS}")
EXTERNAL_MODEL_FILES = (*SETTINGS, ADAPTER_CONFIG, ADAPTER_WEIGHTS, f"model*{SAFETENSORS}")


def is_local(source: str) -> bool:
    """Tell whether a model source names a directory; a hub repository is owner/name."""
    return located(source).exists() or source.startswith(("/", ".", "~"))


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


def needed_files(source: Path, code: bool) -> list[Path]:
    """Return the files of a model directory that a run needs; ``code``: its Python files too."""
    patterns = (*SETTINGS, *(CODE if code else ()))
    files = {file for pattern in patterns for file in source.glob(pattern) if file.is_file()}
    if not any(file.name == "config.json" for file in files):
        raise UserError(f"{source} has no config.json; model.source must name a model directory")
    # Not every *.safetensors: some models publish their tensors twice, under other names.
    return sorted(files | set(tensor_files(source)))


def check_complete(source: Path, files: list[Path]) -> None:
    """Stop when a tensor file is missing, truncated or not safetensors, or a JSON file is broken.

    The tensor files are those of the directory ``source``; the JSON files are those among ``files``.
    """
    from safetensors import SafetensorError, safe_open

    for file in files:
        if file.suffix == ".json" and not isinstance(read_json(file), dict):
            raise UserError(f"{file} is not a JSON object; restore it from where the model came")
    for file in tensor_files(source):
        try:
            with safe_open(file, framework="numpy") as tensors:
                tensors.keys()
        except FileNotFoundError:
            raise UserError(f"{file}, named in the index, is missing; download it again") from None
        except SafetensorError as error:
            raise UserError(
                f"{file} is not a whole safetensors file ({error}); download it again"
            ) from None


def check_code(source: Path) -> None:
    """Stop when a model names code of another repository, which each stage would download unpinned."""
    for name in ("config.json", "tokenizer_config.json"):
        if not (source / name).is_file():
            continue
        for reference in read_json(source / name).get("auto_map", {}).values():
            for part in [reference] if isinstance(reference, str) else reference:
                if part and "--" in part:
                    raise UserError(
                        f"auto_map in {source / name} names code of another repository, {part}; copy that "
                        f"code beside the model and write {part.rpartition('--')[2]}"
                    )
