"""The trainer under DeepSpeed on several ranks gives the loss and the gradients of plain torch on one."""

import json
from functools import cache

import pytest

from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.dist
EXCHANGES = ["gather_kept", "head_groups"]
SAVED = ["--save-attention", "--checkpointing"]
LENGTHS = [160, 70, 50, 31, 110, 45, 155]  # of the worker's documents

SHARED = [
    (2, ["--sp-size", 2]),
    (2, ["--sp-size", 2, "--kv-heads", 1, "--checkpointing"]),
    (2, ["--sp-size", 2, "--stage", 2, "--micro-batch", 2]),
    (2, ["--sp-size", 2, "--stage", 1, "--kv-heads", 4]),
    (4, ["--sp-size", 2, "--tied", "--checkpointing"]),
    (4, ["--sp-size", 4, "--kv-heads", 2, "--micro-batch", 2, "--checkpointing"]),
    (3, ["--sp-size", 3, "--heads", 6, "--kv-heads", 2, "--micro-batch", 4, "--family", "qwen3"]),
]
# Adapters on experts that lie in one tensor.
IN_ONE = ["--target-parameters", "experts.gate_up_proj,experts.down_proj"]
# Settings that steps take in turn: first a layer with nothing but sink and window, then dense attention.
TURNS = '[{"1": {"retention": 0.0, "lag_size": 12}, "rest": 1.0}, {"0-": 1.0}]'
PARITY = [
    (1, ["--micro-batch", 2]),
    (2, ["--micro-batch", 1, "--tied", "--checkpointing"]),
    (2, ["--micro-batch", 2, "--family", "llama", "--checkpointing"]),
    (4, ["--kv-heads", 1, "--checkpointing"]),
    (2, ["--stage", 2, "--tied"]),
    (2, ["--stage", 1, "--micro-batch", 2]),
    # Sequence parallelism; four sequences, so the fewer replicas, the more micro-batches in a step.
    *((size, [*options, "--exchange", exchange]) for size, options in SHARED for exchange in EXCHANGES),
    # Rules that go by the layer, and that keep nothing; `attention_worker.py` has every rule.
    *(
        (2, ["--sp-size", 2, "--selection", rule, "--exchange", exchange, "--checkpointing"])
        for rule in ("random", "window")
        for exchange in EXCHANGES
    ),
    # Layers that differ: one is dense and goes through Ulysses; then both send what they keep, of unequal size.
    *(
        (2, ["--sp-size", 2, "--exchange", exchange, "--layers", layers, "--checkpointing"])
        for exchange in EXCHANGES
        for layers in ('{"0": 1.0, "1": 0.25}', '{"0": 0.5, "1": null}')
    ),
    # Mixtures of experts: under ZeRO-3 every rank gathers the experts, whether its tokens go to them or not.
    (2, ["--family", "qwen3_moe", "--by-module", "--sp-size", 2]),
    (2, ["--family", "qwen3_moe", "--by-module", "--list-experts", "--aux", 0.5]),
    (2, ["--family", "qwen3_moe", "--aux", 0.5, "--sp-size", 2, "--micro-batch", 2, "--checkpointing"]),
    (2, ["--family", "mixtral", "--aux", 0.5, "--checkpointing", "--stage", 2]),
    (2, ["--family", "mixtral", "--aux", 0.5, "--lora", *IN_ONE, "--sp-size", 2, "--exchange", "head_groups"]),
    (2, ["--family", "gpt_oss", "--aux", 0.5, "--sp-size", 2, "--checkpointing"]),
    (2, ["--family", "glm4_moe", "--sp-size", 2, "--checkpointing"]),  # without such a loss
    (2, ["--family", "deepseek_v3", "--kv-heads", 4, "--sp-size", 2, "--checkpointing"]),
    (2, ["--layers", TURNS, "--checkpointing"]),
    *((2, ["--sp-size", 2, "--exchange", exchange, "--layers", TURNS, "--checkpointing"]) for exchange in EXCHANGES),
    # Frozen embeddings ask for no gradient, and DeepSpeed must still hold a gathered layer until its backward pass.
    (2, ["--lora"]),
    (2, ["--freeze", "embed", "layers.0"]),
    # A base in 4 bits, against the same base with the values that these leave.
    (2, ["--lora", "--quantize", "nf4", "--checkpointing"]),
    (
        2,
        [
            "--lora",
            "--quantize",
            "nf4",
            "--stage",
            2,
            "--sp-size",
            2,
            "--tile-size",
            30,
            "--offload",
            "--checkpointing",
        ],
    ),
    (2, ["--lora", "--quantize", "fp4", "--double-quant", "--stage", 1, "--sp-size", 2, "--exchange", "head_groups"]),
    # Layers with a sliding window receive halos, if need be from several ranks.
    (2, ["--family", "olmo3", "--micro-batch", 2]),
    *(
        (size, ["--family", "olmo3", "--sp-size", size, "--exchange", exchange, "--micro-batch", 2, "--checkpointing"])
        for exchange in EXCHANGES
        for size in (2, 4)
    ),
    # Only where heads are dealt out do the ranks have to divide them.
    (2, ["--sp-size", 2, "--heads", 3, "--kv-heads", 1, "--checkpointing"]),
    # Dense attention under sequence parallelism is DeepSpeed's Ulysses.
    (2, ["--sp-size", 2, "--retention", 1.0]),
    (2, ["--sp-size", 2, "--retention", 1.0, "--kv-heads", 1]),
    (4, ["--sp-size", 4, "--retention", 1.0, "--micro-batch", 2, *SAVED]),
]
# Tiles of the MLPs, checkpoints in host memory, attention that is saved: several tiles a rank, the last one shorter.
LEVERS = [
    (2, ["--tile-size", 48, "--offload", "--tied", *SAVED]),
    (2, ["--tile-size", 48, "--offload", "--checkpointing", "--by-module", "--family", "llama"]),
    (2, ["--tile-size", 30, "--offload", "--sp-size", 2, *SAVED]),
    (2, ["--tile-size", 30, "--sp-size", 2, "--lora", "--exchange", "head_groups", *SAVED]),
    (2, ["--family", "olmo3", "--micro-batch", 2, "--sp-size", 2, "--tile-size", 30, *SAVED]),
    (2, ["--tile-size", 100, "--micro-batch", 2, "--stage", 2, "--tied"]),
    (2, ["--tile-size", 48, "--stage", 1, "--offload", "--checkpointing", "--lora"]),
    (2, ["--tile-size", 48, "--offload", "--checkpointing", "--bad-loss"]),
]
PARITY += [case for case in LEVERS if "--bad-loss" not in case[1]]
DISTILL = [
    (1, ["--teacher", "self", "--micro-batch", 2]),
    (2, ["--teacher", "self", "--tied", "--checkpointing"]),
    (2, ["--teacher", "start", "--micro-batch", 2, "--checkpointing"]),
    (2, ["--teacher", "start", "--stage", 2, "--tied"]),
    (2, ["--teacher", "self", "--stage", 1, "--family", "llama"]),
    (2, ["--teacher", "self", "--sp-size", 2, "--checkpointing", "--exchange", "gather_kept"]),
    (2, ["--teacher", "self", "--sp-size", 2, "--checkpointing", "--exchange", "head_groups"]),
    (2, ["--teacher", "start", "--sp-size", 2, "--stage", 2]),
    # A dense student too, which then differs from its teacher from the second step on.
    (2, ["--teacher", "start", "--retention", 1.0, "--sp-size", 2]),
    (4, ["--teacher", "start", "--sp-size", 2, "--kv-heads", 1, "--checkpointing"]),
    (4, ["--teacher", "self", "--sp-size", 4, "--micro-batch", 2, "--tied"]),
]
WRONG_SCALE = [(2, ["--break-scale"]), (2, ["--sp-size", 2, "--break-scale"])]
NO_HALO = [(2, ["--sp-size", 2, "--break-halo", "--exchange", exchange]) for exchange in EXCHANGES]
BAD_LOSS = [
    *(case for case in LEVERS if "--bad-loss" in case[1]),
    (2, ["--bad-loss", "--checkpointing"]),
    (4, ["--bad-loss", "--checkpointing", "--sp-size", 2]),
    (2, ["--bad-loss", "--stage", 2]),
]


