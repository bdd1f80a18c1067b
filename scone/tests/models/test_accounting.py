"""The cost formulas against the operations that torch counts."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from scone.data.dataset import Collator
from scone.models.accounting import (
    RunCost,
    f_gram_forward_flops,
    input_embedding_flops,
    parameter_counts,
    trunk_forward_flops,
)
from scone.models.configuration import FGramModelConfig
from scone.models.input_embeddings import FGramModel
from scone.models.language_model import SconeForCausalLM
from scone.models.over_encoding import OverEncodingForCausalLM
from scone.models.scaled_trunk import ScaledTrunkForCausalLM
from scone.tests import tiny
from scone.tests.models.kinds import HASHED_ROWS, over_encoding
from scone.tests.models.padded_f_gram_model import padded_f_gram_model

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks


def counted(run) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("kind", list(tiny.TRUNKS))
def test_trunk_flops_equal_counted_flops(kind):
    trunk = tiny.trunk(kind, attn_implementation="eager")
    found = counted(lambda: trunk(torch.zeros(1, 16, dtype=torch.int64), use_cache=False))
    assert trunk_forward_flops(trunk.config, 16) * 16 == found
    if kind == "gpt2":  # two operations per weight and token, besides attention
        width, layers = tiny.WIDTH, 2
        matrices = 12 * width * width * layers + width * tiny.VOCAB_SIZE
        assert found == 16 * (2 * matrices + 2 * 2 * 16 * width * layers)


def test_f_gram_flops_equal_counted_flops_of_the_padded_model():
    """Padded, N f-grams of N tokens each are N² nodes; each attends to all N places there."""
    config, max_n, trunk_width = FGramModelConfig(**tiny.F_GRAM_SIZES), 4, tiny.WIDTH
    model = FGramModel(config, trunk_width, max_n)
    model.init_weights()
    inputs = (torch.zeros(max_n, max_n, trunk_width), torch.full((max_n,), max_n))
    with sdpa_kernel(SDPBackend.MATH):
        found = counted(lambda: padded_f_gram_model(model, *inputs))
    maps_out = 2 * config.hidden_size * trunk_width * (max_n * max_n - max_n)  # the padded one maps last places only
    deepest = [0.0] * (max_n - 1) + [max_n * max_n]
    assert f_gram_forward_flops(config, trunk_width, deepest) - maps_out == found


@pytest.mark.parametrize("whole_layer", [False, True])
def test_a_layer_costs_its_f_gram_model_and_its_gate(whole_layer):
    """The operations that torch counts in the f-gram model itself, and in the whole layer, attention besides, which is
    no matrix product there. The last layer counts only what positions read; own tokens are looked up, not mapped.
    """
    sizes = tiny.F_GRAM_SIZES | ({"own_tokens": True} if whole_layer else {})
    gate = {"combination": "gate"} if whole_layer else {}
    model = SconeForCausalLM.from_trunk(tiny.trunk(), tiny.vocabulary(), f_gram_model=sizes, learned_rows=20, **gate)
    layer, tokens = model.eval().f_gram_embedding, tiny.tokens(1, 60)
    trie = model.trie_of(model.match(tokens))
    nodes, f_grams = (
        [stop - start for start, stop in itertools.pairwise(trie[name])] for name in ("depth_offsets", "f_gram_offsets")
    )
    places = [sum((depth + 1) * count for depth, count in enumerate(counts)) for counts in (nodes, f_grams)]
    attention = 4 * sizes["hidden_size"] * ((sizes["num_hidden_layers"] - 1) * places[0] + places[1])
    if whole_layer:
        found = counted(lambda: layer(tokens, model.get_input_embeddings(), trie))
        assert input_embedding_flops(model.config, nodes, f_grams) - attention == found
    else:
        found = counted(lambda: layer.f_gram_model(torch.zeros(len(trie["tokens"]), tiny.WIDTH), trie))
        assert f_gram_forward_flops(FGramModelConfig(**sizes), tiny.WIDTH, nodes, f_grams) - attention == found


def test_parameters_are_counted_where_they_live():
    model = tiny.scone()
    counts = parameter_counts(model)
    assert counts.resident == sum(p.numel() for p in model.trunk.parameters())
    assert counts.resident + counts.training_only == sum(p.numel() for p in model.parameters())
    assert counts.table == model.vocabulary.num_f_grams * tiny.WIDTH
    plain = parameter_counts(model.trunk)
    assert (plain.resident, plain.training_only, plain.table) == (counts.resident, 0, 0)
    hashed = parameter_counts(over_encoding())
    assert (hashed.resident, hashed.training_only, hashed.table) == (counts.resident, 0, HASHED_ROWS * tiny.WIDTH)
    # a norm in front of the trunk serves too, whatever gives the vectors
    for normed in (
        SconeForCausalLM.from_trunk(tiny.trunk(), model.vocabulary, f_gram_model=None, learned_rows=9, input_norm=True),
        OverEncodingForCausalLM.from_trunk(tiny.trunk(), num_rows=50, separator_ids=[], input_norm=True),
        ScaledTrunkForCausalLM.from_trunk(tiny.trunk(), input_norm=True),
    ):
        assert parameter_counts(normed).resident == plain.resident + tiny.WIDTH


def adapted(trunk):
    """The trunk with LoRA in its matrices, as PEFT's model of it."""
    peft = pytest.importorskip("peft", reason="the extra tuning brings PEFT")
    return peft.get_peft_model(trunk, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))


