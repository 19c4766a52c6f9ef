"""Selection beside that of NVIDIA kvpress, which needs an older transformers and so an environment of its own.

`make kvpress` installs it and runs this test; elsewhere it is skipped.
"""

import os
import subprocess

import pytest
import torch

from lrsa_ds import LRSAConfig, select_kept

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
