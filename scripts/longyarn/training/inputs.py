"""What a training run reads: the base model, its RoPE settings and the packed sequences."""

import argparse
from dataclasses import dataclass
from pathlib import Path

from longyarn.core import manifest
from longyarn.data.packed_dataset import Packed
from longyarn.data.token_store import Tokens
from longyarn.rope.record import RopeRecord


@dataclass(frozen=True)
class Inputs:
    """The facts of base, RoPE and pack, the packed sequences, and config section `training`."""

    model: Path  # the base's directory
    rope_manifest: Path
    base: dict
    rope: RopeRecord
    pack: dict
    data: Packed
    settings: dict

    @classmethod
    def read(cls, arguments: argparse.Namespace) -> "Inputs":
        """Read what the arguments of ``longyarn.training.identity`` name."""
        base, pack = manifest.read(arguments.base)["facts"], manifest.read(arguments.pack)
        masks = pack["facts"]["document_masks"]
        return cls(
            model=arguments.base.parent / base["directory"],
            rope_manifest=arguments.rope,
            base=base,
            rope=RopeRecord.read(arguments.rope),
            pack=pack["facts"],
            data=Packed(arguments.pack.parent / next(iter(pack["files"])), masks),
            settings=arguments.settings,
        )

    @property
    def length(self) -> int:
        """Tokens in a sequence."""
        return self.pack["sequence_length"]

    @property
    def document_masks(self) -> bool:
        """Whether the documents of a sequence are hidden from one another."""
        return self.pack["document_masks"]

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step trains on."""
        return self.settings["batch_size"] * self.length

    def documents_of(self, step: int, tokens: Path | None) -> list[str]:
        """Return the documents in the batch of a step; the first step is 1.

        ``tokens`` is the manifest of the tokens, which has their names; without it they are numbered.
        """
        numbers = self.data.documents(self.data.rows(step, self.settings["batch_size"]))
        if not tokens:
            return [f"document {number}" for number in numbers]
        names = Tokens(tokens)
        return [names.id(number) for number in numbers]
