"""Where models keep, change or reuse what a pass tells their attention."""

import pytest

import lrsa_ds
from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.errors import LRSAError
from lrsa_ds.families.tiny import tiny_model
from tests.cpu.test_cache import STEPS, logits_of_training, logits_with_cache, tokens

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)


@pytest.mark.parametrize(
    "family,said",
    [("hrm_text", "passes a token through its layers several times"), ("jetmoe", "repeats keys behind the cache")],
)
def test_caches_of_layers_that_do_not_attend_to_what_they_cache(family, said):
    model, ids = apply_lrsa(tiny_model(family), CONFIG), tokens(61)
    actual = logits_with_cache(model, ids, lrsa_ds.new_cache(model), STEPS["across chunks"](CONFIG))
    assert (actual - logits_of_training(model, ids)).abs().max() <= 1e-4
    with pytest.raises(LRSAError, match=f"{said}, so lrsa_ds.generate cannot serve it: use model.generate"):
        lrsa_ds.generate(model, ids, max_new_tokens=2)