def trained(kind):
    """A model, and which multiple of the forward operations of attention along the trie a step of it costs."""
    rows, parts = {"f_gram_model": False}, tiny.F_GRAM_SIZES
    model = {
        "plain": lambda: tiny.trunk("llama"),
        "last layer": lambda: tiny.trunk("llama"),
        "lora": lambda: adapted(tiny.trunk("llama")).get_base_model(),
        "lora with rows": lambda: tiny.scone("llama", **rows),
        "over-encoding": over_encoding,
        "frozen with hashed rows": over_encoding,
        "frozen with rows": lambda: tiny.scone("llama", **rows),
        "frozen with all, own tokens": lambda: tiny.scone(f_gram_model=parts | {"own_tokens": True}),
        "gate": lambda: tiny.scone(combination="gate"),
        "frozen with gate": lambda: tiny.scone(combination="gate"),
        "frozen with a norm": lambda: ScaledTrunkForCausalLM.from_trunk(tiny.trunk(), input_norm=True),
    }.get(kind, tiny.scone)()
    if kind.startswith("frozen"):
        model.trunk.requires_grad_(False)
    if kind == "lora with rows":
        adapted(model.trunk)
    if kind == "last layer":
        model.requires_grad_(False)
        model.model.layers[-1].requires_grad_(True)
    if kind in ("frozen f-gram model", "frozen but gain and rows"):
        model.trunk.requires_grad_(kind == "frozen f-gram model")
        model.f_gram_embedding.f_gram_model.requires_grad_(False)
    return model, {"frozen f-gram model": 2, "frozen but gain and rows": 1}.get(kind, 3)


