"""What is counted from integers, against real tensors, real layouts, what real exchanges send, and measured steps."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.autograd.graph import saved_tensors_hooks

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.attention.buffered import buffered_layout
from lrsa_ds.attention.kinds.sliding_window import SlidingWindow
from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.buffers import keys_of
from lrsa_ds.costs.flops import step_flops
from lrsa_ds.costs.gpus import GPUS, gpu_of_setting
from lrsa_ds.costs.job import Levers, job_of
from lrsa_ds.costs.measured import comparisons
from lrsa_ds.costs.memory import checkpoint_bytes, gpu_memory, host_memory, logits_bytes, saved_bytes, static_bytes
from lrsa_ds.costs.plan import MOST_TOKENS, Estimate, Machine, alternatives, cheapest, longest
from lrsa_ds.costs.sizes import sizes_of
from lrsa_ds.costs.time import step_time
from lrsa_ds.costs.traffic import pass_bytes, zero_bytes
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.adapters import add_adapters, freeze
from lrsa_ds.models.loading import empty_model
from lrsa_ds.models.tiling import describe_levers
from lrsa_ds.parallel.sequence.all_to_all import SequenceGroup
from lrsa_ds.parallel.sequence.gather_kept import kept_layout
from lrsa_ds.parallel.sequence.halo import halo_attention
from lrsa_ds.parallel.sequence.shard import shard_layout
from lrsa_ds.parallel.sequence.traffic import Traffic
from lrsa_ds.registry import EXCHANGES
from lrsa_ds.settings.attention import AttentionConfig
from lrsa_ds.settings.memory import MemoryConfig
from lrsa_ds.settings.model import LoraConfig, ModelConfig
from lrsa_ds.settings.run import ParallelConfig, ZeroConfig
from lrsa_ds.train.forecast import choose_levers
from tests.cpu.test_config import composed
from tests.cpu.test_model import FAMILIES, tiny

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
H100 = Machine("h100", GPUS["h100"].gpu, 1, 8, 50.0, None)
LRSA = LRSAConfig(sink_size=0, lag_size=64, retention=0.25)
QWEN2_1B5 = dict(
    model_type="qwen2",
    vocab_size=151936,
    hidden_size=1536,
    intermediate_size=8960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)


def config_with(seq_len=4096, attention=None, random=None, **groups):
    model = ModelConfig(random=random or {"model_type": "llama"}, tokenizer="bytes")
    return TrainConfig(model=model, seq_len=seq_len, attention=attention or AttentionConfig(), **groups)


def job_with(num_gpus=1, itemsize=2, **settings):
    return job_of(config_with(**settings), num_gpus, itemsize)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_those_of_the_model(family):
    model = tiny(family)
    sizes = sizes_of(model)
    assert sizes.num_parameters == sizes.num_trained == sum(p.numel() for p in model.parameters())
    assert (sizes.mlp_width, sizes.num_norms, sizes.num_layers) == (64, 2, 2)
    assert (sizes.is_tied, sizes.has_head_norms) == (family == "qwen2", family == "qwen3")


def test_adapters_and_frozen_parameters_are_not_trained_in_full():
    model = tiny("llama")
    whole = sizes_of(model)
    add_adapters(model, LoraConfig(rank=3))
    with_adapters = sizes_of(model)
    # Two matrices of rank 3 beside each of the seven of a layer: their inputs and outputs together.
    wide = 3 * 2 * ((48 + 48) * 2 + (48 + 24) * 2 + (48 + 64) * 3)
    assert with_adapters.num_trained == wide
    assert with_adapters.num_parameters == whole.num_parameters + wide
    assert with_adapters.mlp_width == 64
    frozen = tiny("llama")
    freeze(frozen, ["embed_tokens"])
    assert sizes_of(frozen).num_trained == whole.num_trained - 101 * 48


def test_experts_have_the_width_that_a_token_takes():
    settings = dict(num_local_experts=4, num_experts_per_tok=2, sliding_window=None, experts_implementation="eager")
    assert sizes_of(tiny("mixtral", **settings)).mlp_width == 2 * 64 + 4 // 3  # the router is no part of them


def test_a_model_that_cannot_be_counted_is_refused():
    with pytest.raises(LRSAError, match=r"GPT2LMHeadModel are not built of torch\.nn\.Linear"):
        sizes_of(tiny("gpt2", n_embd=48, n_layer=2, n_head=4))


class _Attention(torch.autograd.Function):
    """Saves what the kernels save: queries, keys, values, output and log-sum-exp."""

    @staticmethod
    def forward(ctx, q, k, v):
        out = torch.zeros_like(q.transpose(1, 2)).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_zeros(q.shape[:3], dtype=torch.float32))
        return out


def saved_of_layer(model, num_tokens):
    """Bytes of the different tensors that the first layer saves, beside its input, parameters and positions."""
    layer, kept = model.model.layers[0], {}
    hidden = torch.randn(1, num_tokens, model.config.hidden_size, dtype=torch.bfloat16, requires_grad=True)
    positions = torch.arange(num_tokens)[None]
    rotary = model.model.rotary_emb(hidden, positions)
    known = {x.untyped_storage().data_ptr() for x in (hidden, *rotary, *layer.parameters())}

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        layer(
            hidden,
            position_embeddings=rotary,
            position_ids=positions,
            attention_mask=None,
            document_lengths=(num_tokens,),
            lrsa_config=LRSA,
            attend=lambda q, k, v, *_, **__: _Attention.apply(q, k, v),
        )
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_layer_saves_what_is_counted(family):
    num_tokens = 64
    model = apply_lrsa(tiny(family).bfloat16().train(), LRSA)
    sizes = sizes_of(model)
    job = job_with(seq_len=num_tokens, attention=AttentionConfig(kind="dense", retention=1.0))
    counted = saved_bytes(sizes, replace(job, turns=(LRSA,)), LRSA)
    # Of each token of a KV head the kernels also know the place of its copy; each norm saves one number for a token.
    places, small = 4 * num_tokens * sizes.num_kv_heads, 4 * num_tokens * sizes.num_norms
    heads = 4 * num_tokens * (sizes.num_heads + sizes.num_kv_heads) * sizes.has_head_norms
    assert saved_of_layer(model, num_tokens) == sum(counted.values()) - places + small + heads


def test_weights_gradients_and_states_are_those_of_real_tensors():
    model = tiny("llama").bfloat16()
    parameters = [p.detach().float().requires_grad_() for p in model.parameters()]
    optimizer = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    states = sum(x.nbytes for state in optimizer.state.values() for x in state.values() if x.dim())
    job = job_with(zero=ZeroConfig(reduce_bucket_size=1))
    static = static_bytes(sizes_of(model), job)
    assert static["weights"] == sum(p.nbytes for p in model.parameters()) == static["gradients"] - 2
    assert static["optimizer states"] == states + sum(p.nbytes for p in parameters)
    assert static["gathered weights"] == 0


def test_stages_and_offload_shard_and_move():
    sizes = sizes_of(tiny("llama"))
    count, eight = sizes.num_parameters, dict(num_gpus=8, zero=ZeroConfig(reduce_bucket_size=1))
    third = static_bytes(sizes, job_with(**eight))
    assert third["weights"] == 2 * (count // 8) and third["optimizer states"] == 12 * count // 8
    assert third["gathered weights"] == 2 * count
    second = static_bytes(sizes, job_with(num_gpus=8, zero=ZeroConfig(stage=2, reduce_bucket_size=1)))
    assert second["weights"] == 2 * count and second["gradients"] == third["gradients"]
    first = static_bytes(sizes, job_with(num_gpus=8, zero=ZeroConfig(stage=1, reduce_bucket_size=1)))
    assert first["gradients"] == 2 * (count + 1) and first["optimizer states"] == third["optimizer states"]
    moved = replace(job_with(**eight), levers=Levers(offload_optimizer=True, offload_checkpoints=True))
    assert static_bytes(sizes, moved)["optimizer states"] == 0
    host = host_memory(sizes, moved)
    assert host["optimizer states"] == 8 * 18 * (count // 8)
    assert host["activation checkpoints"] == 8 * checkpoint_bytes(sizes, replace(moved, levers=Levers()))
    assert not any(host_memory(sizes, job_with(**eight)).values())


def test_logits_are_held_for_a_chunk_of_targets():
    sizes = sizes_of(tiny("llama"))
    logits = torch.randn(2048, 101, requires_grad=True)
    held = logits.log_softmax(-1)
    assert logits_bytes(sizes, job_with()) == held.nbytes + 2 * logits.nbytes


@pytest.mark.parametrize("size", [1, 2, 3])
def test_keys_are_those_of_the_layouts(size):
    """Also where several documents are too short for a history, or where the last chunk is not whole."""
    cpu = torch.device("cpu")
    for exchange, tokens in itertools.product(("gather_kept", "head_groups"), (1536, 6144, 40 * 768)):
        attention = AttentionConfig(sink_size=16, lag_size=64, retention=0.25)
        parallel = ParallelConfig(sp_size=size, exchange=exchange)
        job = job_with(seq_len=tokens, attention=attention, parallel=parallel)
        config = job.turns[0]
        keys = keys_of(job, config)
        if size == 1:
            layout = buffered_layout(job.document_lengths, config, cpu, skips_queries_ahead=True)
            assert keys.copied == layout.copies.size
            continue
        layout_of = kept_layout if exchange == "gather_kept" else shard_layout
        layouts = [layout_of(job.document_lengths, config, size, rank, True, cpu) for rank in range(size)]
        assert keys.copied == max(x.buffer.copies.size for x in layouts)
        assert keys.kept == sum(layouts[0].buffer.num_sent)


class _Arrived:
    def wait(self):
        return


@pytest.mark.parametrize("exchange", ["gather_kept", "head_groups", "dense", "window"])
def test_bytes_are_those_that_an_exchange_sends(monkeypatch, exchange):
    """Forward, on average over the ranks, each of which is this process in turn, whose all-to-all goes nowhere."""
    monkeypatch.setattr(dist, "all_to_all_single", lambda *_, **__: _Arrived())
    size, tokens = 2, 2048
    sizes = sizes_of(tiny("llama"))
    name = exchange if exchange in EXCHANGES else "gather_kept"
    attention = AttentionConfig(lag_size=64)
    job = job_with(size, 4, seq_len=tokens, attention=attention, parallel=ParallelConfig(sp_size=size, exchange=name))
    others = {"dense": replace(LRSA, retention=1.0), "window": SlidingWindow(window=257)}
    config, sent = others.get(exchange, LRSA), {}
    for rank in range(size):
        group = SequenceGroup(None, size, rank, EXCHANGES[name], Traffic())
        q, k, v = (torch.zeros(1, heads, tokens // size, 12) for heads in (4, 2, 2))
        if exchange == "dense":
            group.traffic.count_ulysses(q, k, v, q, size, is_real=True)
        elif exchange == "window":
            halo_attention(q, k, v, config, (tokens,), group)
        else:
            EXCHANGES[name].attend(q, k, v, replace(config, backend="chunked"), (tokens,), group)
        for (cargo, _), count in group.traffic.sent.items():
            sent[cargo] = sent.get(cargo, 0) + count / size
    assert sent == pass_bytes(sizes, job, config)


def test_zero_sends_what_its_stages_gather_and_reduce():
    sizes = sizes_of(tiny("llama"))
    weights = 2 * sizes.num_parameters * 3 / 4
    for stage, expected in ((1, (1, 2)), (2, (1, 2)), (3, (2, 1))):
        sent = zero_bytes(sizes, job_with(4, zero=ZeroConfig(stage=stage)))
        assert (sent["weights"], sent["gradients"]) == tuple(n * weights for n in expected)
    assert zero_bytes(sizes, job_with(1)) == {}


@pytest.fixture(scope="module")
def qwen():
    config = config_with(seq_len=131072, random=QWEN2_1B5)
    return sizes_of(empty_model(config.model)), job_of(config, 1, 2, num_targets=1024), config


def test_estimates_are_near_what_was_measured(qwen):
    """Peak and time of whole steps of a 1.5B model on H100s, with and without Liger's kernels, on one GPU and two."""
    sizes, job, config = qwen
    config = replace(config, run_name="step_1b5")
    rows = comparisons(RESULTS / "2026-11-25-h100" / "steps.csv", config, job, sizes, H100)
    assert len(rows) == 8 and {row.job.seq_len for row in rows} == {131072, 229376, 442368, 491520}
    for row in rows:
        assert row.estimated_peak == pytest.approx(row.peak, rel=0.02), row.line()
        assert row.estimated_seconds == pytest.approx(row.seconds, rel=0.07), row.line()


