"""Liger's kernels leave the function of a model as it is: output and every gradient."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.models.liger import apply_liger
from tests.helpers import relative_error

pytestmark = pytest.mark.gpu


def test_a_model_with_liger_kernels_is_the_same_function():
    pytest.importorskip("liger_kernel")
    config = AutoConfig.for_model(
        "llama", vocab_size=320, hidden_size=128, intermediate_size=200, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).cuda()
    ids = torch.randint(0, 320, (1, 777), device="cuda")
    plain = values_of(model, ids)
    apply_liger(model)
    fused = values_of(model, ids)
    errors = {name: relative_error(fused[name], value) for name, value in plain.items()}
    assert max(errors.values()) < 1e-3, errors


def values_of(model, ids):
    """Output and gradients, by name."""
    model.zero_grad()
    apply_lrsa(model, LRSAConfig(sink_size=5, lag_size=64, retention=0.25, backend="chunked"))
    logits = model(ids).logits
    logits.float().square().mean().backward()
    return {"logits": logits} | {name: p.grad.clone() for name, p in model.named_parameters()}
