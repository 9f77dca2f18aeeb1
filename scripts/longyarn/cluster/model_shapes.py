"""The shape of a model: the sizes that decide on its memory and arithmetic, without its weights."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from longyarn.core.errors import UserError
from longyarn.core.files import ROOT, located


@dataclass(frozen=True)
class Shape:
    """A decoder with RMSNorm, gated MLP and rotary attention; ``config.json`` has the same names."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    max_position_embeddings: int | None = None

    @classmethod
    def of(cls, config: dict, name: str = "config.json") -> "Shape":
        """Return the shape in a ``config.json``; refuse an architecture that is not one of ours."""
        family = config.get("model_type")
        if family not in ("llama", "mistral", "qwen2", "qwen3"):
            raise UserError(
                f"{name} is of model_type {family}, whose memory the plan does not know; set "
                "model.shape to the nearest architecture of resources/shapes.yaml"
            )
        # Qwen2 has biases on q, k and v by its code; the others say so, on all four matrices.
        biases = bool(config.get("attention_bias", False))

        def size(key: str, default: int | None = None) -> int:
            value = config.get(key)
            if value is None and default:
                return default
            if key not in config:
                raise UserError(f"{name} lacks {key}; restore it from where it came")
            if type(value) is not int or value < 1:
                raise UserError(
                    f"{name} has {key} {json.dumps(value)}, which must be a whole number above 0; "
                    "restore it from where it came"
                )
            return value

        hidden, heads = size("hidden_size"), size("num_attention_heads")
        return cls(
            hidden_size=hidden,
            intermediate_size=size("intermediate_size"),
            num_hidden_layers=size("num_hidden_layers"),
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", hidden // heads),
            vocab_size=size("vocab_size"),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            qkv_bias=biases or family == "qwen2",
            output_bias=biases,
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            max_position_embeddings=config.get("max_position_embeddings"),
        )

    @property
    def attention_size(self) -> int:
        """Width of the queries of all heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of the keys, or of the values, of all their heads."""
        return self.num_key_value_heads * self.head_dim

    def linears(self, targets: str = "all-linear") -> list[tuple[int, int, bool]]:
        """Return (inputs, outputs, bias) of a layer's matrices; ``attention`` leaves the MLP out."""
        h, q, kv, f = (
            self.hidden_size, self.attention_size, self.key_value_size, self.intermediate_size,
        )  # fmt: skip
        attention = [
            (h, q, self.qkv_bias), (h, kv, self.qkv_bias), (h, kv, self.qkv_bias),
            (q, h, self.output_bias),
        ]  # fmt: skip
        mlp = [(h, f, self.mlp_bias), (h, f, self.mlp_bias), (f, h, self.mlp_bias)]
        return attention if targets == "attention" else attention + mlp

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        matrices = sum(i * o + o * bias for i, o, bias in self.linears())
        return matrices + 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the input embedding, which the output head has once more unless tied."""
        return self.vocab_size * self.hidden_size

    @property
    def parameters(self) -> int:
        """All parameters; a tied embedding counts once."""
        tables = self.embedding_parameters * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * self.layer_parameters + tables + self.hidden_size

    @property
    def matrix_parameters(self) -> int:
        """Parameters that every token is multiplied with: all matrices, and the output head."""
        layer = sum(i * o for i, o, _ in self.linears())
        return self.num_hidden_layers * layer + self.embedding_parameters

    def adapter_parameters(self, lora: dict) -> int:
        """Parameters of all A (rank, inputs) and B (outputs, rank)."""
        layer = sum(lora["rank"] * (i + o) for i, o, _ in self.linears(lora["targets"]))
        return self.num_hidden_layers * layer

    def trained_parameters(self, mode: str, lora: dict) -> int:
        """Return how many parameters training changes, as scripts/longyarn/models/lora.py has it."""
        if mode == "full":
            return self.parameters
        count = self.adapter_parameters(lora)
        if lora["train_norms"]:
            norms = 2 * self.hidden_size + 2 * self.head_dim * self.qk_norm
            count += self.num_hidden_layers * norms + self.hidden_size
        count += self.embedding_parameters * lora["train_embeddings"]
        if lora["train_output_head"] and not self.tie_word_embeddings:
            count += self.embedding_parameters
        return count


@functools.cache
def named(name: str) -> Shape:
    """Return a shape of resources/shapes.yaml."""
    known = yaml.safe_load((ROOT / "resources/shapes.yaml").read_text(encoding="utf-8"))
    if name not in known:
        raise UserError(
            f"model.shape {name} is not in resources/shapes.yaml, which has {', '.join(known)}"
        )
    return Shape.of(known[name], name)


def find(config: dict) -> Shape | None:
    """Return the shape of the config's model, or None where nothing at hand tells it.

    In this order: the ``config.json`` of a local ``model.source``, that of the downloaded base,
    ``model.shape``.
    """
    source, name = config["model"]["source"], config["model"]["shape"]
    run = Path(config["paths"]["results"]) / config["run"]
    directories = [located(source)]
    if (_read(run / "base.json").get("facts") or {}).get("source") == source:
        directories.append(run / "base")
    for directory in directories:
        if record := _read(directory / "config.json"):
            try:
                return Shape.of(record, str(directory / "config.json"))
            except UserError:
                if name is None:
                    raise
    return named(name) if name else None


def _read(file: Path) -> dict:
    """Return a JSON file's mapping; nothing where it is not there or broken, which its stage says."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}