@pytest.mark.parametrize(
    "shape, num_gpus, rank, more, num_rows, within",
    [
        ("1b5", 1, 0, [], 17, 0.04),
        ("8b", 1, 0, ["zero=stage3_offload"], 1, 0.04),
        ("8b", 1, 16, [], 5, 0.04),
        ("8b", 1, 16, ["model.quantize=nf4"], 1, 0.1),
        ("8b", 2, 0, ["optim=adamw_8bit"], 1, 0.04),
    ],
    ids=["1b5", "full", "lora", "qlora", "two"],
)
def test_estimates_of_levers_and_adapters_are_near_what_was_measured(shape, num_gpus, rank, more, num_rows, within):
    """Rows of a 1.5B and an 8B shape with Liger's kernels: levers, LoRA, QLoRA, 32,768 to 1,048,576 tokens."""
    config = composed(
        f"+recipe=step_{shape}", "model.liger_kernel=true", "parallel.sp_size=1", f"model.lora.rank={rank}", *more
    )
    model = empty_model(config.model)
    if rank:
        add_adapters(model, config.model.lora)
    job = job_of(config, 1, 2, num_targets=1024)
    rows = comparisons(RESULTS / "2026-11-26-h100" / "steps.csv", config, job, sizes_of(model), H100)
    rows = [row for row in rows if row.job.num_gpus == num_gpus]
    assert len(rows) == num_rows
    for row in rows:
        assert row.estimated_peak == pytest.approx(row.peak, rel=within), row.line()
        assert row.estimated_seconds == pytest.approx(row.seconds, rel=0.2), row.line()


