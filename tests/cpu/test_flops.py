"""FLOPs counted from integers, against those that torch counts while it computes."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.costs.flops import Passes, attention_flops, recurrence_flops, seen_pairs, step_flops, trained_matrix_flops
from lrsa_ds.costs.shape import model_shape
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.layers import LayeredConfig, in_model
from lrsa_ds.models.adapters import add_adapters, freeze
from lrsa_ds.models.patch import enable_checkpointing
from lrsa_ds.models.structure import layers_of
from lrsa_ds.models.tiling import tile_mlps
from lrsa_ds.objectives.objective import Batch
from lrsa_ds.objectives.target_loss import TargetLoss
from lrsa_ds.settings.model import LoraConfig
from tests.cpu.test_model import tiny

LRSA = LRSAConfig(sink_size=2, lag_size=8, retention=0.25, backend="chunked")
DENSE = LRSAConfig(sink_size=2, lag_size=8, retention=1.0, backend="chunked")
LENGTHS = (70, 9, 41)
FAMILIES = ("llama", "qwen2", "qwen3")  # of them qwen2 has tied embeddings, and qwen3 norms inside its attention
MIXED = LayeredConfig((DENSE, LRSA))
TRAINED = {
    "all": ([], 0),
    "lora": ([], 3),
    "frozen embeddings": (["embed_tokens", "lm_head"], 0),
    "first layer frozen": (["embed_tokens", r"layers\.0\."], 0),
    "output alone": (["embed_tokens", r"layers\.", r"norm"], 0),
}


aten = torch.ops.aten
MATRICES = ("aten.mm", "aten.addmm", "aten.bmm")
# torch has formulas for the fused attention of GPUs, and none for that of the CPU.
CPU_ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
        g, q, k, v
    ),
}


def counted(model, config, lengths, num_slots):
    """What torch counts in matrices, and in attention, forward and backward, by operator."""
    num_tokens = sum(lengths)
    labels = torch.full((1, num_tokens), IGNORE)
    labels[0, :num_slots] = 3
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    batch = Batch(torch.randint(0, 101, (1, num_tokens)), positions, labels, lengths, config, num_slots)
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        total, _ = TargetLoss(model, chunk_size=5).losses(batch)
        total.backward()
    counts = {str(operator): n for operator, n in counter.get_flop_counts()["Global"].items()}
    return sum(counts.pop(name, 0) for name in MATRICES), counts


def rectangles(lengths, config, num_layers):
    """For each layer, what torch takes for the pairs: every query of a chunk with every key that one of them sees."""
    chunks = [partition_table(lengths, config.at_layer(i)).chunks for i in range(num_layers)]
    return [sum((c.q_hi - c.q_lo) * (c.hist_hi - c.hist_lo + c.q_hi - c.win_lo) for c in of) for of in chunks]


def prepared(family, trained, checkpointing=False, config=LRSA, tiles=1, save_attention=False):
    patterns, rank = TRAINED[trained]
    model = tile_mlps(apply_lrsa(tiny(family), config).train(), tiles)
    if rank:
        add_adapters(model, LoraConfig(rank=rank))
    freeze(model, patterns)
    if checkpointing:
        enable_checkpointing(model, save_attention=save_attention)
    return model


CASES = [(family, "all", config) for family in FAMILIES for config in (DENSE, LRSA)]
CASES += [("llama", trained, MIXED) for trained in TRAINED] + [("qwen2", "lora", LRSA)]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family,trained,config", CASES)
def test_counts_are_those_of_torch(family, trained, checkpointing, config):
    model, passes = prepared(family, trained, checkpointing, config), Passes(checkpointing=checkpointing)
    matrices, attention = counted(model, config, LENGTHS, 12)
    shape = model_shape(model)
    assert trained_matrix_flops(shape, passes, sum(LENGTHS), 12) == matrices
    assert attention_flops(shape, passes, rectangles(LENGTHS, config, 2)) == sum(attention.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family,trained", [("llama", "all"), ("llama", "lora"), ("olmo2", "all")])
def test_tiles_recompute_the_mlp_and_their_layer_does_not(family, trained, checkpointing):
    """But for OLMo 2, where a norm behind the MLP has to see its output again."""
    model = prepared(family, trained, checkpointing, tiles=4)
    passes = Passes(checkpointing=checkpointing, tiled_mlp=True)
    matrices, _ = counted(model, LRSA, LENGTHS, 12)
    assert trained_matrix_flops(model_shape(model), passes, sum(LENGTHS), 12) == matrices
    if family == "llama" and trained == "all" and checkpointing:
        without = Passes(checkpointing=True)
        assert trained_matrix_flops(model_shape(model), without, sum(LENGTHS), 12) == matrices


@pytest.mark.parametrize("family,trained,config", CASES)
def test_saved_attention_runs_forward_once(family, trained, config):
    model = prepared(family, trained, True, config, save_attention=True)
    matrices, attention = counted(model, config, LENGTHS, 12)
    shape, passes = model_shape(model), Passes(save_attention=True)
    assert trained_matrix_flops(shape, passes, sum(LENGTHS), 12) == matrices
    assert attention_flops(shape, passes, rectangles(LENGTHS, config, 2)) == sum(attention.values())


def test_experts_count_as_often_as_they_are_chosen():
    settings = dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None, experts_implementation="eager")
    model = apply_lrsa(tiny("mixtral", **settings), LRSA).train()
    matrices, _ = counted(model, LRSA, LENGTHS, 12)
    passes = Passes(checkpointing=False)
    assert trained_matrix_flops(model_shape(model), passes, sum(LENGTHS), 12) == matrices


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3_next", "nemotron_h", "falcon_h1"])
def test_recurrences_count_beside_their_matrices(family, checkpointing):
    """A gated delta rule, layers of experts or an MLP alone, and a state space beside attention."""
    model = apply_lrsa(tiny_model(family, experts_implementation="eager"), LRSA).train()
    if checkpointing:
        enable_checkpointing(model)
    # Whole blocks of every recurrence, of which the first is cheaper: it follows no state.
    length, passes = 512, Passes(checkpointing=checkpointing)
    model.config.vocab_size = 101
    matrices, others = counted(model, in_model(LRSA, layers_of(model.config)), (length,), 12)
    own = sum(n for name, n in others.items() if "conv" not in name and "attention" not in name)
    shape = model_shape(model)
    expected = trained_matrix_flops(shape, passes, length, 12) + recurrence_flops(shape, passes, length)
    assert shape.recurrences and expected == pytest.approx(matrices + own, rel=0.05)


def test_pairs_are_those_of_the_mask():
    """Of the settings and of dense attention, by the definition: what a query at t sees."""
    sink, lag, kept = LRSA.sink_size, LRSA.lag_size, LRSA.num_kept
    total = 0
    for n in LENGTHS:
        for t in range(n):
            chunk = (t - sink) // lag if t >= sink else -1
            window = t + 1 if chunk < 2 else t + 1 - sink - (chunk - 1) * lag
            total += window + (sink + (chunk - 1) * kept if chunk >= 2 else 0)
    assert seen_pairs(LENGTHS, LRSA, 2) == [total, total]
    dense = sum(n * (n + 1) // 2 for n in LENGTHS)
    assert seen_pairs(LENGTHS, DENSE, 2) == [dense, dense]
    assert seen_pairs(LENGTHS, MIXED, 2) == [dense, total]


def test_a_teacher_adds_a_forward_pass():
    shape = model_shape(prepared("llama", "all"))
    alone = step_flops(shape, Passes(), LENGTHS, 12, LRSA)
    taught = step_flops(shape, Passes(without_gradient=(DENSE,)), LENGTHS, 12, LRSA)
    # Products of 2,304 + 1,152 + 1,152 + 2,304 in the attention of a layer, and 3 × 3,072 in its MLP; logits twice.
    forward = 2 * (sum(LENGTHS) * 2 * (6912 + 9216) + 2 * 12 * 48 * 101)
    pairs = sum(seen_pairs(LENGTHS, DENSE, 2))
    assert taught.executed.matrices - alone.executed.matrices == forward
    assert taught.executed.attention - alone.executed.attention == 4 * pairs * 4 * 12
    assert taught.dense.total - alone.dense.total == taught.executed.total - alone.executed.total


def test_dense_equivalent_is_dense_attention_over_the_same_documents():
    shape = model_shape(prepared("llama", "all"))
    assert (
        step_flops(shape, Passes(), LENGTHS, 12, LRSA).dense == step_flops(shape, Passes(), LENGTHS, 12, DENSE).executed
    )


def test_a_model_without_plain_matrices_has_no_shape():
    assert model_shape(tiny("gpt2", n_embd=48, n_layer=2, n_head=4)) is None
