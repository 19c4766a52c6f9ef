"""Objectives and evaluation compute the logits of the model's own forward pass, whatever follows its output layer."""

import pytest
from torch.nn.functional import cross_entropy, kl_div

from lrsa_ds import apply_lrsa
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.models.logits import logits_of
from tests.cpu.test_model import tiny
from tests.cpu.test_objectives import LRSA, batch_of, objective_of
from tests.cpu.test_objectives import logits_of as own_logits

SCALED = {
    "granite": dict(logits_scaling=3.0, attention_multiplier=0.1, residual_multiplier=0.5, embedding_multiplier=2.0),
    "cohere": dict(logit_scale=0.3),
    "bert": {},  # a matrix and a norm before its output layer
    "nanochat": dict(final_logit_softcapping=0.5),
    "hyperclovax": dict(logits_scaling=3.0),
    "granitemoe": dict(logits_scaling=3.0),
}


def nll(logits, labels):
    return cross_entropy(logits, labels, ignore_index=IGNORE, reduction="sum")


@pytest.mark.parametrize("family", SCALED)
def test_loss_and_statistics_are_those_of_the_models_own_logits(family):
    model, batch = apply_lrsa(tiny_model(family, **SCALED[family]), LRSA), batch_of()
    labels = batch["labels"][0]
    own, dense = own_logits(model, batch, LRSA.retention), own_logits(model, batch, 1.0)
    hidden = model.get_decoder()(batch["input_ids"], use_cache=False).last_hidden_state[0]
    assert (model.get_output_embeddings()(hidden) - own).abs().max() > 0.01
    assert (logits_of(model, hidden) - own).abs().max() <= 1e-5
    objective = objective_of(model)
    assert objective(**batch)[0].item() == pytest.approx(nll(own, labels).item(), rel=1e-5)
    found, _, likeliest = objective.eval()(**batch).unbind(1)
    assert found.sum().item() == pytest.approx(nll(own, labels).item(), rel=1e-5)
    assert likeliest.tolist() == own.argmax(-1)[labels != IGNORE].tolist()
    student, teacher = (x[labels != IGNORE].log_softmax(-1) for x in (own, dense))
    expected = kl_div(student, teacher, reduction="sum", log_target=True).item()
    assert expected > 1e-3
    distilled, *_ = objective_of(model, "objective=distill", "objective.weight=1.0")(**batch)
    assert distilled.item() == pytest.approx(expected, rel=1e-4)


def test_a_model_that_does_more_is_refused():
    model = tiny("llama")
    model.config.unpadded_vocab_size = 90
    with pytest.raises(LRSAError, match=r"cuts its logits after the output layer \(unpadded_vocab_size=90\)"):
        apply_lrsa(model, LRSA)
