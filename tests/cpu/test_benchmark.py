"""What the benchmarks count and draw, and the one that runs without a GPU."""

import csv
import subprocess
import sys
from argparse import Namespace

import pytest
import torch

from benchmarks.attention_methods import NSA_BLOCK, _blocks, blocks_a_query
from benchmarks.generation import decoding_rows
from launch.benchmark import attention_methods
from lrsa_ds import LRSAConfig
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.errors import LRSAError
from tests.helpers import ROOT

CONFIG = LRSAConfig(sink_size=16, lag_size=1024, retention=0.125)


def test_pairs_are_those_of_the_chunks():
    table = partition_table((3000, 5, 9000), CONFIG)
    counted = sum(c.hist_hi - c.hist_lo + query + 1 - c.win_lo for c in table.chunks for query in range(c.q_lo, c.q_hi))
    assert table.num_pairs == counted


@pytest.mark.parametrize("num_tokens", [4096, 16384])
def test_blocks_of_native_sparse_attention_make_as_many_pairs(num_tokens):
    table = partition_table((num_tokens,), CONFIG)
    blocks, mask = _blocks(table, 2, torch.device("cpu"))
    assert blocks.shape == mask.shape == (1, 2, num_tokens, blocks_a_query(table))
    before = torch.arange(num_tokens)[:, None] // NSA_BLOCK
    assert (blocks[mask] < before.expand(blocks.shape)[mask]).all()
    assert mask[0, 0].sum() * NSA_BLOCK == pytest.approx(table.num_pairs, rel=0.05)


def test_methods_are_chosen_by_name():
    options = Namespace(heads=[4, 2, 64], retention=[0.125], sink_size=16, lag_size=64, methods=["LRSA flex"])
    assert [name for name, _, _ in attention_methods(options, 1024, torch.device("cpu"))] == ["LRSA flex"]
    options.methods.append("LRSA fa9")
    with pytest.raises(LRSAError, match=r"--methods='LRSA fa9' is not valid: choose one of dense cuDNN, .*LRSA flex"):
        attention_methods(options, 1024, torch.device("cpu"))


def test_picture_of_times(tmp_path):
    names = ["device", "heads", "sink_size", "lag_size", "num_tokens", "method", "num_kept", "what", "ms_p50"]
    with (tmp_path / "attention.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        for method, kept, factor in (("dense cuDNN", "", 8), ("LRSA flex", 128, 2)):
            for num_tokens in (8192, 32768):
                row = ["a GPU", "[32, 8, 128]", 16, 1024, num_tokens, method, kept, "forward+backward", factor]
                writer.writerow(row)
    picture = tmp_path / "attention.png"
    command = [sys.executable, "benchmarks/plot.py", str(tmp_path / "attention.csv"), str(picture)]
    subprocess.run(command, cwd=ROOT, check=True)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_generation_is_timed(tmp_path):
    command = [sys.executable, "launch/benchmark.py", "generation", "--model", "tiny", "--lag-size", "64"]
    command += ["--num-tokens", "1024", "--retention", "0.125", "--csv", str(tmp_path / "rows.csv")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with (tmp_path / "rows.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["what"]) for row in rows] == [
        ("dense", "prefill"),
        ("LRSA", "prefill"),
        ("dense", "decode one token"),
        ("LRSA", "decode one token"),
    ]
    dense, compressed = (float(row["cache_gb"]) for row in rows[2:])
    assert compressed < dense / 3


def test_tokens_of_generate_are_timed(tmp_path):
    options = Namespace(model="tiny", retention=[0.125], sink_size=16, lag_size=64, streams=[1, 2])
    options.liger, options.compiled, options.compile = False, True, False
    rows = []
    decoding_rows(options, 512, torch.device("cpu"), lambda *row: rows.append(row))
    names = [(method, config and config.num_kept, what) for method, config, what, _ in rows]
    assert names == [
        (method, kept, what)
        for what in ("token, 1 stream", "token, 2 streams")
        for method, kept in (("dense", None), ("LRSA", 8), ("transformers", None), ("compiled", None))
    ]
    dense, compressed, stock = (values["cache_gb"] for *_, values in rows[:3])
    assert compressed < stock / 2 < dense and all(values["ms_p50"] > 0 for *_, values in rows)