def output_of(worker, world_size, *arguments):
    # The launcher and DeepSpeed may print to stdout too; the worker's object is the last line.
    output = run_ranks(ROOT / "tests/dist" / worker, world_size, *arguments)[0]
    return json.loads(output.strip().splitlines()[-1])


@cache
def results_of(world_size):
    """All cases of so many ranks by their options, from one start of the processes."""
    cases = [options for size, options in (*PARITY, *DISTILL, *WRONG_SCALE, *NO_HALO, *BAD_LOSS) if size == world_size]
    results = output_of("parity_worker.py", world_size, json.dumps(cases))
    return {str(options): result for options, result in zip(cases, results, strict=True)}


def measured(world_size, options):
    return results_of(world_size)[str(options)]


@pytest.mark.parametrize("world_size,options", [*PARITY, *DISTILL])
def test_loss_and_gradients(world_size, options):
    result = measured(world_size, options)
    assert result["loss_error"] < 1e-6
    assert result["worst_gradient"][0] < 1e-5, result
    assert result["norm_error"] < 1e-5
    assert result["second_loss_error"] < 1e-5
    assert result["aux_loss_error"] < 1e-5
    if "--save-attention" in options:  # once for each layer, part and micro-batch, as its backward pass
        assert result["kernel_ran"][0] == result["kernel_ran"][1] >= 2 * 2
    # However many ranks share a sequence, each of its tokens counts once.
    assert result["num_tokens"] == sum(LENGTHS)
    assert result["num_target_tokens"] == 100


