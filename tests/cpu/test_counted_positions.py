"""Embeddings that count tokens themselves get the positions of the pass: of documents, rows, steps and shards."""

import pytest
import torch

import lrsa_ds
from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.families.tiny import tiny_model
from lrsa_ds.models.wrappers import freeze_encoders
from tests.cpu.test_cache import tokens
from tests.cpu.test_decoding import cache_of_padded_rows
from tests.helpers import assert_close

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)


@pytest.mark.parametrize("family", ["roberta", "bart", "whisper"])
@torch.no_grad()
def test_positions_are_those_of_the_pass(family):
    model = apply_lrsa(apply_lrsa(tiny_model(family), CONFIG), CONFIG)  # hooks are there once
    cache_of_padded_rows(model)
    ids = tokens(60, batch=2)
    positions = torch.cat([torch.arange(n) for n in (25, 35)])[None]
    packed = model(ids, position_ids=positions.expand(2, -1), use_cache=False).logits  # in two rows
    assert_close(packed[1, 25:], model(ids[1:, 25:], use_cache=False).logits[0], 1e-5, "logits")
    options = dict(max_new_tokens=8, do_sample=False)
    assert lrsa_ds.generate(model, ids, **options).tolist() == model.generate(ids, **options).tolist()
    model.set_attn_implementation("sdpa")
    assert_close(model(ids).logits, tiny_model(family)(ids).logits, 1e-6, "logits of the stock model")


def test_attention_to_an_encoder_is_not_trained():
    model = apply_lrsa(tiny_model("bart"), CONFIG)
    freeze_encoders(model)
    frozen = {name.split(".")[4] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder_attn", "encoder_attn_layer_norm"}
