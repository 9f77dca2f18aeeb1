"""Configuration files and how they are layered: later files win, key by key."""

from pathlib import Path

import yaml

from longyarn.config.load import complete
from longyarn.config.phases import merged
from longyarn.core.errors import UserError, first_line
from longyarn.core.files import ROOT

SCHEMA = ROOT / "schemas" / "config.schema.yaml"
EMBEDDED = ROOT / "config.yaml"  # the configuration of the micro model


def layered(*files: Path) -> dict:
    """Return the complete, checked configuration of these files, layered as Snakemake's --configfile does.

    Without files, it is the embedded default. As in the Snakefile, config.yaml is read only then.
    """
    config: dict = {}
    for file in files or (EMBEDDED,):
        config = merged(config, mapping(file))
    return complete(config, SCHEMA)


def mapping(file: Path) -> dict:
    """Return the keys and values of a config file; an empty file has none."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"config file {file} is missing; correct the path") from None
    except OSError as error:
        raise UserError(
            f"config file {file} cannot be read ({error.strerror}); correct the path"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"config file {file} is not UTF-8; save it as UTF-8") from None
    except (yaml.YAMLError, ValueError) as error:  # such as the date 2024-99-99
        raise UserError(f"{file} is not valid YAML ({first_line(error)}); fix the syntax") from None
    if content is not None and not isinstance(content, dict):
        raise UserError(
            f"config file {file} is not a mapping of keys to values; write it like config.yaml"
        )
    return content or {}
