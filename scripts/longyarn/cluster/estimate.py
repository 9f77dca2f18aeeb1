"""What a run costs, from sizes alone: memory of a GPU, arithmetic, disk. docs/planning.md explains.

Bytes and floating-point operations are plain numbers. The memory model describes the training stage, after
the code of its libraries. It was measured on a CPU; on a GPU nobody has measured it.
"""

import math
from dataclasses import dataclass, field

from longyarn.cluster.model_shapes import Shape
from longyarn.config import derived
from longyarn.config.checks import instruments

WIDTH = {"fp32": 4, "bf16": 2, "fp16": 2}  # bytes of a number
GIB = 2**30
# DeepSpeed's defaults, in numbers: the bucket in which gradients are reduced, and the gathered
# weights that ZeRO-3 keeps at hand.
REDUCE_BUCKET = 500_000_000
LIVE_PARAMETERS = 1_000_000_000
CUDA_CONTEXT = 1 * GIB  # CUDA, cuBLAS and NCCL themselves: an allowance, not measured by us
EVALUATED_AT_ONCE = 16384  # tokens of prompts that longyarn/evaluation/passkey_prompts.py batches
LOGITS_AT_ONCE = 1024  # positions of logits that scripts/longyarn/evaluation/window_losses.py holds
RULER_EXAMPLES = 500  # of each task and length, in lm_eval
TEXT_PER_TOKEN = 5  # bytes of text, about; English has 4 to 5
# Parts of what is written to disk that each phase of the extension has of its own.
OF_EACH_PHASE = ("packed sequences", "checkpoints", "what is trained", "merged model")


@dataclass(frozen=True)
class Setup:
    """What decides on the memory of a training process."""

    length: int  # tokens of a sequence
    micro_batch: int = 1
    mode: str = "lora"
    lora: dict = field(default_factory=dict)
    precision: str = "bf16"
    zero_stage: int = 2
    processes: int = 1
    gradient_checkpointing: bool = True
    attention: str = "sdpa"
    on_gpu: bool = True
    offload_weights: bool = False
    offload_optimizer: bool = False
    offload_activations: bool = False
    sequence_parallel: int = 1
    loss: str = "stock"

    @classmethod
    def of(cls, config: dict) -> "Setup":
        """Return the setup of a whole configuration."""
        training = config["training"]
        return cls(
            length=derived.sequence_length(config),
            micro_batch=training["micro_batch_size"],
            processes=derived.processes(training),
            on_gpu=training["gpus"] > 0,
            offload_weights=training["offload"] == "all",
            offload_optimizer=training["offload"] != "none",
            offload_activations=training["activation_offload"],
            sequence_parallel=training["sp_size"],
            **{
                key: training[key]
                for key in (
                    "mode", "lora", "precision", "zero_stage", "gradient_checkpointing", "attention", "loss",
                )
            },
        )  # fmt: skip


def memory(shape: Shape, setup: Setup) -> dict[str, float]:
    """Return the bytes of each part of one process's memory; ``peak`` adds them up.

    ZeRO's shares: arXiv 1910.02054, section 5. Activations: as arXiv 2205.05198 counts them, for
    what transformers' decoder layers keep.
    """
    width = WIDTH[setup.precision]
    trained = shape.trained_parameters(setup.mode, setup.lora)
    held = shape.parameters + (trained if setup.mode == "lora" else 0)
    shares = [setup.processes if setup.zero_stage >= stage else 1 for stage in (1, 2, 3)]
    states, gradients, weights = (trained / shares[0], trained / shares[1], held / shares[2])
    gathered = 0.0
    if setup.zero_stage == 3 and (setup.processes > 1 or setup.offload_weights):
        gathered = min(held, LIVE_PARAMETERS)
    if setup.offload_weights:
        weights = 0.0
    if setup.offload_optimizer:
        states = gradients = 0.0
    # In float32, stages 0 and 3 update the weights themselves; else there is a float32 copy.
    copied = setup.precision != "fp32" or setup.zero_stage in (1, 2)
    bucket = trained if setup.zero_stage or setup.processes > 1 else 0
    if setup.on_gpu and setup.zero_stage:
        bucket = REDUCE_BUCKET  # allocated whole; on a CPU the system gives only what is written
    kept, layer, largest = activations(shape, setup)
    tokens = setup.micro_batch * setup.length / setup.sequence_parallel
    # Positions at once: log-softmax and two gradients of it, in float32.
    scored = tokens if setup.loss == "stock" else min(tokens, derived.LOSS_CHUNK)
    logits = 12 * shape.vocab_size * scored
    if setup.loss != "stock":  # its gradients are made in the forward pass
        logits += width * shape.hidden_size * tokens
        if setup.mode == "full" or setup.lora["train_output_head"]:
            logits += 4 * shape.embedding_parameters
    largest = max(largest, 4 * shape.vocab_size * scored)
    return {
        "weights": width * (weights + gathered),
        "gradients": width * gradients,
        "reduce bucket": width * min(bucket, REDUCE_BUCKET),
        "master copies": 4 * states * copied,
        "optimizer state": 8 * states,
        "activations kept": kept,
        "one layer at work": layer,
        "logits and loss": logits,
        "optimizer step": 4 * states,
        # The Trainer copies the whole model, a tied head once more, to host memory to save it.
        "saving": 0.0 if setup.on_gpu else saved_copy(shape, setup),
        "CUDA context": CUDA_CONTEXT * setup.on_gpu,
        "fragmentation": largest * setup.on_gpu,
    }


