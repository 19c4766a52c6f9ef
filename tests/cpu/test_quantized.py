"""A base in 4 bits under adapters: what is packed, what it computes, what is exported. On ranks: tests/dist."""

import copy
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from lrsa_ds import LRSAConfig, apply_lrsa, load
from lrsa_ds.costs.memory import static_bytes
from lrsa_ds.costs.weights import dequantizing_bytes, packed_numbers
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.adapters import add_adapters
from lrsa_ds.models.loading import load_model
from lrsa_ds.models.quantized import check_quantizable, check_quantize, quantized_layers, round_matrices
from lrsa_ds.models.tiling import num_tiles, tile_mlps
from lrsa_ds.settings.model import LoraConfig, ModelConfig
from lrsa_ds.train.forecast import job_and_sizes
from lrsa_ds.train.trainable import make_trainable
from tests.cpu.test_adapters import a_base, exported
from tests.cpu.test_config import composed, sentence
from tests.cpu.test_costs import H100
from tests.cpu.test_model import SIZES, tiny
from tests.helpers import assert_close, relative_error

LRSA = LRSAConfig(sink_size=2, lag_size=8, retention=0.5)
RANDOM = {"model_type": "qwen2", **SIZES, "vocab_size": 300, "tie_word_embeddings": True}
PACKED = [("nf4", False), ("fp4", True)]


@pytest.mark.parametrize("kind,double", PACKED)
def test_loss_and_gradients_are_those_of_the_rounded_weights(tmp_path, kind, double):
    """Two packed documents, from a model that is quantized as it is read; evaluation before does not change it."""
    base = tiny("qwen2", vocab_size=300)
    base.save_pretrained(tmp_path)
    source = ModelConfig(name=str(tmp_path), quantize=kind, double_quant=double, lora=LoraConfig(rank=2))
    packed, rounded = load_model(source, torch.float32), round_matrices(copy.deepcopy(base), source)
    assert len(quantized_layers(packed)) == 7 * SIZES["num_hidden_layers"]
    assert {p.dtype for p in packed.model.layers.parameters()} == {torch.uint8, torch.float32}
    assert not hasattr(packed.config, "quantization_config")
    ids = torch.randint(1, 101, (1, 70))
    positions = torch.cat([torch.arange(30), torch.arange(40)])[None]
    gradients, losses = [], []
    for model in (packed, rounded):
        apply_lrsa(model, LRSA)
        torch.manual_seed(0)
        add_adapters(model, LoraConfig(rank=2))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        with torch.no_grad():
            model.eval()(ids, use_cache=False)
        losses.append(model.train()(ids, position_ids=positions, labels=ids, use_cache=False).loss)
        losses[-1].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert_close(losses[0], losses[1], 1e-4, "loss")
    assert relative_error(losses[0], base(ids, position_ids=positions, labels=ids, use_cache=False).loss) > 1e-5
    for name, expected in gradients[1].items():
        assert_close(gradients[0][name], expected, 1e-4, name)


