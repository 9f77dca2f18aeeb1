"""The chunked loss: equal to the stock loss and its gradients, without all logits in memory."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from longyarn.core.errors import UserError
from longyarn.models.logits import AFTER_THE_HEAD
from longyarn.training import chunked_loss

SIZES = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def pair(chunk: int = 7, bias: bool = False, **changes):
    """Return a model with the stock loss and its copy with the chunked one."""
    torch.manual_seed(0)
    stock = LlamaForCausalLM(LlamaConfig(**SIZES | changes))
    if bias:
        stock.lm_head = torch.nn.Linear(SIZES["hidden_size"], SIZES["vocab_size"])
    chunked = copy.deepcopy(stock)
    chunked_loss.attach(chunked, chunk)
    return stock, chunked


def batch(ignored: int = 5) -> dict:
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(97, (2, 24), generator=generator)
    labels = input_ids.clone()
    labels[0, :ignored] = -100
    return {"input_ids": input_ids, "labels": labels, "use_cache": False}


def same_gradients(one, other) -> None:
    seen = 0
    for (name, a), b in zip(one.named_parameters(), other.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            seen += 1
            assert float((a.grad - b.grad).norm() / a.grad.norm().clamp(min=1e-12)) <= 1e-5, name
    assert seen


def same_loss_and_gradients(stock, chunked, **inputs) -> None:
    expected, found = (model(**inputs).loss for model in (stock, chunked))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)
    expected.backward()
    found.backward()
    same_gradients(stock, chunked)


@pytest.mark.parametrize("items", [None, 100])
@pytest.mark.parametrize("changes", [{}, {"tie_word_embeddings": True}, {"bias": True}])
@pytest.mark.parametrize("chunk", [1, 7, 48, 1000])
def test_loss_and_gradients_are_the_stock_ones(chunk, changes, items):
    stock, chunked = pair(chunk, **changes)
    more = {} if items is None else {"num_items_in_batch": torch.tensor(items)}
    same_loss_and_gradients(stock, chunked, **batch(), **more)


def test_labels_that_were_shifted_before():
    stock, chunked = pair()
    inputs = batch()
    shifted = torch.nn.functional.pad(inputs["labels"], (0, 1), value=-100)[:, 1:].contiguous()
    inputs["labels"] = shifted
    expected, found = (model(**inputs, shift_labels=shifted).loss for model in (stock, chunked))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def test_bf16_is_as_near_as_bf16_is():
    stock, chunked = pair()
    stock, chunked = stock.bfloat16(), chunked.bfloat16()
    expected, found = (model(**batch()).loss for model in (stock, chunked))
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(float(expected), rel=1e-3)
    expected.backward()
    found.backward()
    for a, b in zip(stock.parameters(), chunked.parameters(), strict=True):
        assert b.grad.dtype == torch.bfloat16
        assert float((a.grad - b.grad).float().norm() / a.grad.float().norm()) < 0.02


def test_without_labels_nothing_changes():
    stock, chunked = pair()
    inputs = batch()
    del inputs["labels"]
    assert torch.equal(stock(**inputs).logits, chunked(**inputs).logits)
    assert torch.equal(
        stock.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False),
        chunked.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False),
    )


def test_without_gradients_the_loss_is_the_same():
    stock, chunked = pair()
    with torch.no_grad():
        assert float(chunked(**batch()).loss) == pytest.approx(
            float(stock(**batch()).loss), rel=1e-6
        )


def test_the_labels_are_forgotten_after_an_error():
    _, chunked = pair()
    broken = batch() | {"input_ids": torch.full((2, 24), 1000)}
    with pytest.raises(IndexError):
        chunked(**broken)
    inputs = batch()
    del inputs["labels"]
    assert chunked(**inputs).logits.shape == (2, 24, 97)


@pytest.mark.parametrize("whole", [None, ["lm_head"], ["embed_tokens"]])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_the_one_that_peft_trains(tied, whole):
    torch.manual_seed(0)
    plain = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=tied))
    lora = LoraConfig(
        r=4,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=whole,
        ensure_weight_tying=tied and whole == ["embed_tokens"],
    )
    models = []
    for model in (copy.deepcopy(plain), copy.deepcopy(plain)):
        torch.manual_seed(2)
        models.append(get_peft_model(model, lora))
        with torch.no_grad():  # what PEFT trains is no longer what it was copied from
            for name, parameter in models[-1].named_parameters():
                if "modules_to_save" in name:
                    parameter.mul_(2)
    stock, chunked = models
    chunked_loss.attach(chunked, 7)
    same_loss_and_gradients(stock, chunked, **batch())


def test_a_head_that_is_not_the_changed_one_is_an_error():
    _, chunked = pair()
    chunked.lm_head = torch.nn.Linear(32, 97, bias=False)
    with pytest.raises(RuntimeError, match="uses another head than the one it changed"):
        chunked(**batch())


def test_with_no_label_at_all_the_loss_is_zero():
    _, chunked = pair()
    loss = chunked(**batch(ignored=0) | {"labels": torch.full((2, 24), -100)}).loss
    assert float(loss) == 0
    loss.backward()
    # Counted over the accumulated batch, as the Trainer does.
    assert float(chunked_loss.normalise(torch.zeros(()), None, 97, torch.tensor(0))) == 0


@pytest.mark.parametrize("key", list(AFTER_THE_HEAD))
def test_a_model_that_changes_its_logits_is_refused(key):
    model = LlamaForCausalLM(LlamaConfig(**SIZES))
    setattr(model.config, key, 30.0)
    with pytest.raises(UserError, match=f"{key} changes its logits"):
        chunked_loss.attach(model)
