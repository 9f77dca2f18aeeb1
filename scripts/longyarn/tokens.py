"""Reading what the stage tokenise wrote."""

from pathlib import Path

import numpy as np

from longyarn import manifest


def held_out_documents(tokens_manifest: Path) -> dict[str, np.ndarray]:
    """Return the held-out documents' tokens by id, each int32 (n,)."""
    from safetensors.numpy import load_file

    tokens = manifest.read(tokens_manifest)
    stored = load_file(Path(tokens_manifest).parent / next(iter(tokens["files"])))
    offsets = stored["offsets"]
    return {
        document["id"]: stored["tokens"][offsets[number] : offsets[number + 1]]
        for number, document in enumerate(tokens["facts"]["documents"])
        if document["held_out"]
    }
