"""Turn documents into tokens with the model's own tokenizer, and mark the held-out documents.

    python scripts/tokenise.py --base results/micro/base.json --corpus results/micro/corpus.json \
        --held-out shakespeare/macbeth kjv/acts --workers 2 --work work \
        --manifest results/micro/tokens.json --output results/micro/tokens

Each document begins with the tokenizer's bos token and ends with its eos token, if it has them. Finished
parts are kept in a work directory, so a run that was killed continues. longyarn/data/token_store.py reads
the payload.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from longyarn.core import attempts, manifest, tensorfile
from longyarn.core.code_hash import code_hash
from longyarn.core.console import token_progress
from longyarn.core.errors import UserError, program
from longyarn.core.files import link_or_copy, new_directory, sha256, write_text
from longyarn.data import chat_templates, documents, token_workers
from longyarn.data.token_store import INDEX, make_index
from longyarn.models import loading


def main() -> None:
    arguments = parse_arguments()
    base = manifest.read(arguments.base)["facts"]
    shards = documents.shard_paths(arguments.corpus)
    template = arguments.chat_template and chat_templates.load(arguments.chat_template)
    model = arguments.base.parent / base["directory"]
    work = attempts.directory(arguments.work, identity(arguments, template))
    work.mkdir(parents=True, exist_ok=True)
    attempts.record(work, identity(arguments, template))
    tokenizer = prepare(model, base["trust_remote_code"], template, work)
    units = token_workers.units(shards, work)
    tokenise(units, tokenizer, arguments.workers)

    parts = [unit.output for unit in units]
    index, facts = make_index(parts, arguments.held_out, arguments.held_out_documents)
    with new_directory(arguments.output) as directory:
        tensorfile.write(directory / INDEX, index)
        for part in parts:
            link_or_copy(part, directory / part.name)
    manifest.write(
        arguments.manifest,
        script=Path(__file__),
        settings={
            "chat_template": arguments.chat_template,
            "held_out": arguments.held_out,
            "held_out_documents": arguments.held_out_documents,
        },
        inputs={"base": arguments.base, "corpus": arguments.corpus},
        files=sorted(arguments.output.iterdir()),
        facts=facts | {"dtype": tokenizer.dtype},
    )
    shutil.rmtree(work, ignore_errors=True)  # the payload has links to the parts, or copies


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--base", type=Path, required=True, help="manifest of the base model")
    parser.add_argument("--corpus", type=Path, required=True, help="manifest of the corpus")
    parser.add_argument("--held-out", nargs="*", default=[], help="ids kept for evaluation")
    parser.add_argument(
        "--held-out-documents", type=json.loads, default={},
        help="collection -> how many of its first documents to keep for evaluation, as JSON",
    )  # fmt: skip
    parser.add_argument("--chat-template", help="template of conversations: a name or a file")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    parser.add_argument("--work", type=Path, required=True, help="root of work directories")
    parser.add_argument("--manifest", type=Path, required=True, help="manifest to write")
    parser.add_argument("--output", type=Path, required=True, help="directory of the payload")
    return parser.parse_args()


def identity(arguments: argparse.Namespace, template: str | None) -> dict:
    """Return what defines the tokens, and the run; attempts with the same values share work."""
    return {
        "run": str(arguments.manifest),
        "code": code_hash(Path(__file__)),
        "chat_template": template,
        "base": sha256(arguments.base),
        "corpus": sha256(arguments.corpus),
    }


def prepare(
    model: Path, trust_remote_code: bool, template: str | None, work: Path
) -> token_workers.Tokenizer:
    """Check the model's tokenizer and return what the workers need of it."""
    tokenizer = loading.load_tokenizer(model, trust_remote_code)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {model} has no eos token, which ends each document; name one in "
            "tokenizer_config.json (eos_token) in model.source"
        )
    if tokenizer.bos_token_id is None:
        print(
            "tokenise: the tokenizer has no bos token, so documents begin without one",
            file=sys.stderr,
        )
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        write_text(work / "tokenizer.json", backend.to_str())
    return token_workers.Tokenizer(
        file=None if backend is None else work / "tokenizer.json",
        model=model,
        trust_remote_code=trust_remote_code,
        before=() if tokenizer.bos_token_id is None else (tokenizer.bos_token_id,),
        after=(tokenizer.eos_token_id,),
        special={"bos_token": tokenizer.bos_token or "", "eos_token": tokenizer.eos_token},
        dtype="uint16" if max(tokenizer.get_vocab().values()) < 1 << 16 else "int32",
        template=template,
    )


def tokenise(
    units: list[token_workers.Unit], tokenizer: token_workers.Tokenizer, workers: int
) -> None:
    """Write the tokens of every unit that is not finished yet."""
    pending = [unit for unit in units if not unit.output.is_file()]
    if len(pending) < len(units):
        done = len(units) - len(pending)
        print(f"tokenise: {done} of {len(units)} parts are finished already", file=sys.stderr)
    total = sum(unit.end - unit.begin for unit in pending)
    finished = token_workers.run(pending, tokenizer, workers)
    for _ in token_progress(finished, total, "tokenise"):
        pass


if __name__ == "__main__":
    program(main)()
