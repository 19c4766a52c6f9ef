"""Mixtures of experts: the load-balancing loss and the load of the experts. Parity over ranks: tests/dist."""

import sys
from types import SimpleNamespace

import pytest
import torch

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.data.packing import Example, packed
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.models.patch import enable_checkpointing
from lrsa_ds.models.routers import Routers, router_coefficient, total
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.train.balance import Balance
from tests.cpu.test_config import composed, sentence

LRSA = LRSAConfig(sink_size=4, lag_size=16, retention=0.25)
ALONE = SimpleNamespace(dp_size=1, sum=lambda values: values, sum_in_sequence=torch.Tensor.detach)
# Routers with a softmax or a sigmoid, with a bias or none, layers without experts, experts of attention (JetMoE).
WITH_LOSS = ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "phimoe", "ernie4_5_moe", "minimax_m2", "jetmoe", "gpt_oss"]
WITHOUT_LOSS = ["glm4_moe", "dots1", "hy_v3", "aria_text", "deepseek_v3"]
LENGTHS = (70, 40)


def row_of(num_padding=18):
    draw = torch.Generator().manual_seed(1)
    documents = [torch.randint(1, 100, (n,), generator=draw).tolist() for n in LENGTHS]
    examples = [Example(ids, ids, "t", index) for index, ids in enumerate(documents)]
    return packed(examples, sum(LENGTHS) + num_padding, pad_id=0)


def pass_of(model, row, **more):
    return model(
        row.input_ids[None],
        position_ids=row.position_ids[None],
        document_lengths=row.document_lengths,
        use_cache=False,
        **more,
    )


def watched(model, row, coefficient):
    """The loss times its coefficient, and what is logged."""
    routers = Routers.of(model, coefficient)
    with routers.watching(row.is_token()) as seen:
        pass_of(model, row)
    balance = Balance(routers, ALONE, num_passes=1)
    return balance.loss(row, *total(seen)), balance.metrics()


@pytest.mark.parametrize("family", WITH_LOSS)
def test_the_loss_is_that_of_transformers(family):
    """Of the tokens alone, whatever stands in the padding; and so is every gradient, with layers recomputed."""
    model, row = apply_lrsa(tiny_model(family), LRSA).train(), row_of()
    output = pass_of(model, row, output_router_logits=True)
    function = sys.modules[type(model).__module__].load_balancing_loss_func
    numbers = model.num_experts, model.num_experts_per_tok
    expected = function(output.router_logits, *numbers, attention_mask=row.is_token().long()[None])
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(expected, parameters, allow_unused=True)
    if model.supports_gradient_checkpointing:
        enable_checkpointing(model)
    loss, logged = watched(model, row, 0.5)
    assert logged["aux_loss"] == pytest.approx(expected.item(), rel=1e-5) == 2 * loss.item()
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    for name, gradient, reference in zip(names, found, gradients, strict=True):
        assert (gradient is None) == (reference is None), name
        if reference is not None:
            torch.testing.assert_close(2 * gradient, reference, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("family", ["mixtral", *WITHOUT_LOSS])
def test_the_load_counts_every_token_and_no_padding(family):
    model = apply_lrsa(tiny_model(family), LRSA).train()
    routers, row = Routers.of(model, None), row_of(num_padding=0)
    with routers.watching(row.is_token()) as seen:
        model(row.input_ids[None], use_cache=False)
    load = total(seen).load
    assert load.sum(1).tolist() == [2.0 * sum(LENGTHS)] * routers.num_routers  # two experts a token
    balance = Balance(routers, ALONE, num_passes=1)
    assert balance.loss(row, *total(seen)) == 0.0
    assert balance.metrics() == {"expert_load": pytest.approx((load.amax(1) / load.mean(1)).max().item())}


def test_a_row_of_padding_gives_no_loss():
    model, row = tiny_model("mixtral").train(), packed([], 64, pad_id=0)
    assert watched(apply_lrsa(model, LRSA), row, 0.5)[0].item() == 0.0


def test_which_coefficient_is_taken():
    mixtral, dense, sigmoid = tiny_model("mixtral", router_aux_loss_coef=0.02), tiny_model("llama"), tiny_model("dots1")

    def coefficient(model, value):
        return router_coefficient(ModelConfig(name="x", router_aux_loss_coef=value), model)

    assert coefficient(mixtral, "auto") == 0.02 and coefficient(mixtral, 0.3) == 0.3
    assert coefficient(mixtral, None) is coefficient(mixtral, 0) is None
    for model in (dense, sigmoid):
        assert coefficient(model, "auto") is coefficient(model, None) is coefficient(model, 0.0) is None
        with pytest.raises(LRSAError, match=r"model.router_aux_loss_coef=0.01 needs a mixture of experts with a load-"):
            coefficient(model, 0.01)


def test_the_setting():
    assert composed("+recipe=smoke").model.router_aux_loss_coef == "auto"
    for value, typed in (("0.01", 0.01), ("null", None), ("1", 1.0), ("auto", "auto")):
        assert composed("+recipe=smoke", f"model.router_aux_loss_coef={value}").model.router_aux_loss_coef == typed
    for value in ("-0.1", "own", "true"):
        assert "model.router_aux_loss_coef" in sentence(f"model.router_aux_loss_coef={value}")
