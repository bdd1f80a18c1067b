"""Laws of models in the hands of TRL and PEFT: what they train is what runs, with f-grams all the way."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from scone.models.language_model import SconeForCausalLM
from scone.tests import tiny
from scone.training.optimizer import RowOptimizer, learned_rows

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")  # PEFT's own
peft: Any = None
trl: Any = None


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Imported where these tests run, since it takes seconds, and every process of a parallel run collects them."""
    global peft, trl
    peft = pytest.importorskip("peft", reason="the extra tuning brings PEFT")
    trl = pytest.importorskip("trl", reason="the extra tuning brings TRL")


def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 … w23 by their number; w0 pads. Texts end with w1, which is in many f-grams: none hides behind it."""
    words = [f"w{i}" for i in range(tiny.VOCAB_SIZE)]
    return tiny.word_tokenizer(words, "w0", eos_token="w1", pad_token="w0", unk_token="w0")


def texts(count: int = 8) -> Any:
    """Of different lengths, so that batches have padding."""
    import datasets

    rows = [tiny.corpus(6 + 3 * i, i) for i in range(count)]
    return datasets.Dataset.from_dict({"text": [" ".join(f"w{token}" for token in row) for row in rows]})


def sft(model: Any, folder: Path, peft_config: Any = None, **options: Any) -> Any:
    options = {"max_steps": 2, "per_device_train_batch_size": 4, "max_length": 32, "learning_rate": 1e-2} | options
    arguments = trl.SFTConfig(
        str(folder), report_to="none", use_cpu=True, bf16=False, save_strategy="no", disable_tqdm=True, **options
    )
    data = {"train_dataset": texts(), "processing_class": tokenizer()}
    return trl.SFTTrainer(model=model, args=arguments, peft_config=peft_config, **data)


def own_loss(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The mean loss of the predicted tokens, from whole logits, each sequence of the batch by itself."""
    total, count = torch.zeros(()), 0
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        ids, labels = ids[mask.bool()][None], labels[mask.bool()]
        logits = model(input_ids=ids).logits[0, :-1].float()
        kept = labels[1:] != -100
        total = total + torch.nn.functional.cross_entropy(logits[kept], labels[1:][kept], reduction="sum")
        count += int(kept.sum())
    return total / count


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_sft_trainer_computes_and_follows_the_models_own_loss(kind, tmp_path):
    """TRL applies the head to the body itself; the loss and every gradient are those of whole logits."""
    model = tiny.scone(kind)
    plain = copy.deepcopy(model).eval()
    trainer = sft(model, tmp_path)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (plain.match(batch["input_ids"]) >= tiny.VOCAB_SIZE).any()
    model.eval()
    loss = trainer.compute_loss(model, dict(batch))
    expected = own_loss(plain, batch)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, own_loss(plain.trunk, batch), atol=1e-3), "without f-grams it is another"
    loss.backward()
    expected.backward()
    for name, parameter in plain.named_parameters():
        found = model.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("options", [{"padding_free": True, "max_length": None}, {"packing": True, "max_length": 64}])
def test_sft_trainer_without_padding_computes_the_loss_of_examples_apart(options, tmp_path):
    """Several texts in one sequence, told apart by their position ids: no f-gram and no attention crosses."""
    model = tiny.scone("llama")
    plain = copy.deepcopy(model).eval()
    trainer = sft(model, tmp_path, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    ids, starts = batch["input_ids"][0], (batch["position_ids"][0] == 0).nonzero()[:, 0].tolist()
    assert len(starts) > 2
    assert "attention_mask" not in batch
    examples = [ids[start:stop] for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True)]
    loss = trainer.compute_loss(model.eval(), dict(batch))
    whole = [{"input_ids": part, "attention_mask": torch.ones_like(part), "labels": part} for part in examples]
    lengths = torch.tensor([len(part) - 1.0 for part in examples])
    apart = torch.stack([own_loss(plain, {name: value[None] for name, value in each.items()}) for each in whole])
    torch.testing.assert_close(loss, (apart * lengths).sum() / lengths.sum(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "gradient_checkpointing": True}])
def test_sft_trainer_trains_rows_and_gain_and_saves_what_loads(options, tmp_path):
    model = tiny.scone("llama", trained=False)
    sft(model, tmp_path, **options).train()
    embedding = model.f_gram_embedding
    assert embedding.rows.weight.abs().sum(1).gt(0).sum() > 10
    assert embedding.gain.ne(0).all()
    model.save_pretrained(tmp_path / "model")
    again = SconeForCausalLM.from_pretrained(tmp_path / "model").eval()
    ids = tiny.tokens(1, 20, 3)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model.eval()(ids).logits)


