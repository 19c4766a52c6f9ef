"""Objectives: the table, what is refused, and the teachers of distillation. Parity over ranks: tests/dist."""

import copy
from functools import partial

import pytest
import torch

from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.adapters import add_adapters
from lrsa_ds.objectives import OBJECTIVES, check_objective, make_objective
from lrsa_ds.settings.model import LoraConfig
from lrsa_ds.settings.run import ObjectiveConfig
from lrsa_ds.train.plan import prepare
from lrsa_ds.train.run import _start_model
from recipes import load_procedure
from tests.cpu.test_config import composed, sentence
from tests.cpu.test_model import tiny

LRSA = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)


def batch_of(num_tokens=60, num_slots=12):
    ids = torch.randint(0, 101, (1, num_tokens))
    labels = torch.full_like(ids, IGNORE)
    labels[0, 25:35] = torch.randint(0, 101, (10,))
    return dict(
        input_ids=ids,
        position_ids=torch.arange(num_tokens)[None],
        labels=labels,
        document_lengths=(num_tokens,),
        lrsa_config=LRSA,
        num_slots=num_slots,
    )


def objective_of(model, *overrides, start=None):
    sizes = ["attention.sink_size=2", "attention.lag_size=8", "attention.retention=0.25", "loss_chunk_size=4"]
    config = composed("+recipe=smoke", *sizes, *overrides)
    return make_objective(config, model, lambda: start).train()


def logits_of(model, batch, retention):
    settings = LRSAConfig(sink_size=2, lag_size=8, retention=retention)
    return model(batch["input_ids"], use_cache=False, lrsa_config=settings).logits[0]


def test_the_table_is_what_the_configuration_offers():
    for name in OBJECTIVES:
        assert check_objective(composed(f"objective={name}")) is OBJECTIVES[name]
    said = sentence("objective=reward")
    assert all(name in said for name in OBJECTIVES)
    with pytest.raises(LRSAError, match=r"objective.kind='reward' is not valid: choose one of target_loss, distill"):
        check_objective(composed("objective.kind=reward"))


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["objective.weight=0.3"], "have no effect under objective=target_loss: add objective=distill"),
        (["objective.teacher=start"], "have no effect under objective=target_loss"),
        (["objective=distill", "attention=dense"], "objective.teacher=self under dense attention is the student"),
        (["objective=distill", "attention.retention=[1.0,1.0]"], "objective.teacher=self under dense attention"),
    ],
)
def test_what_cannot_be_honoured_is_refused(overrides, said):
    with pytest.raises(LRSAError, match=said):
        check_objective(composed(*overrides))


def test_what_is_no_setting_is_refused():
    for override, said in (
        ("objective.weight=0", "objective.weight=0.0 is not valid: give a number above 0 and at most 1"),
        ("objective.weight=1.5", "objective.weight=1.5 is not valid"),
        ("objective.temperature=0", "objective.temperature=0.0 is not valid"),
        ("objective.teacher=other", "objective.teacher='other' is not valid: choose one of self, start"),
        ("objective.wieght=1", "Did you mean weight?"),
    ):
        assert said in sentence("objective=distill", override)


def test_settings_that_are_right():
    for overrides in (
        ["attention=lrsa_mixed"],
        ["objective.teacher=start", "attention=dense"],
        ["objective.teacher=start", "model.lora.rank=4", "objective.weight=1"],
    ):
        check_objective(composed("objective=distill", *overrides))


def test_the_target_loss():
    model, batch = apply_lrsa(tiny("llama"), LRSA), batch_of()
    total, logged = objective_of(model)(**batch)
    logits = logits_of(model, batch, 0.25)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][0], ignore_index=IGNORE, reduction="sum")
    torch.testing.assert_close(total, expected)
    assert logged.shape == (0,)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_distillation_against_a_dense_pass(temperature):
    """The sum over the targets alone, whatever the slots and chunks; evaluation is that of the target loss."""
    model, batch = apply_lrsa(tiny("llama"), LRSA), batch_of()
    objective = objective_of(model, "objective=distill", "objective.weight=0.8", f"objective.temperature={temperature}")
    total, logged = objective(**batch)
    targets = batch["labels"][0] != IGNORE
    with torch.no_grad():
        student, teacher = (logits_of(model, batch, r)[targets] for r in (0.25, 1.0))
    nll = torch.nn.functional.cross_entropy(student, batch["labels"][0][targets], reduction="sum")
    p, q = (teacher / temperature).softmax(-1), (student / temperature).softmax(-1)
    divergence = (p * (p / q).log()).sum()
    torch.testing.assert_close(logged, torch.stack([nll, divergence]), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total.detach(), 0.2 * nll + 0.8 * temperature**2 * divergence, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(objective.eval()(**batch), objective_of(model).eval()(**batch))


def test_under_lora_the_start_weights_are_the_base_without_adapters():
    base, batch = apply_lrsa(tiny("llama"), LRSA), batch_of()
    model = copy.deepcopy(base)
    add_adapters(model, LoraConfig(rank=3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned = logits_of(model, batch, 0.25)
    distill = ("objective=distill", "objective.teacher=start", "objective.weight=1")
    objective = objective_of(model, *distill, "model.lora.rank=3")
    assert objective.teacher is None  # no copy is held
    total, _ = objective(**batch)
    torch.testing.assert_close(logits_of(model, batch, 0.25), tuned, rtol=0, atol=0)  # the adapters are back
    expected, _ = objective_of(model, *distill, start=base)(**batch)
    torch.testing.assert_close(total, expected)
    total.backward()
    assert all((p.grad is not None) == ("lora_" in name) for name, p in model.named_parameters() if p.requires_grad)


def test_a_frozen_copy_is_the_model_before_training_and_is_not_trained(tmp_path):
    distill = ("objective=distill", "objective.teacher=start", "zero=stage2")
    config = composed("+recipe=smoke", *distill, f"output_dir={tmp_path}")
    plan = prepare(config, load_procedure("qa"))
    objective = make_objective(config, _start_model(config, plan), partial(_start_model, config, plan))
    copied, trained = objective.teacher.state_dict(), objective.lm.state_dict()
    assert copied.keys() == trained.keys() and all(torch.equal(copied[name], trained[name]) for name in copied)
    assert not any(p.requires_grad for p in objective.teacher.parameters())
    assert all(p.requires_grad for p in objective.lm.parameters())
    assert plan.checkpoint_bytes == plan.num_parameters * (4 + 12 + 4)
    assert config.objective == ObjectiveConfig(kind="distill", teacher="start")