def test_longest_is_the_last_that_fits(qwen):
    """229,376 tokens ran on one H100, and 253,952 did not."""
    sizes, job, _ = qwen
    most = longest(sizes, job, H100)
    assert 229376 <= most < 253952
    held = [gpu_memory(sizes, job.with_length(n)).peak / 1e9 for n in (most, most + 1024)]
    assert held[0] <= H100.usable_gb < held[1]
    assert longest(sizes, job, replace(H100, gpu=gpu_of_setting("l4"))) == 0
    assert longest(sizes, job, replace(H100, gpu=gpu_of_setting({"memory_gb": 1e4}))) == MOST_TOKENS
    moved = replace(job, levers=Levers(offload_checkpoints=True))
    limited = replace(H100, host_memory_gb=10.0)
    assert longest(sizes, moved, limited) == 10_000_000_000 // (2 * 1536 * 28) // 1024 * 1024


def test_the_cheapest_keeps_what_is_as_fast(qwen):
    sizes, job, _ = qwen
    found = [Estimate(sizes, other, H100) for other in alternatives(job, (1,), True, True)]
    assert [e.job.levers for e in found if not e.fits] == []
    saved = next(e for e in found if e.job.levers == Levers(save_attention=True))
    moved = next(e for e in found if e.job.levers == Levers(save_attention=True, offload_checkpoints=True))
    assert cheapest(found, found[0]) is cheapest(found, found[-1]) is saved
    assert cheapest(found, moved) is moved  # copies to host memory take no time here
    longer = job.with_length(300_000)
    found = [Estimate(sizes, other, H100) for other in alternatives(longer, (1,), True, True)]
    best = cheapest(found, found[0])
    assert not found[0].fits and best.fits and sum(vars(best.job.levers).values()) == 2
    assert best.job.levers.save_attention
    limited = [replace(e, machine=replace(H100, host_memory_gb=1.5 * moved.host_gb)) for e in found]
    assert not cheapest(limited, limited[0]).job.levers.offload_checkpoints  # tiles instead
    assert cheapest([], found[0]) is None


