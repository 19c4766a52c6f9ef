"""Frozen parameters and LoRA adapters: what is trained, and what is exported."""

import copy
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from peft import LoraConfig as PeftConfig
from transformers import AutoModelForCausalLM

from lrsa_ds import LRSAConfig, apply_lrsa, load, prefill
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.models.adapters import add_adapters, base_name, freeze, merge_adapters, save_adapters
from lrsa_ds.models.loading import load_model
from lrsa_ds.notices import say_once
from lrsa_ds.objectives import TargetLoss
from lrsa_ds.settings.model import LoraConfig, ModelConfig
from lrsa_ds.train import output
from lrsa_ds.train.output import _save_model
from tests.cpu.test_model import FAMILIES, SIZES, tiny
from tests.helpers import assert_close

EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)


def adapted(family, lora, path, **settings):
    """A saved model, and the same with adapters that do something; its logits and its weights."""
    base = tiny(family, **settings)
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
    check_export(tmp_path, family, LoraConfig(rank=3, alpha=8.0, targets=targets))


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_experts_in_one_tensor_have_adapters_where_they_are_named(tmp_path, family):
    """Without the names they have none, and a sentence says so."""
    settings = EXPERTS | ({"sliding_window": None} if family == "mixtral" else {})
    names = "mlp.experts.down_proj,mlp.experts.gate_up_proj"
    say_once.cache_clear()
    with pytest.warns(UserWarning, match=rf"hold all experts in one tensor.*model.lora.target_parameters='{names}'"):
        add_adapters(tiny(family, **settings), LoraConfig(rank=3))
    check_export(tmp_path, family, LoraConfig(rank=3, alpha=8.0, target_parameters=names), **settings)
    with pytest.raises(
        LRSAError, match=r"no parameter's name ends with 'experts.w1'; those .* are mlp.experts.down_proj"
    ):
        add_adapters(tiny(family, **settings), LoraConfig(rank=3, target_parameters="experts.w1"))


def test_convolutions_are_no_experts(recwarn):
    """Those of recurrent layers have three dims too: [C, 1, width]."""
    say_once.cache_clear()
    add_adapters(tiny_model("lfm2"), LoraConfig(rank=3))
    assert not [str(warning.message) for warning in recwarn if "experts" in str(warning.message)]


