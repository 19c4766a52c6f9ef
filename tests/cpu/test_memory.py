"""The levers of `memory`: they change no gradient, keep what they promise to keep, and refuse what they cannot do."""

import gc
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.attention.saved_outputs import CheckpointedLayer
from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.adapters import add_adapters
from lrsa_ds.models.offload import HostStore, check_host_memory, offload_checkpoints
from lrsa_ds.models.patch import enable_checkpointing
from lrsa_ds.models.tiling import check_tiling, gated_mlps, num_tiles, tile_mlps
from lrsa_ds.registry import KERNELS
from lrsa_ds.settings.memory import MemoryConfig
from lrsa_ds.settings.model import LoraConfig, ModelConfig
from lrsa_ds.settings.run import OptimConfig, ParallelConfig
from tests import fused
from tests.cpu.test_model import FAMILIES, SIZES, tiny
from tests.helpers import assert_close

LRSA = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
LEVERS = {
    "tiles": (7, False, False),
    "offload": (1, True, False),
    "attention": (1, False, True),
    "all": (7, True, True),
}


def config_with(seq_len=4096, memory=None, **settings):
    model = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")
    optim, parallel = OptimConfig(micro_batch=settings.pop("micro_batch", 1)), ParallelConfig(**settings)
    return TrainConfig(model=model, seq_len=seq_len, memory=memory or MemoryConfig(), optim=optim, parallel=parallel)


def gradients(model, ids):
    """Of two backward passes after each other, as under gradient accumulation."""
    for part in ids.split(1):
        model(part, use_cache=False).logits.float().log_softmax(-1)[..., 3].sum().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("lever", LEVERS)
@pytest.mark.parametrize("family", [*FAMILIES, "lora"])
def test_gradients_are_those_without_levers(family, lever):
    ids = torch.randint(0, 101, (2, 70))
    models = []
    for count, offload, save_attention in ((1, False, False), LEVERS[lever]):
        torch.manual_seed(0)
        model = apply_lrsa(tiny("llama" if family == "lora" else family), LRSA).train()
        tile_mlps(model, count)
        if family == "lora":
            add_adapters(model, LoraConfig(rank=2))
        enable_checkpointing(model, offload, save_attention)
        models.append(model)
    expected, found = (gradients(model, ids) for model in models)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        assert_close(found[name], gradient, 1e-5, name)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("retention", [0.25, 1.0])
def test_a_kernel_runs_forward_once_if_its_outputs_are_saved(monkeypatch, retention, offload):
    """Gradients are the same to the bit, nothing is held when the backward pass is over, and a pass may be repeated."""
    torch.manual_seed(0)
    monkeypatch.setattr(KERNELS, "_entries", KERNELS._entries)  # the table without the kernel is back after the test
    config = replace(LRSA, backend=fused.register(), retention=retention)
    model = apply_lrsa(tiny("qwen3", num_hidden_layers=3), config).train()
    ids, found = torch.randint(0, 101, (2, 70)), []
    for save_attention in (False, True):
        enable_checkpointing(model, offload, save_attention)
        model.zero_grad()
        before = fused.counts()
        loss = sum(model(row, use_cache=False).logits.float().square().mean() for row in ids.split(1))
        loss.backward(retain_graph=True)
        loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        ran = [after - number for after, number in zip(fused.counts(), before, strict=True)]
        assert ran == [6 if save_attention else 18, 12]
    gc.collect()
    assert not [x for x in gc.get_objects() if type(x) is CheckpointedLayer]
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_tiles_hold_no_more_than_one_tile_of_the_width():
    """What the MLP saves for its backward pass: of the hidden size only, and the output is the same to rounding."""
    model = tiny("llama", intermediate_size=200)
    mlp = gated_mlps(model)[0]
    x = torch.randn(1, 50, 48, requires_grad=True)
    expected = mlp(x)
    tile_mlps(model, 7)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        output = mlp(x)
    assert_close(output, expected, 1e-6)
    assert max(shape.numel() for shape in saved) <= 8 * 48
    assert tile_mlps(model, 1) is model


