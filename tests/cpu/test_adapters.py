"""Frozen parameters and LoRA adapters: what is trained, and what is exported."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.adapters import add_adapters, freeze, merge_adapters, save_adapters
from lrsa_ds.config import LoraConfig, ModelConfig
from lrsa_ds.errors import LRSAError
from lrsa_ds.output import _save_model
from tests.cpu.test_model import FAMILIES, tiny
from tests.helpers import assert_close


def adapted(family, lora, path):
    """A saved model, and the same with adapters that do something; its logits and its weights."""
    base = tiny(family)
    base.save_pretrained(path)
    model = apply_lrsa(AutoModelForCausalLM.from_pretrained(path), LRSAConfig(sink_size=2, lag_size=8, retention=0.5))
    add_adapters(model, lora)
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("targets", ["all-linear", "q_proj,v_proj"])
def test_merged_weights_and_saved_adapters_give_the_same_logits(tmp_path, family, targets):
    lora = LoraConfig(rank=3, alpha=8.0, targets=targets)
    model, ids = adapted(family, lora, tmp_path / "base"), torch.randint(0, 101, (1, 40))
    expected = model(ids, use_cache=False).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _save_model(model, merge_adapters(model, weights, lora), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert set(merged.state_dict()) == set(AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict())
    settings = LRSAConfig(**merged.config.lrsa)
    assert_close(apply_lrsa(merged, settings)(ids, use_cache=False).logits, expected, 1e-5, "logits")

    save_adapters(model, weights, lora, tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(apply_lrsa(base, settings), tmp_path / "adapter").eval()
    assert_close(again(ids, use_cache=False).logits, expected, 1e-5, "logits")


def test_freezing():
    model = tiny("llama")
    freeze(model, ["embed_tokens", r"layers\.0\."])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert "model.layers.1.mlp.up_proj.weight" in trained
    assert not any("embed_tokens" in name or "layers.0." in name for name in trained)


def test_mistakes():
    with pytest.raises(LRSAError, match=r"model.freeze='nope' is found in no parameter's name, such as model.embed"):
        freeze(tiny("llama"), ["nope"])
    with pytest.raises(LRSAError, match="leaves nothing to train"):
        freeze(tiny("llama"), ["."])
    with pytest.raises(LRSAError, match=r"model.lora.targets='nope_proj': "):
        add_adapters(tiny("llama"), LoraConfig(rank=2, targets="nope_proj"))
    with pytest.raises(LRSAError, match=r"model.lora.export='file' .*merged, adapter"):
        LoraConfig(export="file")
    with pytest.raises(LRSAError, match=r"model.freeze has no effect beside model.lora.rank"):
        ModelConfig(name="a/b", freeze=["x"], lora=LoraConfig(rank=2))
