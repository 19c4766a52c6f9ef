"""Models that read images beside text train on text, and come back from where they were saved."""

import copy

import pytest
import torch

import lrsa_ds
from lrsa_ds import LRSAConfig, apply_lrsa, prefill
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.checks import measure
from lrsa_ds.families.tiny import tiny_config, tiny_model
from lrsa_ds.models.adapters import add_adapters
from lrsa_ds.models.loading import empty_model, load_model
from lrsa_ds.models.logits import logits_of
from lrsa_ds.models.patch import check_supported, new_cache
from lrsa_ds.settings.model import LoraConfig, ModelConfig
from lrsa_ds.train.trainable import make_trainable
from tests.cpu.test_config import composed

LRSA = LRSAConfig(sink_size=4, lag_size=16, retention=0.25)


def random_settings(family):
    return ModelConfig(random=tiny_config(family).to_dict(), tokenizer="bytes")


@pytest.mark.parametrize("family,encoder", [("mistral3", "vision_tower"), ("qwen2_5_vl", "visual")])
def test_the_text_model_is_trained_and_saved_with_the_rest(family, encoder, tmp_path):
    settings = random_settings(family)
    check_supported(empty_model(settings))
    torch.manual_seed(0)
    model = apply_lrsa(load_model(settings, torch.float32), LRSA)
    tuned = copy.deepcopy(model)
    add_adapters(tuned, LoraConfig(rank=2, targets="all-linear"))
    adapted = {name.split(".lora_")[0] for name, _ in tuned.named_parameters() if ".lora_" in name}
    assert adapted and all("language_model.layers" in name for name in adapted)
    make_trainable(model, composed("+recipe=smoke"))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(encoder in name or "projector" in name for name in trained)
    assert any("layers.1.self_attn.q_proj" in name for name in trained) and any("embed_tokens" in n for n in trained)
    assert any(encoder in n for n, p in model.named_parameters() if not p.requires_grad)
    ids = torch.randint(4, 100, (1, 90))
    hidden = model.eval().get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    logits = logits_of(model, hidden)[0, -1]
    model.save_pretrained(tmp_path)
    again = load_model(ModelConfig(name=str(tmp_path)), torch.float32).eval()
    assert type(again) is type(model) and again.config.lrsa == model.config.lrsa
    apply_lrsa(again, LRSA)
    torch.testing.assert_close(prefill(again, ids, new_cache(again))[0], logits, rtol=1e-4, atol=1e-5)
    for (name, saved), (_, kept) in zip(model.named_parameters(), again.named_parameters(), strict=True):
        torch.testing.assert_close(saved, kept, msg=name)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_text_of_models_with_positions_of_images(family):
    """Each token has a time, a height and a width, which are equal in text; images are refused."""
    found = measure(family)
    assert found.verdict == "passed", found
    model, ids = apply_lrsa(tiny_model(family), LRSA), torch.randint(4, 100, (2, 90))
    mask = torch.ones_like(ids)
    mask[1, :20] = 0
    options = dict(attention_mask=mask, max_new_tokens=8, do_sample=False)
    assert lrsa_ds.generate(model, ids, **options).tolist() == model.generate(ids, **options).tolist()
    with pytest.raises(LRSAError, match=r"^pixel_values: .* reads text alone under LRSA attention"):
        model(ids, pixel_values=torch.zeros(4, 8))
    positions = torch.arange(90).expand(3, 2, 90).clone()
    positions[1, :, 5] += 1
    with pytest.raises(LRSAError, match="a time, a height and a width that differ"):
        model(ids, position_ids=positions)