def check_export(tmp_path, family, lora, **settings):
    model, ids = adapted(family, lora, tmp_path / "base", **settings), torch.randint(0, 101, (1, 40))
    expected = model(ids, use_cache=False).logits
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    _save_model(model, merge_adapters(model, weights, lora), tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert set(merged.state_dict()) == set(AutoModelForCausalLM.from_pretrained(tmp_path / "base").state_dict())
    lrsa = LRSAConfig(**merged.config.lrsa)
    assert_close(apply_lrsa(merged, lrsa)(ids, use_cache=False).logits, expected, 1e-5, "logits")

    save_adapters(model, weights, lora, tmp_path / "adapter", str(tmp_path / "base"))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    again = PeftModel.from_pretrained(apply_lrsa(base, lrsa), tmp_path / "adapter").eval()
    assert_close(again(ids, use_cache=False).logits, expected, 1e-5, "logits")


def exported(path, source, lora, monkeypatch):
    """Adapters that do something, trained on what `source` names, exported to `path` / run / model; expected logits."""
    model = apply_lrsa(load_model(source, torch.float32), LRSAConfig(sink_size=2, lag_size=8, retention=0.5))
    add_adapters(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.generation_config.eos_token_id = [5, 258]
    monkeypatch.setattr(output, "_full_weights", lambda engine: dict(TargetLoss(model, 1).state_dict()))
    config = SimpleNamespace(model=replace(source, lora=lora), seq_len=64)
    directory = path / "run" / "model"
    engine = SimpleNamespace(module=SimpleNamespace(lm=model))
    output.export_model(engine, byte_tokenizer(), config, directory, SimpleNamespace(is_main=True))
    ids = torch.randint(1, 101, (1, 40))
    return directory, ids, model.eval()(ids, use_cache=False).logits


def a_base(kind, path, monkeypatch):
    if kind == "random weights":
        random = {"model_type": "qwen2", **SIZES, "vocab_size": 300}
        return ModelConfig(random=random, tokenizer="bytes")
    monkeypatch.chdir(path)
    tiny("llama", vocab_size=300).save_pretrained(path / "base model")
    byte_tokenizer().save_pretrained(path / "base model")
    return ModelConfig(name="base model" if kind == "a relative path" else str(path / "base model"))


@pytest.mark.parametrize("kind", ["random weights", "a relative path", "an absolute path"])
def test_exported_adapters_are_loaded_by_everyone_from_anywhere(tmp_path, monkeypatch, kind):
    lora = LoraConfig(rank=3, alpha=8.0, export="adapter")
    directory, ids, expected = exported(tmp_path, a_base(kind, tmp_path, monkeypatch), lora, monkeypatch)
    monkeypatch.chdir("/")
    model, tokenizer, new_cache = load(str(directory), device="cpu")
    assert_close(model(ids, use_cache=False).logits, expected, 1e-5, "logits")
    assert (prefill(model, ids, new_cache()) - expected[:, -1]).abs().max() <= 1e-4
    assert new_cache().config.lag_size == 8 and tokenizer.chat_template
    assert model.generation_config.eos_token_id == [5, 258]
    assert not any("lora" in name for name in model.state_dict())
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    assert_close(load(tmp_path / "whole", device="cpu").model(ids, use_cache=False).logits, expected, 1e-5, "logits")

    settings = LRSAConfig(sink_size=2, lag_size=8, retention=0.5)
    for peft in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        theirs = peft.from_pretrained(directory).eval()
        plain = theirs.get_base_model() if peft is AutoPeftModelForCausalLM else theirs
        apply_lrsa(plain, settings)
        assert_close(theirs(ids, use_cache=False).logits, expected, 1e-5, "logits")

    # A base that was exported with the adapters moves with them; another one has to stay where it is.
    moved = tmp_path / "moved"
    directory.rename(moved)
    if kind != "random weights":
        (tmp_path / "base model").rename(tmp_path / "elsewhere")
        with pytest.raises(LRSAError, match=r"holds adapters of .*base model, which does not exist: restore the base"):
            load(moved, device="cpu")
        return
    assert_close(load(moved, device="cpu").model(ids, use_cache=False).logits, expected, 1e-5, "logits")


def test_adapters_on_top_of_adapters(tmp_path, monkeypatch):
    lora = LoraConfig(rank=3, alpha=8.0, export="adapter")
    first, *_ = exported(tmp_path / "1", a_base("random weights", tmp_path, monkeypatch), lora, monkeypatch)
    second, ids, expected = exported(tmp_path / "2", ModelConfig(name=str(first)), lora, monkeypatch)
    shutil.rmtree(tmp_path / "1")
    assert_close(load(second, device="cpu").model(ids, use_cache=False).logits, expected, 1e-5, "logits")


def test_the_name_of_a_base(tmp_path):
    assert base_name(ModelConfig(name="some-org/some-model", revision="v1")) == "some-org/some-model"
    assert base_name(ModelConfig(name=str(tmp_path / "x" / ".."))) == str(tmp_path)
    assert base_name(ModelConfig(name=str(tmp_path), gguf_file="a.gguf")) is None
    assert base_name(ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")) is None


def test_a_model_that_peft_has_wrapped_generates():
    ids, options = torch.randint(1, 101, (1, 45)), dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    settings = LRSAConfig(sink_size=2, lag_size=8, retention=0.5)
    lora = PeftConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    base = tiny("llama")
    expected = apply_lrsa(copy.deepcopy(base), settings).generate(ids, **options)
    wrapped = apply_lrsa(get_peft_model(copy.deepcopy(base), lora), settings)
    assert torch.equal(wrapped.generate(input_ids=ids, **options), expected)
    wrapped = get_peft_model(apply_lrsa(base, settings), lora)
    assert torch.equal(wrapped.generate(input_ids=ids, **options), expected)


def test_freezing():
    model = tiny("llama")
    freeze(model, ["embed_tokens", r"layers\.0\."])
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert "model.layers.1.mlp.up_proj.weight" in trained
    assert not any("embed_tokens" in name or "layers.0." in name for name in trained)


def test_mistakes():
    with pytest.raises(LRSAError, match=r"model.freeze='nope' matches no parameter name, such as model.embed"):
        freeze(tiny("llama"), ["nope"])
    with pytest.raises(LRSAError, match="leaves nothing to train"):
        freeze(tiny("llama"), ["."])
    with pytest.raises(LRSAError, match=r"model.lora.targets='nope_proj': "):
        add_adapters(tiny("llama"), LoraConfig(rank=2, targets="nope_proj"))
    with pytest.raises(LRSAError, match=r"model.lora.export='file' .*merged, adapter"):
        LoraConfig(export="file")
    with pytest.raises(LRSAError, match=r"model.freeze has no effect with model.lora.rank"):
        ModelConfig(name="a/b", freeze=["x"], lora=LoraConfig(rank=2))
