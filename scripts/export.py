"""Write the directory to publish: the merged model with a model card, readable by older software too.

    python scripts/export.py --merge results/micro/merged.json --rope results/micro/rope/yarn.json \
        --report results/micro/report.json --thresholds null \
        --settings '{"name": null, "license": null, "language": []}' \
        --template resources/card.md.jinja \
        --manifest results/micro/export.json --output results/micro/export

The weights are linked from the merged model and take no disk space. config.json has its RoPE in the current
form and in the form before transformers 5. The stage loads it again, and stops unless it rotates as the RoPE
manifest says. The card is made from report.json, so equal runs have equal cards.
"""

import argparse
import json
import sys
from pathlib import Path

from longyarn.core import manifest
from longyarn.core.errors import UserError, program
from longyarn.core.files import link_weights, new_directory, read_json, write_json
from longyarn.core.torch_setup import set_up_torch
from longyarn.reporting import model_card
from longyarn.reporting.gate_outcome import compare
from longyarn.rope import transformers4
from longyarn.rope.record import RopeRecord

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--merge", type=Path, required=True, help="manifest of the merged model")
    parser.add_argument("--rope", type=Path, required=True, help="manifest of its RoPE settings")
    parser.add_argument("--report", type=Path, required=True, help="report.json of the run")
    parser.add_argument(
        "--thresholds", type=json.loads, required=True, help="config section `gate`, as JSON"
    )
    parser.add_argument(
        "--settings", type=json.loads, required=True, help="name, license and language, as JSON"
    )
    parser.add_argument("--template", type=Path, required=True, help="Jinja2 template of the card")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    arguments = parser.parse_args()
    set_up_torch(1)

    merged = manifest.read(arguments.merge)
    rope = RopeRecord.read(arguments.rope)
    report = read_json(arguments.report)
    facts = merged["facts"]
    compared = compare(
        arguments.thresholds, report["verdict"], facts["merge_error"], facts["merge_error_tensor"]
    )
    source, trust = arguments.merge.parent / facts["directory"], facts["trust_remote_code"]
    config = config_for_all(source, rope, trust)
    name = arguments.settings["name"] or model_card.default_name(report)
    text = model_card.text(
        arguments.template, report, compared, arguments.settings | {"name": name}
    )
    with new_directory(arguments.output) as directory:
        link_weights(source, directory)
        write_json(directory / "config.json", config)
        write_rest(directory, config)
        (directory / "README.md").write_text(text, encoding="utf-8")
        check(directory, rope, trust)
    files = sorted(arguments.output.glob("[!.]*"))
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings=arguments.settings,
        inputs={"merge": arguments.merge, "rope": arguments.rope},
        files=files,
        facts={
            "directory": arguments.output.name,
            "name": name,
            "target_length": rope.max_position_embeddings,
            "old_rope_keys": sorted(
                transformers4.rope_keys(config["model_type"], rope.rope_parameters)
            ),
            "compared": compared,
            "bytes": sum(file.stat().st_size for file in files),
        },
    )


def config_for_all(source: Path, rope: RopeRecord, trust_remote_code: bool) -> dict:
    """Return the merged model's config.json with its RoPE in both forms."""
    from transformers import AutoConfig

    loaded = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    rope.check_config(loaded, source / "config.json")
    config = read_json(source / "config.json")
    return transformers4.with_old_keys(config, rope.rope_parameters, loaded)


def write_rest(directory: Path, config: dict) -> None:
    """Write tokenizer settings that all versions read, and generation settings if there are none."""
    tokenizer = directory / "tokenizer_config.json"
    if tokenizer.is_file():
        write_json(tokenizer, transformers4.tokenizer_keys(read_json(tokenizer)))
    generation = directory / "generation_config.json"
    if not generation.is_file():
        ids = {key: config[key] for key in TOKEN_IDS if config.get(key) is not None}
        write_json(generation, ids)


def check(directory: Path, rope: RopeRecord, trust_remote_code: bool) -> None:
    """Stop unless transformers builds, from the exported config alone, the RoPE of the manifest."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    try:
        rope.check_config(config, Path("config.json"))
        with torch.device("meta"):  # without memory for the weights
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        rotary = [part for part in model.modules() if hasattr(part, "inv_freq")]
        if trust_remote_code and not all(hasattr(part, "config") for part in rotary):
            print(
                "export: the model's own code builds its RoPE, so it is not compared",
                file=sys.stderr,
            )
            return
        built = torch.nn.ModuleList(type(part)(part.config) for part in rotary)
        rope.check_model(built)
    except UserError as error:
        raise UserError(
            f"the exported config.json of a {config.model_type} model would not run as it was trained "
            f"({error}); publish the merged model instead, whose RoPE has only transformers 5's form"
        ) from None


if __name__ == "__main__":
    program(main)()