@pytest.mark.parametrize(
    "kind",
    [
        *("plain", "last layer", "lora", "lora with rows", "all", "gate", "over-encoding", "frozen f-gram model"),
        *("frozen with rows", "frozen with hashed rows", "frozen with all", "frozen with all, own tokens"),
        *("frozen with gate", "frozen with a norm", "frozen but gain and rows"),
    ],
)
def test_training_costs_what_torch_counts_in_a_step(kind):
    """Forward and backward of all that trains, and of nothing else; attention along the trie is no product there."""
    model, multiple = trained(kind)
    (model.trunk if hasattr(model, "trunk") else model).set_attn_implementation("eager")
    tokens = tiny.tokens(2, 30)
    inputs, attention = {"input_ids": tokens}, 0.0
    if isinstance(model, SconeForCausalLM):
        trie = inputs["trie"] = model.trie_of(model.match(tokens))
        if model.f_gram_embedding.f_gram_model is not None:
            sizes = tiny.F_GRAM_SIZES
            for layers, name in ((sizes["num_hidden_layers"] - 1, "depth_offsets"), (1, "f_gram_offsets")):
                counts = [stop - start for start, stop in itertools.pairwise(trie[name])]
                places = sum((depth + 1) * count for depth, count in enumerate(counts))
                attention += 4 * sizes["hidden_size"] * layers * places
    cost = RunCost(model)
    cost.count(inputs)
    with FlopCounterMode(display=False) as counter:
        model(**inputs, labels=tokens, use_cache=False).loss.backward()
    figures = cost.to_dict()
    assert figures["training_flops_per_token"] * 60 - multiple * attention == pytest.approx(counter.get_total_flops())
    again = figures["training_flops_per_token"] + figures["f_gram_flops_per_token"]
    if not kind.startswith("lora"):  # adapters are merged at inference, and computed apart in training
        again += figures["inference_flops_per_token"]
        assert cost.to_dict(recomputed=True)["training_flops_per_token"] == pytest.approx(again)


def test_what_trains_is_known_after_adapters_were_merged():
    trunk = tiny.trunk("llama")
    model, cost = adapted(trunk), RunCost(trunk)
    cost.count({"input_ids": tiny.tokens(1, 30)})
    before = cost.to_dict()
    model.merge_and_unload()
    assert cost.to_dict() == before
    assert before["training_flops_per_token"] > 2 * before["inference_flops_per_token"]


MORE_TRUNKS = {
    "opt": {"ffn_dim": 32},  # makes its masks by itself
    "bloom": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("kind", list(MORE_TRUNKS))
def test_trunks_of_any_kind_are_counted(kind):
    """Of experts, those that a token goes to."""
    config = AutoConfig.for_model(kind, **({"vocab_size": tiny.VOCAB_SIZE} | tiny.SIZES | MORE_TRUNKS[kind]))
    trunk = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if kind == "mixtral":
        trunk.set_experts_implementation("batched_mm")
    assert trunk_forward_flops(config, 16) * 16 == counted(
        lambda: trunk(torch.zeros(1, 16, dtype=torch.int64), use_cache=False)
    )


def test_a_trunk_that_cannot_be_counted_has_no_figures(caplog):
    """Its run is through by then, and must not fail for it."""
    trunk = tiny.trunk("llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0})
    cost = RunCost(trunk)
    cost.count({"input_ids": tiny.tokens(1, 30)})
    figures = cost.to_dict()
    assert figures["inference_flops_per_token"] is figures["training_flops_per_token"] is None
    assert "cannot be counted" in caplog.text


def test_a_run_counts_what_its_batches_computed():
    """Where everything trains, that is three forward passes, four with recomputation."""
    model = tiny.scone()
    cost, plain = RunCost(model), RunCost(model.trunk)
    collate = Collator(model.vocabulary, model.config.learned_rows)
    batches = [collate([{"input_ids": row} for row in tiny.corpus(80, seed).reshape(2, 40)]) for seed in (1, 2)]
    for batch in batches:
        cost.count(batch)
    figures = cost.to_dict()
    assert figures["nodes_per_position"] * 160 == pytest.approx(sum(len(batch["trie"]["tokens"]) for batch in batches))
    matched = sum(int(batch["trie"]["position_index"].count_nonzero()) for batch in batches)
    assert figures["match_rate"] == matched / 160
    assert figures["inference_flops_per_token"] == trunk_forward_flops(model.trunk.config, 40)
    forward = figures["inference_flops_per_token"] + figures["f_gram_flops_per_token"]
    assert figures["training_flops_per_token"] == pytest.approx(3 * forward)
    assert cost.to_dict(recomputed=True)["training_flops_per_token"] == pytest.approx(4 * forward)
    plain.count({"input_ids": batches[0]["input_ids"]})
    assert plain.to_dict()["training_flops_per_token"] == 3 * figures["inference_flops_per_token"]