def peak(parts: dict[str, float]) -> float:
    """Return the most bytes held at once.

    The backward pass of the loss, that of a layer, the optimizer's step and saving follow one another.
    """
    passing = (
        "activations kept", "one layer at work", "logits and loss", "optimizer step", "saving",
    )  # fmt: skip
    kept, layer, logits, step, saving = (parts[name] for name in passing)
    lasting = sum(size for name, size in parts.items() if name not in passing)
    return lasting + max(kept + max(layer, logits), step, saving)


def saved_copy(shape: Shape, setup: Setup) -> float:
    """Return the bytes of host memory in which a process copies the model when it saves."""
    tied = shape.embedding_parameters * shape.tie_word_embeddings
    trained = shape.trained_parameters(setup.mode, setup.lora)
    held = shape.parameters + tied + (trained if setup.mode == "lora" else 0)
    return WIDTH[setup.precision] * held


def activations(shape: Shape, setup: Setup) -> tuple[float, float, float]:
    """Return bytes kept for the backward pass, bytes of a layer's own backward, and of one tensor.

    The last is the largest tensor of a layer, for the allowance for fragmentation.
    """
    width, length = WIDTH[setup.precision], setup.length
    tokens = setup.micro_batch * length / setup.sequence_parallel
    hidden, middle, queries = shape.hidden_size, shape.intermediate_size, shape.attention_size
    dense = setup.attention == "eager"
    keys = queries if dense else shape.key_value_size  # repeated for each head, or not

    # Numbers kept of a token, in float32: the inputs of the two norms.
    norms = 2 * hidden + shape.qk_norm * (queries + keys)
    # In the model's type: queries, keys, values and what attention gives; gate, its SiLU and up.
    numbers = 2 * queries + 2 * keys + 3 * middle
    every = setup.mode == "full" or setup.lora["targets"] == "all-linear"
    numbers += 2 * hidden + middle if every else hidden  # inputs of the matrices that are trained
    if setup.mode == "lora":
        numbers += setup.lora["rank"] * len(shape.linears(setup.lora["targets"]))
    if setup.mode == "full" or setup.lora["train_norms"]:
        numbers += 2 * hidden
    layer = tokens * (4 * norms + width * numbers)
    # Gradients on their way through the MLP, or through the dense attention.
    moving = tokens * width * (2 * middle + hidden)
    largest = tokens * width * middle
    if dense:
        scores = setup.micro_batch * length**2 * shape.num_attention_heads / setup.sequence_parallel
        layer += scores * (4 + width * (width < 4))  # softmax in float32, and cast
        moving = max(moving, 2 * 4 * scores)
        largest = max(largest, 4 * scores)
    last = tokens * hidden * (4 + width)  # the last norm's input and output
    if setup.gradient_checkpointing:
        # On a CPU what is offloaded stays where it was.
        inputs = tokens * hidden * width * (not (setup.offload_activations and setup.on_gpu))
        return shape.num_hidden_layers * inputs + last, layer + moving, largest
    return shape.num_hidden_layers * layer + last, moving, largest


def evaluation_memory(shape: Shape, config: dict, on_gpu: bool) -> tuple[float, float]:
    """Return bytes of the weights and of all else of an evaluation job; no gradients are kept."""
    evaluation = derived.evaluation(config, shape.max_position_embeddings)
    width = WIDTH[evaluation["precision"]]
    longest = max(
        length for name in instruments(evaluation) for length in evaluation[name]["lengths"]
    )
    tokens = max(longest, EVALUATED_AT_ONCE)
    work = tokens * width * (3 * shape.intermediate_size + 4 * shape.hidden_size)
    work += tokens * 4 * shape.hidden_size
    # Of the passkey's prompts, keys and values are kept.
    work += tokens * width * 2 * shape.key_value_size * shape.num_hidden_layers
    work += LOGITS_AT_ONCE * shape.vocab_size * (width + 8)
    if evaluation["attention"] == "eager":
        work += 2 * 4 * shape.num_attention_heads * longest * tokens
    return width * shape.parameters, work + CUDA_CONTEXT * on_gpu