@pytest.mark.parametrize("world_size,options", DISTILL)
def test_what_distillation_logs_is_the_same_on_any_number_of_ranks(world_size, options):
    """At the first step both teachers are the same model, and the parts make up the loss."""
    logged = measured(world_size, options)["logged"]
    assert logged["divergence"] > 0.02 or 1.0 in options
    if not {"--family", "--tied", "--kv-heads", 1.0} & set(options):
        assert logged == pytest.approx(measured(1, DISTILL[0][1])["logged"], rel=1e-5)


@pytest.mark.parametrize("world_size,options", WRONG_SCALE)
def test_a_wrong_scale_is_seen(world_size, options):
    result = measured(world_size, options)
    assert result["worst_gradient"][0] > 0.5 and result["norm_error"] > 0.5


@pytest.mark.parametrize("world_size,options", BAD_LOSS)
def test_a_row_with_a_loss_that_is_not_finite_is_left_out(world_size, options):
    """Loss and gradients are those of the other rows, whichever rank had it."""
    result = measured(world_size, options)
    assert result["num_skipped_rows"] == [1, 1]
    assert result["loss_error"] < 1e-6 and result["second_loss_error"] < 1e-5
    assert result["worst_gradient"][0] < 1e-5


@pytest.mark.parametrize("world_size,options", NO_HALO)
def test_a_missing_halo_is_seen(world_size, options):
    result = measured(world_size, options)
    assert result["loss_error"] > 1e-5 and result["worst_gradient"][0] > 1e-2


@cache
def attention_errors(size):
    return output_of("attention_worker.py", size, size)


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sequence_parallel_attention_on_random_layouts(size, exchange):
    """Odd lengths, documents cut anywhere, KV heads fewer than ranks: the output and every gradient."""
    cases = attention_errors(size)["plain"][exchange]
    assert len(cases) == 20
    assert max(error for _, error in cases) < 1e-6, max(cases, key=lambda case: case[1])


def test_the_exchange_that_the_docs_have_as_an_example():
    assert max(error for size in (2, 3) for _, error in attention_errors(size)["plain"]["all_kv"]) < 1e-6


@pytest.mark.parametrize("exchange", EXCHANGES)
@pytest.mark.parametrize("size", [2, 3, 4])
def test_sequence_parallel_attention_as_gpu_kernels_see_it(size, exchange):
    """The same with the kept buffer in whole blocks, and several copies of it."""
    cases = attention_errors(size)["by blocks"][exchange]
    assert len(cases) == 8
    assert max(error for _, error in cases) < 1e-5, max(cases, key=lambda case: case[1])


@pytest.mark.parametrize("exchange", EXCHANGES)
def test_what_travels(exchange):
    """Bytes of a step against those worked out by hand, and the kept KV against r of what dense Ulysses sends."""
    size, heads, kv_heads, dim, tokens, micro_batches = 2, 4, 2, 8, 160, 4
    traffic = measured(2, ["--sp-size", 2, "--exchange", exchange])["traffic"]
    per_head = 4 * dim * micro_batches  # bytes of one token, in fp32
    others = (size - 1) / size
    for direction in ("forward", "backward"):
        sent = {name.removeprefix(f"sent_bytes_{direction}_"): value for name, value in traffic.items()}
        all_queries = heads * tokens / size * others * per_head
        deals_out_heads = exchange == "head_groups"
        assert sent["queries"] == sent["outputs"] == sent["lse"] * dim == (all_queries if deals_out_heads else 0)
        # Of every sequence the last S + 2L = 36 tokens of the first rank's keys and values, halved by the mean of
        # ranks; with two stretches on each rank also those of the second rank's second one.
        assert sent["halo"] == 2 * kv_heads * 36 * per_head / size * (2 if exchange == "gather_kept" else 1)
        ulysses_kv = traffic[f"ulysses_bytes_{direction}_kv"]
        assert ulysses_kv == 2 * kv_heads * tokens / size * others * per_head
        # To every rank go all heads, or those of the rank.
        assert 0 < sent["kept"] <= 0.25 * 1.1 * ulysses_kv * (size if exchange == "gather_kept" else 1)
        assert traffic[f"ulysses_bytes_{direction}"] == ulysses_kv + 2 * all_queries
        assert sent["kv"] == 0


def test_what_dense_attention_sends_is_what_is_said_of_it():
    traffic = measured(2, ["--sp-size", 2, "--retention", 1.0])["traffic"]
    for direction in ("forward", "backward"):
        assert traffic[f"sent_bytes_{direction}"] == traffic[f"ulysses_bytes_{direction}"] > 0
        assert traffic[f"sent_bytes_{direction}_kv"] == traffic[f"ulysses_bytes_{direction}_kv"] > 0