def test_fewer_tokens_than_tiles():
    """A row may be shorter than the one that the tiles were counted for, and every rank has to use as many tiles."""
    model = tiny("qwen2")
    x = torch.randn(1, 3, 48)
    mlp = gated_mlps(model)[0]
    expected = mlp(x)
    tile_mlps(model, 5)
    assert_close(mlp(x), expected, 1e-6)


def test_host_memory_is_taken_once_and_holds_each_layers_input():
    model = apply_lrsa(tiny("llama", num_hidden_layers=5), LRSA).train()
    enable_checkpointing(model)
    store = offload_checkpoints(model)
    ids = torch.randint(0, 101, (1, 70))
    for step in range(1, 4):
        model(ids, use_cache=False).logits.sum().backward()
        assert store.num_saved == 5 * step
        assert store.num_bytes == 5 * 70 * 48 * 4
    # A pass that is thrown away gives its memory back, and one without gradients takes none.
    model(ids, use_cache=False).logits.sum()
    gc.collect()
    with torch.no_grad():
        model(ids, use_cache=False)
    model(ids[:, :50], use_cache=False).logits.sum().backward()
    assert store.num_saved == 25 and store.num_bytes == 5 * 70 * 48 * 4


def test_integers_stay_where_they_are():
    store = HostStore()
    ids = torch.arange(5)
    assert store._unpack(store._pack(ids)).data_ptr() == ids.data_ptr()
    assert store.num_saved == 0


@pytest.mark.parametrize("family,settings", [("phi3", dict(pad_token_id=0)), ("gemma", {}), ("gemma3_text", {})])
def test_gated_mlps_are_found_by_their_matrices(family, settings):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **settings}))
    assert [type(mlp).__name__.endswith("MLP") for mlp in gated_mlps(model)] == [True, True]


@pytest.mark.parametrize(
    "family,said",
    [("phi", "has no gated MLP of plain matrices"), ("mixtral", "has a mixture of experts"),
     ("qwen3_moe", "has a mixture of experts")],
)  # fmt: skip
def test_other_mlps_are_refused(family, said):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES))
    check_tiling(config_with(), model)
    with pytest.raises(LRSAError, match=rf"memory\.tiled_mlp=true needs .* model\.layers\.0 of \w+ {said}: set it"):
        check_tiling(config_with(memory=MemoryConfig(tiled_mlp=True)), model)


def test_tiles_are_counted_by_what_a_rank_holds():
    memory = MemoryConfig(tiled_mlp=True, tile_size=1000)
    assert num_tiles(config_with(65536)) == 1
    assert num_tiles(config_with(65536, memory)) == 66
    assert num_tiles(config_with(65536, memory, sp_size=2, micro_batch=2)) == 66
    assert num_tiles(config_with(65536, memory, sp_size=8)) == 9


@pytest.mark.parametrize("variable", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # of torchrun, of the deepspeed launcher
def test_a_host_without_the_memory_is_said_before_the_run(monkeypatch, variable):
    monkeypatch.setenv(variable, "8")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    present = SimpleNamespace(total=8 * 2 * 4096 * 48 * 2 + 1)
    monkeypatch.setattr("psutil.virtual_memory", lambda: present)
    offload = MemoryConfig(offload_checkpoints=True)
    check_host_memory(config_with(4096, offload), model, torch.bfloat16)
    check_host_memory(config_with(4096), model, torch.float32)
    with pytest.raises(
        LRSAError, match="needs 0 GB of host memory for the activations alone, and there are 0 GB: lower"
    ):
        check_host_memory(config_with(4096, offload), model, torch.float32)


def test_what_is_not_held_cannot_be_moved():
    model, memory = (
        ModelConfig(random={"model_type": "llama"}, tokenizer="bytes"),
        MemoryConfig(offload_checkpoints=True),
    )
    with pytest.raises(LRSAError, match="activation_checkpointing is false: set it to true, or the lever to false"):
        TrainConfig(model=model, activation_checkpointing=False, memory=memory)
    with pytest.raises(LRSAError, match=r"memory\.save_attention=true saves .* to true, or the lever to false"):
        TrainConfig(model=model, activation_checkpointing=False, memory=MemoryConfig(save_attention=True))
    with pytest.raises(LRSAError, match=r"memory\.tile_size=0 is not valid: give a whole number of at least 1"):
        MemoryConfig(tile_size=0)