def forward_flops(shape: Shape, length: int) -> tuple[float, float, float]:
    """Return operations of a token's forward pass: layers' matrices, output head, attention.

    A multiply-add counts as two. Attention is causal, so a token meets length/2 others on average:
    2 × 2 × length/2 × width of the queries, in each layer.
    """
    head = shape.embedding_parameters
    attention = 2 * length * shape.attention_size * shape.num_hidden_layers
    return 2 * (shape.matrix_parameters - head), 2 * head, attention


def training_flops(shape: Shape, setup: Setup, tokens: float) -> float:
    """Return the operations of training on ``tokens`` tokens, those of recomputing included.

    The backward pass costs two forward passes (arXiv 2205.05198, appendix A): gradients of inputs,
    and of weights. With LoRA the frozen matrices need only the first.
    """
    matrices, head, attention = forward_flops(shape, setup.length)
    flops = 3 * (matrices + head + attention)
    if setup.mode == "lora":
        flops -= matrices + head * (not setup.lora["train_output_head"])
        flops += 6 * shape.adapter_parameters(setup.lora)
    if setup.gradient_checkpointing:
        flops += matrices + attention
        if setup.mode == "full":  # torch stops recomputing before a layer's last matrix
            flops -= 2 * shape.intermediate_size * shape.hidden_size * shape.num_hidden_layers
    return flops * tokens


def evaluation_flops(shape: Shape, config: dict, instrument: str) -> float:
    """Return the operations of one instrument on one variant."""
    settings = derived.evaluation(config, shape.max_position_embeddings)[instrument]
    if instrument == "perplexity":
        read = perplexity_tokens(settings, config["corpus"])
    elif instrument == "harness":  # as if all were RULER's, the longest there are
        examples = len(settings["tasks"]) * (settings["limit"] or RULER_EXAMPLES)
        read = [(length, length * examples) for length in settings["lengths"]]
    else:
        trials = settings["trials"] * len(settings["depths"])
        read = [(length, length * trials) for length in settings["lengths"]]
    return sum(tokens * sum(forward_flops(shape, length)) for length, tokens in read)


def perplexity_tokens(settings: dict, corpus: dict) -> list[tuple[int, int]]:
    """Return each window length and the tokens read at it; truncate and by_position read none.

    ``settings`` is config section `evaluation.perplexity` with its lengths.
    """
    documents = len(corpus["held_out"]) + sum(corpus["held_out_documents"].values())
    taken = settings["tokens_per_document"]
    read = [(length, documents * taken) for length in settings["lengths"]]
    if sliding := settings["sliding"]:
        for length in sliding["lengths"]:
            windows = 1 + math.ceil((taken - length) / sliding["stride"])
            read.append((length, documents * windows * length))
    return read


def training_tokens(config: dict) -> int | None:
    """Return the tokens that training reads, or None where only the corpus tells: epochs of all.

    None too where it took place elsewhere.
    """
    training, budget = config["training"], config["mix"]["token_budget"]
    if training["source"]:
        return None
    if training["steps"] is not None:
        return training["steps"] * training["batch_size"] * derived.sequence_length(config)
    return None if budget is None else round(training["epochs"] * budget)


def packed_tokens(config: dict) -> int | None:
    """Return the tokens of the packed sequences; without a budget, as many as training reads."""
    return config["mix"]["token_budget"] or training_tokens(config)


def stored_token(shape: Shape) -> int:
    """Return the bytes of a token on disk, as scripts/tokenise.py stores them."""
    return 2 if shape.vocab_size <= 1 << 16 else 4


def disk(shape: Shape, config: dict, base: int | None = None) -> dict[str, float]:
    """Return bytes on disk by part; ``base`` is the size of the base's weights where it is known."""
    training = config["training"]
    width = WIDTH[training["precision"]]
    trained = shape.trained_parameters(training["mode"], training["lora"])
    base = base or 2 * shape.parameters
    packed = packed_tokens(config) or 0
    budgets = sum(entry["characters"] or 0 for entry in config["corpus"]["datasets"])
    # A checkpoint: what is trained, twice (as DeepSpeed and as the Trainer save it), and in float32
    # the master copies and AdamW's two averages.
    checkpoint = trained * (2 * width + 12)
    if training["mode"] == "lora" and shape.tie_word_embeddings:
        checkpoint += width * shape.embedding_parameters  # a tied head does not count as frozen
    return {
        "base model": base,
        "corpus": max(packed * TEXT_PER_TOKEN, budgets),
        "tokens": packed * stored_token(shape),
        "packed sequences": packed * stored_token(shape),
        "checkpoints": training["save_total_limit"] * checkpoint + width * trained,
        "what is trained": width * trained,
        "merged model": base,
    }
