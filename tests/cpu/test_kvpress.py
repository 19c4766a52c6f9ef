"""Selection and press beside NVIDIA kvpress, which needs an older transformers and so an environment of its own.

`make kvpress` installs it and runs this test; elsewhere it is skipped.
"""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from lrsa_ds import LRSAConfig, kvpress_press, select_kept
from lrsa_ds.errors import LRSAError

ROOT = Path(__file__).resolve().parents[2]
PYTHON = os.environ.get("LRSA_KVPRESS_PYTHON")
SCRIPT = """
import sys, torch
from kvpress import LagKVPress
cases = torch.load(sys.argv[1], weights_only=True)
for case in cases:
    press = LagKVPress(compression_ratio=0.5, n_sink=case["sink_size"], lag_size=case["lag_size"])
    case["score"] = press.score(None, None, case["k"], case["v"], None, {})
torch.save(cases, sys.argv[1])
"""


PRESS = """
import torch
from kvpress import KVPressTextGenerationPipeline
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
import lrsa_ds
from lrsa_ds.data.tokenizer import byte_tokenizer
sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=300, max_position_embeddings=1024, **sizes)).eval()
config = lrsa_ds.LRSAConfig(sink_size=4, lag_size=32, retention=0.25)
lrsa_ds.apply_lrsa(model, config, layers={0: 1.0, 1: {"retention": 0.5, "selection": "key_norm"}, 2: None})
model.set_attn_implementation("sdpa")  # as from_pretrained loads a trained model
ids = torch.randint(0, 250, (2, 333))
for retention in (None, 0.0, 0.125):
    press = lrsa_ds.kvpress_press(model, retention)
    full, pressed = DynamicCache(), DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=full)
        with press(model):
            model(ids, past_key_values=pressed)
    kept = lrsa_ds.LagKVCache.from_dense(full, press.config)
    lengths = [layer.keys.shape[2] for layer in pressed.layers]
    assert lengths[0] == 333 > lengths[1] >= lengths[2], lengths
    for ours, theirs in zip(kept.layers, pressed.layers):
        assert torch.equal(ours.keys, theirs.keys) and torch.equal(ours.values, theirs.values)
    assert abs(press.compression_ratio - (1 - press.config.share_kept)) < 1e-9
press = lrsa_ds.kvpress_press(config)
pipe = KVPressTextGenerationPipeline(model=model, tokenizer=byte_tokenizer())
said = pipe("a long text " * 30, question="What?", answer_prefix=" It is", press=press, max_new_tokens=4)
assert isinstance(said["answer"], str)
"""


@pytest.mark.skipif(PYTHON is None, reason="needs kvpress in an environment of its own: make kvpress")
def test_a_press_keeps_what_the_cache_keeps():
    subprocess.run([str(PYTHON), "-c", PRESS], check=True, timeout=250, env=os.environ | {"PYTHONPATH": str(ROOT)})


def test_a_press_says_what_it_needs():
    """kvpress is not installed beside the transformers that training needs."""
    with pytest.raises(LRSAError, match=r"kvpress_press needs NVIDIA kvpress .*pip install kvpress, in an environment"):
        kvpress_press(LRSAConfig())


@pytest.mark.skipif(PYTHON is None, reason="needs kvpress in an environment of its own: make kvpress")
def test_the_same_are_kept_as_by_kvpress(tmp_path):
    cases = []
    for sink_size, lag_size, num_tokens in [(4, 128, 1000), (16, 64, 640), (0, 32, 333), (7, 100, 207)]:
        k, v = torch.randn(2, 2, 3, num_tokens, 32).unbind()
        cases.append(dict(sink_size=sink_size, lag_size=lag_size, k=k, v=v))
    torch.save(cases, tmp_path / "cases.pt")
    subprocess.run([PYTHON, "-c", SCRIPT, str(tmp_path / "cases.pt")], check=True, timeout=250)
    for case in torch.load(tmp_path / "cases.pt", weights_only=True):
        sink_size, lag_size = case["sink_size"], case["lag_size"]
        for num_kept in (1, lag_size // 4, lag_size - 1):
            config = LRSAConfig(sink_size=sink_size, lag_size=lag_size, retention=num_kept / lag_size)
            kept = select_kept(case["k"], case["v"], config)
            # kvpress gives the tokens of a partition their rank as a score, the best last.
            theirs = case["score"][:, :, sink_size : sink_size + kept.shape[2] * lag_size].unflatten(2, (-1, lag_size))
            best = theirs.topk(config.num_kept, dim=-1).indices.sort(dim=-1).values
            starts = sink_size + lag_size * torch.arange(kept.shape[2])
            assert torch.equal(kept, best + starts[:, None])
