"""The RoPE of one variant as a typed record: read from a manifest, checked, written to a ``config.json``."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from longyarn.core import manifest
from longyarn.core.errors import UserError

# Other places where a config.json can state its RoPE. transformers lets some of them override
# rope_parameters, so none of them may remain beside it.
OTHER_KEYS = (
    "rope_scaling", "rope_theta", "rotary_emb_base", "rotary_pct", "partial_rotary_factor",
    "original_max_position_embeddings",
)  # fmt: skip


@dataclass(frozen=True)
class RopeRecord:
    """The facts that the stage patch_rope writes into the manifest of a variant.

    Frequencies are in radians a token, one for each of the ``rotary_dim // 2`` pairs of dimensions.
    """

    method: str  # none, linear, ntk or yarn
    replaced: dict | None  # rope_parameters of the base's own scaling, if this one replaces it
    full_attention: bool  # True if the base's sliding window is removed
    factor: float  # s = new length / original length
    original_max_position_embeddings: int
    max_position_embeddings: int
    rope_parameters: dict
    rotary_dim: int  # rotated dimensions of a head
    attention_factor: float  # multiplies cos and sin
    inverse_frequencies: list[float]
    base_inverse_frequencies: list[float]
    ramp_limits: tuple[float, float] | None  # pair indices; yarn only

    @classmethod
    def read(cls, path: Path) -> "RopeRecord":
        """Return the record in a RoPE manifest."""
        return cls.from_facts(manifest.read_facts(path), path)

    @classmethod
    def from_facts(cls, facts: dict, path: Path | str = "the RoPE manifest") -> "RopeRecord":
        """Return the record for a RoPE manifest's facts; ``path`` is named in the error message."""
        try:
            return cls(**facts)
        except TypeError:
            raise UserError(
                f"{path} does not hold the facts of a RoPE manifest; delete it and run again, so that "
                "patch_rope writes it"
            ) from None

    def facts(self) -> dict:
        """Return the record as the facts of a manifest."""
        return dataclasses.asdict(self)

    def patched(self, config: dict) -> dict:
        """Return a copy of a ``config.json`` that has this RoPE, and no older form of it."""
        patched = {key: value for key, value in config.items() if key not in OTHER_KEYS}
        patched["rope_parameters"] = dict(self.rope_parameters)
        patched["max_position_embeddings"] = int(self.max_position_embeddings)
        if self.full_attention:
            patched["sliding_window"] = None
        return patched

    def apply(self, config) -> None:
        """Set this RoPE in a transformers configuration. Do this before the model is built."""
        config.rope_parameters = dict(self.rope_parameters)
        config.max_position_embeddings = self.max_position_embeddings
        if self.full_attention:
            config.sliding_window = None

    def check_config(self, config, source: Path) -> None:
        """Stop unless a transformers configuration has this RoPE; ``source`` is the file it came from."""
        loaded = {k: v for k, v in (config.rope_parameters or {}).items() if k != "type"}
        length = config.max_position_embeddings
        if loaded != self.rope_parameters or length != self.max_position_embeddings:
            raise UserError(
                f"{source} has RoPE {loaded} for {length} positions, but the run's manifest says "
                f"{self.rope_parameters} for {self.max_position_embeddings}; the file was edited or comes "
                "from another run, so rebuild it"
            )
        if self.full_attention and config.sliding_window is not None:
            raise UserError(
                f"{source} has a sliding window of {config.sliding_window}, but the run's manifest says "
                "that it has none; the file was edited or comes from another run, so rebuild it"
            )

    def check_model(self, model) -> None:
        """Stop unless every rotary module of a built model has these frequencies, in float32.

        A configuration can be right and the model wrong: when RoPE was set after the model was built,
        or when its positions were computed in bfloat16.
        """
        import torch

        expected = np.asarray(self.inverse_frequencies, dtype=np.float64)
        rotary = {n: part for n, part in model.named_modules() if hasattr(part, "inv_freq")}
        if not rotary:
            raise UserError(
                "the model has no rotary embedding with inv_freq, so its RoPE cannot be checked"
            )
        for name, module in rotary.items():
            actual = module.inv_freq.detach().cpu().double().numpy()
            if module.inv_freq.dtype != torch.float32:
                raise UserError(f"{name}.inv_freq is {module.inv_freq.dtype}; RoPE needs float32")
            if actual.shape != expected.shape or not np.allclose(
                actual, expected, rtol=1e-6, atol=0
            ):
                raise UserError(
                    f"{name} does not rotate as the RoPE manifest says (expected {expected[:3]}…, found "
                    f"{actual[:3]}…); the model was built before its RoPE was set, or by other code"
                )
            scaling = getattr(module, "attention_scaling", 1.0)
            if abs(scaling - self.attention_factor) > 1e-6:
                raise UserError(
                    f"{name} scales attention by {scaling}, but the RoPE manifest says "
                    f"{self.attention_factor}"
                )
