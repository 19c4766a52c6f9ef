"""`model.rope`: the positions of transformers' own scalings, in training, export, evaluation and cache."""

import json
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lrsa_ds import LRSAConfig, apply_lrsa, load, prefill
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.loading import empty_model, load_model
from lrsa_ds.models.rope import check_reach, raise_reach, set_rope
from lrsa_ds.notices import say_once
from lrsa_ds.settings.model import LoraConfig, ModelConfig
from lrsa_ds.settings.rope import NEEDED
from tests.cpu.test_adapters import exported
from tests.cpu.test_model import FAMILIES, SIZES, tiny
from tests.helpers import assert_close, relative_error

LRSA = LRSAConfig(sink_size=2, lag_size=8, retention=0.5)
# What a user gives, what transformers is to be given for it by hand, and how many positions that reaches; 64 before.
CASES = {
    "theta": ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}, 64),
    "linear": ({"rope_type": "linear", "factor": 4}, {"rope_type": "linear", "factor": 4, "rope_theta": 1e4}, 256),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20},
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 20, "rope_theta": 1e4,
         "original_max_position_embeddings": 64},
        256,
    ),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 2e4,
         "original_max_position_embeddings": 32},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 2e4,
         "original_max_position_embeddings": 32},
        256,
    ),
}  # fmt: skip


def random_model(rope, family="llama", **settings):
    sizes = {"model_type": family, **SIZES, **FAMILIES.get(family, {}), "max_position_embeddings": 64, **settings}
    return ModelConfig(random=sizes, tokenizer="bytes", rope=rope)


def test_every_scaling_of_transformers_is_known_or_refused():
    assert set(NEEDED) | {"dynamic", "longrope"} == {"default", *ROPE_INIT_FUNCTIONS}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_those_of_transformers_with_the_same_parameters(tmp_path, case, family):
    """From random weights and from saved ones; and they are other ones than without `model.rope`."""
    given, by_hand, reach = CASES[case]
    own = (
        dict(rope_theta=1e4) if family == "llama" else dict(rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    )
    ids = torch.randint(0, 101, (1, 200))
    sizes = {**SIZES, **FAMILIES[family], "max_position_embeddings": 64}
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes, **own)).eval()
    plain.save_pretrained(tmp_path)
    config = AutoConfig.for_model(family, **{**sizes, "max_position_embeddings": reach}, rope_parameters=dict(by_hand))
    torch.manual_seed(0)
    expected = AutoModelForCausalLM.from_config(config).eval()(ids).logits
    assert relative_error(plain(ids).logits, expected) > 1e-3
    torch.manual_seed(0)
    for source in (random_model(given, family, **own), ModelConfig(name=str(tmp_path), rope=given)):
        model = load_model(source, torch.float32).eval()
        assert_close(model(ids).logits, expected, 1e-6, "logits")
        assert model.config.max_position_embeddings == reach
        assert model.config.rope_parameters == by_hand


def test_a_field_alone_changes_the_scaling_that_the_model_has():
    own = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32, "rope_theta": 1e4}
    model = empty_model(random_model({"factor": 8.0}, rope_parameters=own))
    assert model.config.rope_parameters == own | {"factor": 8.0}
    assert model.config.max_position_embeddings == 256
    model = empty_model(random_model({"rope_type": "default"}, rope_parameters=dict(own)))
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 1e4}


def gemma(**rope):
    config = AutoConfig.for_model("gemma3_text", **{**SIZES, "max_position_embeddings": 64})
    set_rope(config, rope)
    return config


