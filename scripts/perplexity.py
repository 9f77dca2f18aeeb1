"""Measure the perplexity of one variant on the held-out documents, by each configured protocol.

    python scripts/perplexity.py --variant trained --model results/micro/merged.json \
        --base results/micro/base.json --rope results/micro/rope/yarn.json \
        --precision bf16 --attention sdpa --threads 2 --tokens results/micro/tokens.json \
        --settings '{"lengths": [512, 4096], "tokens_per_document": 16384, "truncate": null,
                     "by_position": null, "sliding": null}' \
        --manifest results/micro/perplexity/trained.json

The result is the manifest's facts. longyarn/evaluation/perplexity_protocols.py defines the protocols.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from longyarn.core.errors import UserError, program
from longyarn.data.token_store import held_out_documents
from longyarn.evaluation import perplexity_protocols, variant_model
from longyarn.evaluation.window_losses import window_losses
from longyarn.models.logits import check_logits


def main() -> None:
    arguments = parse_arguments()
    settings = arguments.settings
    settings = settings | {"lengths": variant_model.lengths(arguments, settings["lengths"])}
    longest = max(settings["lengths"])
    documents = held_out_documents(arguments.tokens)
    counts = {name: len(ids) for name, ids in documents.items()}
    kept, too_short = perplexity_protocols.whole_windows(
        counts, longest, settings["tokens_per_document"]
    )
    if too_short:
        print(
            f"perplexity: {len(too_short)} of {len(documents)} held-out documents have fewer than "
            f"{longest} tokens and are left out: {', '.join(too_short)}",
            file=sys.stderr,
        )
    model = variant_model.load(arguments)
    check_logits(model)

    def losses(texts: dict[str, np.ndarray], length: int, stride: int | None = None) -> dict:
        label = f"perplexity of {arguments.variant} at {length}"
        found = window_losses(model, texts, length, stride, label)
        if not all(np.isfinite(part).all() for parts in found.values() for part in parts):
            raise UserError(
                f"the losses of {arguments.variant} at {length} tokens are not finite in "
                f"{arguments.precision}; set evaluation.precision to bf16 or fp32"
            )
        return found

    facts = perplexity_protocols.measure(losses, documents, kept, settings)
    facts["too_short"] = too_short
    variant_model.write(
        arguments,
        script=Path(__file__),
        settings=settings,
        inputs={"tokens": arguments.tokens},
        facts=facts,
    )
    told = (f"{found['value']:.4g} at {length}" for length, found in facts["lengths"].items())
    print(f"perplexity of {arguments.variant}: {', '.join(told)}", file=sys.stderr)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    variant_model.add_model_arguments(parser)
    parser.add_argument("--tokens", type=Path, required=True, help="manifest of the tokens")
    parser.add_argument(
        "--settings", type=json.loads, required=True,
        help="config section `evaluation.perplexity`, as JSON",
    )  # fmt: skip
    variant_model.add_length_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    program(main)()
