"""`apply_lrsa` on tiny real models of each family, and every refusal."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, lrsa_attention, prefill
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.models.loading import empty_model, load_model
from lrsa_ds.models.patch import enable_checkpointing, new_cache
from lrsa_ds.notices import say_once
from lrsa_ds.settings.model import ModelConfig
from tests.helpers import assert_close

SIZES = dict(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    head_dim=12,
)
FAMILIES = {
    "llama": {},
    "qwen2": dict(tie_word_embeddings=True),
    "qwen3": {},
    "mistral": dict(sliding_window=None),
}


def tiny(family, **settings):
    config = AutoConfig.for_model(family, **{**SIZES, **FAMILIES.get(family, {}), **settings})
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_retention_one_gives_the_logits_of_the_dense_model(family):
    model = tiny(family)
    ids = torch.randint(0, 101, (2, 90))
    expected = model(ids, use_cache=False).logits
    apply_lrsa(model, LRSAConfig(sink_size=2, lag_size=8, retention=1.0))
    assert_close(model(ids, use_cache=False).logits, expected, 1e-5, "logits")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_layer_uses_lrsa(family, monkeypatch):
    """The logits differ from dense attention just where a history has lost something: from token S + 2L on."""
    model = tiny(family)
    ids = torch.randint(0, 101, (1, 90))
    dense = model(ids, use_cache=False).logits
    config = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
    sparse = apply_lrsa(model, config)(ids, use_cache=False).logits
    assert_close(sparse[:, :18], dense[:, :18], 1e-5, "logits before the first history")
    assert ((sparse - dense)[:, 18:].abs().amax(-1) > 1e-5).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_documents_equal_documents_alone(family):
    config = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
    model = apply_lrsa(tiny(family), config)
    lengths = (50, 7, 41)
    ids = torch.randint(0, 101, (1, sum(lengths)))
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    packed = model(ids, position_ids=positions, use_cache=False, document_lengths=lengths).logits
    alone = torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)
    assert_close(packed, alone, 1e-5, "logits")


def test_settings_of_one_pass():
    model = apply_lrsa(tiny("llama"), LRSAConfig(sink_size=2, lag_size=8, retention=0.25))
    ids = torch.randint(0, 101, (1, 90))
    other = LRSAConfig(sink_size=2, lag_size=8, retention=0.5)
    passed = model(ids, use_cache=False, lrsa_config=other).logits
    assert_close(passed, apply_lrsa(model, other)(ids, use_cache=False).logits, 1e-6, "logits")


def test_gradients_with_activation_checkpointing():
    model = apply_lrsa(tiny("qwen2"), LRSAConfig(sink_size=2, lag_size=8, retention=0.25)).train()
    ids = torch.randint(0, 101, (1, 70))
    plain = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), list(model.parameters()))
    enable_checkpointing(model)
    again = torch.autograd.grad(model(ids, use_cache=False).logits.square().mean(), list(model.parameters()))
    for a, b in zip(again, plain, strict=True):
        assert_close(a, b, 1e-6, "gradient")


def test_a_saved_model_remembers_its_settings_and_loads_dense(tmp_path):
    model = apply_lrsa(tiny("qwen3"), LRSAConfig(sink_size=2, lag_size=8, retention=0.25))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.lrsa == dict(sink_size=2, lag_size=8, retention=0.25, backend="auto")
    assert loaded.config._attn_implementation != "lrsa"
    ids = torch.randint(0, 101, (1, 90))
    again = apply_lrsa(loaded.eval(), LRSAConfig(**loaded.config.lrsa))
    assert_close(again(ids, use_cache=False).logits, model(ids, use_cache=False).logits, 1e-6, "logits")


def test_scaling_reaches_the_attention():
    q, k, v = torch.randn(3, 1, 2, 40, 8)
    config = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
    assert_close(lrsa_attention(q, k, v, config, scale=0.1), lrsa_attention(q * 0.1 * 8**0.5, k, v, config), 1e-5)


@pytest.mark.parametrize(
    "family,settings,said",
    [
        ("mistral", dict(sliding_window=64), r"MistralForCausalLM has no layer of full attention"),
        ("recurrent_gemma", {}, r"RecurrentGemmaForCausalLM keeps the state of layer 0 \(linear_attention\) elsewhere"),
        ("electra", dict(is_decoder=True), r"ElectraForCausalLM has generator_predictions beside its decoder"),
        ("doge", {}, r"layer 0 of Doge.* makes its own mask"),
        ("diffllama", {}, r"layer 0 of DiffLlama.* subtracts two attentions"),
    ],
)
def test_models_that_are_refused(family, settings, said):
    with pytest.raises(LRSAError, match=said):
        apply_lrsa(tiny(family, **settings), LRSAConfig())


@pytest.mark.parametrize(
    "family,said",
    [
        ("git", r"GitForCausalLM does not call transformers' attention interface"),
        ("mllama", r"layer 1 of Mllama.* is of type cross_attention"),
    ],
)
def test_models_beside_encoders_that_are_refused(family, said):
    with pytest.raises(LRSAError, match=said):
        apply_lrsa(tiny_model(family), LRSAConfig())


def test_a_window_is_refused_only_where_it_hides_something():
    apply_lrsa(tiny("mistral", sliding_window=512), LRSAConfig())
    with pytest.raises(LRSAError, match="sliding window of 511"):
        apply_lrsa(tiny("mistral", sliding_window=511), LRSAConfig())


def test_attention_dropout_is_set_to_0_and_said():
    say_once.cache_clear()
    model = tiny("llama", attention_dropout=0.1)
    with pytest.warns(UserWarning, match="attention_dropout=0.1 of the model is set to 0"):
        apply_lrsa(model, LRSAConfig(sink_size=2, lag_size=8, retention=0.25)).train()
    assert model.config.attention_dropout == 0
    ids = torch.randint(0, 101, (1, 40))
    assert torch.equal(model(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_a_model_that_also_reads_images_is_trained_saved_and_loaded_on_text(tmp_path):
    """Its settings are those of the text model too, which is another object with another configuration."""
    model = apply_lrsa(tiny_model("fuyu"), LRSAConfig(sink_size=2, lag_size=8, retention=0.25))
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(name=str(tmp_path)), torch.float32).eval()
    apply_lrsa(loaded, LRSAConfig(**loaded.config.lrsa))
    ids = torch.randint(4, 101, (1, 70))
    expected = model(ids, use_cache=False).logits
    assert_close(loaded(ids, use_cache=False).logits, expected, 1e-6, "logits")
    assert_close(prefill(loaded, ids, new_cache(loaded)), expected[:, -1], 1e-5, "last logits of prefilling")


@pytest.mark.parametrize(
    "family,rope",
    [
        ("llama", dict(rope_type="dynamic", factor=4.0, rope_theta=10000.0)),
        ("qwen2", dict(rope_type="dynamic", factor=2.0, rope_theta=10000.0)),
        (
            "phi3",
            dict(
                rope_type="longrope",
                rope_theta=10000.0,
                short_factor=[1.0] * 6,
                long_factor=[2.0] * 6,
                original_max_position_embeddings=64,
            ),
        ),
    ],
)
def test_frequencies_that_depend_on_the_length_of_a_pass_are_refused(family, rope):
    special = dict(pad_token_id=0) if family == "phi3" else {}
    model = tiny(family, rope_parameters=rope, **special)
    with pytest.raises(LRSAError, match=rf"has rope_type={rope['rope_type']}, .* such as yarn, linear or llama3"):
        apply_lrsa(model, LRSAConfig())


@pytest.mark.parametrize(
    "rope",
    [
        dict(rope_type="default", rope_theta=10000.0),
        dict(rope_type="linear", factor=2.0, rope_theta=10000.0),
        dict(rope_type="yarn", factor=2.0, rope_theta=10000.0, original_max_position_embeddings=256),
        dict(
            rope_type="llama3",
            factor=2.0,
            rope_theta=10000.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=256,
        ),
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_fixed_frequencies_are_taken(rope):
    config = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
    model, ids = apply_lrsa(tiny("llama", rope_parameters=rope), config), torch.randint(1, 101, (1, 60))
    expected = model(ids, use_cache=False).logits[:, -1]
    assert_close(prefill(model, ids, LagKVCache(config)), expected, 1e-5, "logits")


def test_left_padding_and_a_cache_are_refused():
    model = apply_lrsa(tiny("llama"), LRSAConfig(sink_size=2, lag_size=8))
    ids = torch.randint(0, 101, (1, 30))
    mask = torch.ones(1, 30, dtype=torch.int64)
    mask[:, :3] = 0
    with pytest.raises(LRSAError, match="pad on the right"):
        model(ids, attention_mask=mask, use_cache=False)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(LRSAError, match=r"got one of 30 tokens: use past_key_values=lrsa_ds.LagKVCache"):
        model(ids[:, :1], past_key_values=cache)


def test_right_padding_changes_nothing():
    model = apply_lrsa(tiny("llama"), LRSAConfig(sink_size=2, lag_size=8, retention=0.25))
    ids = torch.randint(0, 101, (1, 60))
    mask = torch.ones(1, 60, dtype=torch.int64)
    mask[:, 50:] = 0
    padded = model(ids, attention_mask=mask, use_cache=False).logits[:, :50]
    assert_close(padded, model(ids[:, :50], use_cache=False).logits, 1e-5, "logits")


def test_loading_random_weights_and_a_directory(tmp_path):
    random = ModelConfig(random={"model_type": "qwen2", **SIZES}, tokenizer="bytes")
    assert all(p.is_meta for p in empty_model(random).parameters())
    model = load_model(random, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    model.save_pretrained(tmp_path)
    loaded = load_model(ModelConfig(name=str(tmp_path)), torch.bfloat16)
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_a_directory_without_weights(tmp_path):
    AutoConfig.for_model("llama", **SIZES).save_pretrained(tmp_path)
    with pytest.raises(LRSAError, match=r"holds no weights .*safetensors"):
        load_model(ModelConfig(name=str(tmp_path)), torch.float32)
    with pytest.raises(LRSAError, match=r"model.gguf_file=a.gguf is not in"):
        load_model(ModelConfig(name=str(tmp_path), gguf_file="a.gguf"), torch.float32)


@pytest.mark.parametrize("name", ["./no/such/directory", "some-org/no-such-model"])
def test_a_name_that_leads_nowhere(name):
    with pytest.raises(LRSAError, match=r"model\.name"):
        empty_model(ModelConfig(name=name))


def test_an_unknown_architecture():
    with pytest.raises(LRSAError, match=r"model\.random"):
        empty_model(ModelConfig(random={"model_type": "lama"}, tokenizer="bytes"))