def test_layers_with_settings_of_their_own():
    """Gemma 3: a scaling of all goes to full attention, as transformers' own `rope_scaling` does; or one by one."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    scaled = yarn | {"rope_theta": 1e6, "original_max_position_embeddings": 64}
    for given in (yarn, {"full_attention": yarn}):
        config = gemma(**given)
        assert config.rope_parameters["full_attention"] == scaled
        assert config.rope_parameters["sliding_attention"] == {"rope_type": "default", "rope_theta": 1e4}
        assert config.max_position_embeddings == 256
    assert gemma(sliding_attention={"rope_theta": 2e4}).rope_parameters["sliding_attention"]["rope_theta"] == 2e4
    with pytest.raises(LRSAError, match=r"model\.rope\.local: .* but sliding_attention and full_attention\."):
        gemma(local=yarn)
    with pytest.raises(LRSAError, match="is given for full_attention, and the layers of LlamaConfig share one"):
        empty_model(random_model({"full_attention": yarn}))


def test_a_saved_model_and_its_cache_know_the_positions(tmp_path):
    model = apply_lrsa(load_model(random_model(CASES["yarn"][0], vocab_size=300), torch.float32), LRSA).eval()
    ids = torch.randint(1, 101, (1, 150))
    expected = model(ids, use_cache=False).logits
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    again, _, new_cache = load(str(tmp_path), device="cpu")
    assert_close(again(ids, use_cache=False).logits, expected, 1e-6, "logits")
    assert (prefill(again, ids, new_cache()) - expected[:, -1]).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["of a base by name", "beside their base"])
def test_adapters_know_the_positions_that_they_were_trained_with(tmp_path, monkeypatch, kind):
    """Exported alone they bring the scaling, which their base does not have."""
    yarn = CASES["yarn"][0]
    source = random_model(yarn, vocab_size=300)
    if kind == "of a base by name":
        base = tiny("llama", vocab_size=300, max_position_embeddings=64, rope_theta=1e4)
        base.save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        source = ModelConfig(name=str(tmp_path / "base"), rope=yarn)
    lora = LoraConfig(rank=3, alpha=8.0, export="adapter")
    directory, ids, expected = exported(tmp_path, source, lora, monkeypatch)
    assert json.loads((directory / "rope.json").read_text())["rope_parameters"]["rope_type"] == "yarn"
    model, _, new_cache = load(str(directory), device="cpu")
    assert_close(model(ids, use_cache=False).logits, expected, 1e-5, "logits")
    assert (prefill(model, ids, new_cache()) - expected[:, -1]).abs().max() <= 1e-4
    assert model.config.max_position_embeddings == 256
    merged = exported(tmp_path / "merged", source, LoraConfig(rank=3, alpha=8.0), monkeypatch)
    assert load(str(merged[0]), device="cpu").model.config.rope_parameters["rope_type"] == "yarn"


def warnings_of(config, rope, *lengths):
    say_once.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for length in lengths:
            check_reach(config, rope, "seq_len", length)
    return [str(warning.message) for warning in said]


def test_a_length_beyond_the_positions_is_said_once(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    config = empty_model(random_model({})).config
    (said,) = warnings_of(config, {}, 64, 200, 200)
    assert said.startswith("seq_len=200 is beyond the 64 positions") and "{rope_type: yarn, factor: 4}" in said
    assert warnings_of(config, {"rope_theta": 1e6}, 200) == []
    yarn = {"rope_type": "yarn", "factor": 2.0}
    (said,) = warnings_of(empty_model(random_model(yarn)).config, yarn, 128, 200)
    assert "the 128 positions that model.rope reaches: raise its factor" in said


def test_a_model_trained_with_another_theta_reaches_its_length():
    model = load_model(random_model({"rope_theta": 1e6}), torch.float32)
    raise_reach(model.config, {"rope_theta": 1e6}, 200)
    assert model.config.max_position_embeddings == 200
    raise_reach(model.config, {}, 400)
    assert model.config.max_position_embeddings == 200


@pytest.mark.parametrize(
    "rope,said",
    [
        ({"rope_type": "ntk"}, r"rope_type='ntk' is not valid: choose one of default, linear, yarn, llama3"),
        ({"rope_type": "dynamic", "factor": 2}, r"rope_type=dynamic has frequencies that depend on"),
        ({"rope_type": "linear", "factor": 2, "beta_fast": 1}, r"beta_fast is not a field of rope_type=linear: it"),
        ({"factr": 2}, r"model\.rope\.factr is not a field of rotary positions: valid are rope_type, rope_theta"),
        ({"rope_type": "yarn"}, "with rope_type=yarn needs factor"),
        ({"rope_type": "llama3", "factor": 2}, "needs low_freq_factor and high_freq_factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor=0.5 is not valid: give a number of at least 1"),
        ({"rope_type": "yarn", "factor": "4x"}, "factor='4x' is not valid"),
        ({"rope_theta": True}, "rope_theta=True is not valid: give a number above 0"),
        ({"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 8.5}, "whole number of at least 1"),
        ({"rope_type": "yarn", "factor": 2, "beta_slow": 40}, r"beta_slow=40 has to be below .*beta_fast=32"),
        ({"full_attention": {"rope_type": "ntk"}}, r"model\.rope\.full_attention\.rope_type='ntk' is not valid"),
        ({"beta_fast": 20}, r"beta_fast is not a field of rope_type=default"),
    ],
)  # fmt: skip
def test_what_no_model_can_honour_is_one_sentence(rope, said):
    with pytest.raises(LRSAError, match=said):
        empty_model(random_model(rope))


def test_a_model_without_rotary_positions_is_refused():
    source = ModelConfig(random={"model_type": "gpt2"}, tokenizer="bytes", rope={"rope_theta": 1e6})
    with pytest.raises(LRSAError, match="GPT2Config does not have"):
        empty_model(source)
