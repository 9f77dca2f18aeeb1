"""Read an export with Axolotl's own code: its check of the settings, its data set, packing and collator.

Prints JSON for each directory: the settings that it does not know, and its batches. Only its cache of the
prepared data set is left out. Started by tests/test_export_axolotl.py, with Axolotl on PYTHONPATH.
"""

import json
import math
import os
import sys
import warnings
from pathlib import Path

import yaml
from torch.utils.data import SequentialSampler
from transformers import AutoTokenizer

warnings.simplefilter("ignore")

from axolotl.utils.collators.batching import (  # noqa: E402
    DataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from axolotl.utils.data import sft  # noqa: E402
from axolotl.utils.dict import DictDefault  # noqa: E402
from axolotl.utils.samplers.multipack import MultipackBatchSampler  # noqa: E402
from axolotl.utils.samplers.utils import get_dataset_lengths  # noqa: E402
from axolotl.utils.schemas.config import AxolotlInputConfig  # noqa: E402


def main() -> None:
    sft.save_preprocessed_dataset = lambda *arguments: None
    found = []
    for directory in sys.argv[1:]:
        os.chdir(directory)
        found.append(read())
    print(json.dumps(found))


def read() -> dict:
    """Return what it makes of the export in the working directory."""
    said = yaml.safe_load(Path("train.yaml").read_text(encoding="utf-8"))
    liger = {"plugins", "liger_fused_linear_cross_entropy"}  # known when that plugin is loaded
    unknown = sorted(said.keys() - AxolotlInputConfig.model_fields.keys() - liger)
    checked = AxolotlInputConfig(**{key: said[key] for key in said if key not in liger})
    settings = DictDefault(checked.model_dump(exclude_none=True))
    settings.batch_size = settings.micro_batch_size * settings.gradient_accumulation_steps
    settings.dataset_num_proc = 1
    tokenizer = AutoTokenizer.from_pretrained(settings.base_model)
    tokenizer.pad_token = tokenizer.eos_token
    rows, _, steps, _ = sft.prepare_datasets(settings, tokenizer)
    multiple = 64 * math.ceil(settings.sequence_len / 64)
    batches = []
    if settings.sample_packing:
        sampler = MultipackBatchSampler(
            SequentialSampler(rows),
            batch_size=1,
            batch_max_len=settings.micro_batch_size * settings.sequence_len,
            lengths=get_dataset_lengths(rows),
            bin_size=settings.sample_packing_bin_size,
            group_size=settings.sample_packing_group_size,
            sequential=settings.sample_packing_sequentially,
            num_processes=1,
        )
        collate = V2BatchSamplerDataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)
        batches = [collate([[rows[number] for number in one] for one in bins]) for bins in sampler]
    else:
        collate = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=multiple)
        batches = [collate([row]) for row in rows]
    found = [{key: value.tolist() for key, value in batch.items()} for batch in batches]
    return {"unknown": unknown, "steps": steps, "batches": found}


if __name__ == "__main__":
    main()