def test_what_saved_attention_holds_is_counted(qwen):
    """1.5B: an output of 3,072 bytes a token and layer, as wide as a checkpoint, and 48 of log-sum-exp."""
    sizes, job, _ = qwen
    row, attention = job.num_tokens * 3072, job.num_tokens * 3120
    on_gpu, on_host = (
        replace(job, levers=Levers(save_attention=True, offload_checkpoints=offload)) for offload in (False, True)
    )
    # Of the layer at hand it is counted with what the layer holds.
    assert checkpoint_bytes(sizes, on_gpu) == 28 * row + 27 * attention
    assert checkpoint_bytes(sizes, on_host) == 2 * row + attention
    assert host_memory(sizes, on_host)["activation checkpoints"] == 28 * (row + attention)
    merged = replace(on_host, num_gpus=2, sp_size=2, exchange="head_groups")
    assert checkpoint_bytes(sizes, merged) == row + attention  # of half the tokens, of history and window each
    flops = [step_flops(sizes.shape, j.passes, (131072,), 1024, j.turns[0]).executed for j in (job, on_gpu)]
    assert flops[1].attention == pytest.approx(flops[0].attention * 3.5 / 4.5)
    assert flops[1].matrices == flops[0].matrices


def test_levers_that_do_not_go_with_a_run_are_no_alternatives(qwen):
    _, job, _ = qwen
    plain = alternatives(job, (1, 2), can_tile=False, can_offload=False)
    assert [(j.sp_size, j.levers) for j in plain] == [
        (size, Levers(offload_checkpoints=moved, save_attention=saved))
        for size in (1, 2)
        for moved in (False, True)
        for saved in (False, True)
    ]
    second = alternatives(replace(job, stage=2, checkpointing=False), (1,), True, True)
    assert not any(j.levers.offload_param or j.levers.offload_checkpoints or j.levers.save_attention for j in second)