TARGETS = [["q_proj", "v_proj"], "all-linear", ["embed_tokens", "attention_in", "map_out"]]


def lora(model: Any, targets: Any, **options: Any) -> Any:
    torch.manual_seed(3)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=targets, **options)
    return peft.get_peft_model(model, config)


def moved(model: Any) -> Any:
    """As after training: adapters start at zero."""
    torch.manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def check_saved_and_merged(tuned: Any, fresh: Any, ids: torch.Tensor, folder: Path) -> tuple[Any, Any]:
    """The adapter loads onto the ``fresh`` model, and merged and saved again it is the same; returns both models."""
    with torch.no_grad():
        expected = tuned(input_ids=ids).logits
        tuned.save_pretrained(folder / "adapter")
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(fresh), folder / "adapter").eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected)
        merged = tuned.merge_and_unload()
        merged.save_pretrained(folder / "merged")
        again = SconeForCausalLM.from_pretrained(folder / "merged").eval()
        for each in (merged, again):
            torch.testing.assert_close(each(ids).logits, expected, atol=1e-4, rtol=1e-4)
    return loaded, again


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_an_adapter_saved_loaded_and_merged_gives_the_same_logits(targets, tmp_path):
    base, ids = tiny.scone("llama"), tiny.tokens(2, 20, 3)
    fresh = copy.deepcopy(base)
    tuned = moved(lora(base, targets))
    with torch.no_grad():
        assert not torch.allclose(tuned(input_ids=ids).logits, fresh(ids).logits, atol=1e-2)
    loaded, again = check_saved_and_merged(tuned, fresh, ids, tmp_path)
    greedy = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(again.generate(ids, **greedy), loaded.generate(input_ids=ids, **greedy))


def test_sft_trainer_with_an_adapter_trains_the_adapter_alone(tmp_path):
    base = tiny.scone("llama")
    before = copy.deepcopy(base.state_dict())
    trainer = sft(base, tmp_path, peft_config=peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules="all-linear"))
    batch = next(iter(trainer.get_train_dataloader()))
    expected = own_loss(tiny.scone("llama"), batch)
    torch.testing.assert_close(trainer.compute_loss(trainer.model.eval(), dict(batch)), expected, atol=1e-5, rtol=1e-5)
    trainer.train()
    assert not learned_rows(trainer.model).pending
    adapters = [weight for name, weight in trainer.model.named_parameters() if "lora_B" in name]
    assert all(weight.abs().sum() > 0 for weight in adapters)
    assert any("f_gram_model" in name for name, _ in trainer.model.named_parameters() if "lora_B" in name)
    merged = trainer.model.eval().unload()
    assert all(torch.equal(weight, before[name]) for name, weight in merged.state_dict().items())


@pytest.mark.parametrize("with_row_optimizer", [False, True])
def test_rows_learn_beside_an_adapter(with_row_optimizer, tmp_path):
    """``modules_to_save=["rows"]``: PEFT trains a copy of them, saves it with the adapter and merges it back."""
    base = tiny.scone("llama")
    fresh, before = copy.deepcopy(base), learned_rows(base).weight.detach().clone()
    tuned = lora(base, ["q_proj"], modules_to_save=["rows"]).train()
    optimizers = [torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-2)]
    if with_row_optimizer:
        optimizers.append(RowOptimizer(tuned, lr=1e-2))
    for step in range(2):
        ids = tiny.tokens(2, 20, step)
        tuned(input_ids=ids, labels=ids).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    rows = learned_rows(tuned)
    assert (rows.weight != before).any(1).sum() > 10
    assert not rows.pending
    trained = rows.weight.detach().clone()
    _, again = check_saved_and_merged(tuned.eval(), fresh, tiny.tokens(1, 20, 9), tmp_path)
    assert torch.equal(learned_rows(again).weight, trained)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_added_tokens_learn_beside_an_adapter(kind, tmp_path):
    """Tied (qwen2) or not: PEFT trains the new tokens' vectors alone, in the head too where it is the embeddings'."""
    base = tiny.scone(kind)
    base.resize_token_embeddings(tiny.VOCAB_SIZE + 2, mean_resizing=False)
    fresh, ids = copy.deepcopy(base), tiny.tokens(2, 20, 3)
    ids[:, ::5] = tiny.VOCAB_SIZE
    assert base.config.tie_word_embeddings == (kind == "qwen2")
    tuned = lora(base, ["q_proj"], trainable_token_indices=[tiny.VOCAB_SIZE, tiny.VOCAB_SIZE + 1]).train()
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        tuned(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    _, again = check_saved_and_merged(tuned.eval(), fresh, ids, tmp_path)
    old = tiny.trunk(kind).get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight[: tiny.VOCAB_SIZE], old)