def test_random_weights_are_packed_one_by_one_and_drawn_again_by_a_seed():
    source = ModelConfig(random=RANDOM, tokenizer="bytes", quantize="nf4")
    models = []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(load_model(source, torch.float32))
    plain = load_model(ModelConfig(random=RANDOM, tokenizer="bytes"), torch.float32)
    first, ids = models[0], torch.randint(1, 101, (1, 40))
    assert not any(x.is_meta for x in [*first.parameters(), *first.buffers()])
    assert first.lm_head.weight is first.model.embed_tokens.weight
    assert torch.equal(first.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    logits = [model(ids, use_cache=False).logits for model in (*models, plain)]
    assert torch.equal(logits[0], logits[1]) and 0.5 < logits[0].std() / logits[2].std() < 2


@pytest.mark.parametrize("kind", ["random weights", "an absolute path"])
@pytest.mark.parametrize("export", ["adapter", "merged"])
def test_what_is_exported_is_what_was_trained(tmp_path, monkeypatch, kind, export):
    """Merged into the rounded weights; or beside a base, which is rounded when they are loaded."""
    source = a_base(kind, tmp_path, monkeypatch)
    source.quantize, source.double_quant = "nf4", True
    directory, ids, expected = exported(tmp_path, source, LoraConfig(rank=3, alpha=8.0, export=export), monkeypatch)
    assert_close(load(directory, device="cpu").model(ids, use_cache=False).logits, expected, 1e-5, "logits")
    assert (directory / "quantization.json").exists() == (export == "adapter" and kind == "an absolute path")
    if export == "merged":
        plain = AutoModelForCausalLM.from_pretrained(directory)
        assert {p.dtype for p in plain.parameters()} == {torch.float32}
    # On top of that, in 4 bits again: every rank reads a plain model, and packs it.
    packed = ModelConfig(name=str(directory), quantize="fp4")
    again = apply_lrsa(load_model(packed, torch.float32), LRSA)
    assert len(quantized_layers(again)) == 7 * SIZES["num_hidden_layers"]
    rounded = round_matrices(load(directory, device="cpu").model, packed)
    assert_close(again(ids, use_cache=False).logits, rounded(ids, use_cache=False).logits, 1e-5, "logits")


@pytest.mark.parametrize("double", [False, True])
def test_the_bytes_of_a_plan_are_those_of_the_tensors(double):
    overrides = ["model.quantize=nf4", f"model.double_quant={double}", "model.lora.rank=3", "model.dtype=fp32"]
    sizes = ["model.random.hidden_size=256", "model.random.intermediate_size=1024"]
    config = composed("+recipe=smoke", "zero=stage2", *sizes, *overrides)
    job, sizes, *_ = job_and_sizes(config, H100, 4)
    model = load_model(config.model, torch.float32)
    add_adapters(model, config.model.lora)
    scales, packed = 0, 0
    for layer in quantized_layers(model).values():
        state = layer.weight.quant_state
        packed += layer.weight.numel()
        scales += state.absmax.nbytes + (state.state2.absmax.nbytes if double else 0)
    parts = static_bytes(sizes, job)
    assert 2 * packed == packed_numbers(sizes, job)
    assert parts["weights"] == sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
    assert parts["scales of 4-bit weights"] == scales
    plain, *_ = job_and_sizes(composed("+recipe=smoke", "zero=stage2", *overrides[2:]), H100, 4)
    assert static_bytes(sizes, plain)["scales of 4-bit weights"] == 0


@pytest.mark.parametrize("levers", [[], ["memory.tiled_mlp=true", "memory.tile_size=200"]])
def test_a_step_dequantizes_as_often_as_is_counted(levers):
    config = composed("+recipe=smoke", "model.quantize=nf4", "model.lora.rank=3", "model.dtype=fp32", *levers)
    job, sizes, *_ = job_and_sizes(config, H100, 4)
    model = apply_lrsa(load_model(config.model, torch.float32), LRSA)
    make_trainable(tile_mlps(model, num_tiles(config)), config)
    ids = torch.randint(1, 101, (1, config.seq_len))
    with Dequantized() as seen:
        model.train()(ids, labels=ids, use_cache=False).loss.backward()
    each = 4 + 0.5 + 4 / 64  # written, read, and the share of a scale
    # A layer that is recomputed stops in front of its last tile.
    assert dequantizing_bytes(sizes, job) == pytest.approx(each * seen.count, rel=0.05 if levers else 0)


class Dequantized(TorchDispatchMode):
    """Counts the numbers of packed matrices that are multiplied with."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if "4bit" in str(function):
            shape = args[2] if "gemm" in str(function) else args[4]
            self.count += shape[0] * shape[1]
        return function(*args, **(kwargs or {}))


def test_mistakes(monkeypatch):
    for overrides, said in (
        (["model.quantize=int8", "model.lora.rank=2"], "model.quantize='int8' is not valid: choose one of nf4, fp4"),
        (["model.quantize=nf4"], "model.quantize=nf4 freezes the base .*: set model.lora.rank to 1 or more, or model"),
        (["model.double_quant=true"], "model.double_quant=true needs model.quantize .nf4 or fp4."),
        (["model.quantize=nf4", "model.lora.rank=2", "model.freeze=[embed]"], "model.freeze has no effect with"),
    ):
        with pytest.raises(LRSAError, match=said):
            raise LRSAError(sentence("+recipe=smoke", *overrides))
    packed = ModelConfig(name="a/b", quantize="nf4")
    experts = tiny("mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(LRSAError, match=r"MixtralForCausalLM has experts in one tensor: set model.quantize=null"):
        check_quantizable(packed, experts)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LRSAError, match=r"model.quantize=nf4 needs bitsandbytes: pip install 'lrsa-ds\[qlora\]'"):
        check_quantize(packed)
    check_quantize(ModelConfig(name="a/b"))