def test_no_time_without_the_figures_of_a_gpu(qwen):
    sizes, job, _ = qwen
    assert step_time(sizes, job, gpu_of_setting({"memory_gb": 48}), 50.0) is None
    slow = {"memory_gb": 48, "peak_tflops": 100, "memory_gb_s": 900}
    times = step_time(sizes, replace(job, levers=Levers(offload_checkpoints=True)), gpu_of_setting(slow), 50.0)
    assert times.seconds == sum(times.parts.values()) > 40


def test_levers_are_chosen_for_a_gpu(qwen):
    """The cheapest that fit, those that are typed among them; or what to change."""
    config = replace(qwen[2], memory=MemoryConfig(auto=True))
    chosen = choose_levers(config, H100, 2)
    assert chosen == replace(config, memory=replace(config.memory, save_attention=True))
    assert describe_levers(chosen) == "memory=auto: outputs of attention saved"
    small = replace(H100, gpu=replace(H100.gpu, memory_gb=50.0))
    chosen = choose_levers(config, small, 2)
    assert (chosen.memory.tiled_mlp, chosen.memory.offload_checkpoints) == (False, True)
    assert chosen.zero == config.zero and "checkpointed activations" in describe_levers(chosen)
    typed = replace(config, memory=MemoryConfig(auto=True, tiled_mlp=True))
    chosen = choose_levers(typed, small, 2)
    assert chosen.memory.tiled_mlp and "memory=auto" in describe_levers(chosen)
    tiny_gpu = replace(H100, gpu=replace(H100.gpu, memory_gb=24.0))
    chosen = choose_levers(config, tiny_gpu, 2)
    assert chosen.zero.offload_optimizer == "cpu" and "zero.offload_optimizer=cpu" in describe_levers(chosen)
    assert "no lever is needed" in describe_levers(config)


def test_levers_that_cannot_be_chosen_say_what_to_change(qwen):
    config = replace(qwen[2], memory=MemoryConfig(auto=True), seq_len=1_048_576)
    with pytest.raises(LRSAError, match=r"memory\.auto=true: seq_len=1048576 does not fit on 1 × h100 .* give at most"):
        choose_levers(config, replace(H100, host_memory_gb=64.0), 2)
    four = replace(H100, num_gpus=4, gpu=replace(H100.gpu, memory_gb=40.0))
    with pytest.raises(LRSAError, match=r"fits on 4 × h100 with parallel\.sp_size=1: set parallel\.sp_size=[24]"):
        choose_levers(config, four, 2)
