"""The tables of kernels and of strategies: what their entries say of themselves is all that other code goes by."""

import ast

import pytest
import torch

from lrsa_ds import LRSAConfig, lrsa_attention
from lrsa_ds.attention.chunked import chunked_attention
from lrsa_ds.attention.kernels.interval import interval_attention
from lrsa_ds.attention.kernels.kernel import Kernel, choose_kernel
from lrsa_ds.attention.partition import partition_table
from lrsa_ds.errors import LRSAError
from lrsa_ds.registry import EXCHANGES, KERNELS, SELECTION_RULES
from lrsa_ds.settings.run import ParallelConfig
from tests.cpu.test_attention import assert_same_function, random_qkv
from tests.helpers import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def newest():
    """A kernel from outside, for a CPU, fp32 and one head dim, without a gradient through its log-sum-exp."""
    kernel = Kernel(
        attend=interval_attention, devices=("cpu",), dtypes=(torch.float32,), head_dims=(16,), has_lse_gradient=False
    )
    KERNELS.add("newest", kernel)
    yield kernel
    del KERNELS._entries["newest"]


def test_a_kernel_is_chosen_by_its_traits(newest):
    """auto takes the last one of the table that can; a short document needs none."""
    config = LRSAConfig(sink_size=3, lag_size=8)
    assert choose_kernel(config, CPU, torch.float32, 16) is newest
    for settings in (
        dict(dtype=torch.bfloat16, head_dim=16),
        dict(dtype=torch.float32, head_dim=32),
        dict(dtype=torch.float32, head_dim=16, needs_lse_gradient=True),
        dict(dtype=torch.float32, head_dim=16, has_history=False),
    ):
        assert choose_kernel(config, CPU, **settings) is KERNELS["chunked"]
    inputs = random_qkv(90)
    expected = chunked_attention(*inputs, partition_table((90,), config))
    assert_same_function(lrsa_attention(*inputs, config), expected, inputs, 1e-5)


@pytest.mark.parametrize(
    "backend,settings,said",
    [
        (
            "newest",
            dict(dtype=torch.float16),
            r"newest is not possible: it computes in float32, not in float16",
        ),
        ("newest", dict(head_dim=64), r"head dims 16 are supported, not 64; use auto, chunked"),
        ("newest", dict(needs_lse_gradient=True), r"no gradient through the log-sum-exp"),
        (
            "flex",
            {},
            r"backend=flex is not possible: it needs a CUDA device, and this is cpu; use auto, chunked",
        ),
        ("fa4", {}, r"attention.backend=fa4 is not possible: it needs a CUDA device"),
    ],
)
def test_a_kernel_that_cannot(backend, settings, said, newest):
    settings = dict(dtype=torch.float32, head_dim=16) | settings
    with pytest.raises(LRSAError, match=said):
        choose_kernel(LRSAConfig(backend=backend), CPU, **settings)


def test_flex_attention_needs_16_dimensions():
    gpu = torch.device("cuda")
    assert KERNELS["flex"].why_not(gpu, torch.float32, 12) == "head dims from 16 on are supported, not 12"
    assert KERNELS["flex"].why_not(gpu, torch.float32, 16) is None


def test_names_of_earlier_releases():
    assert ParallelConfig().exchange == ParallelConfig(exchange="kept").exchange == "gather_kept"
    assert ParallelConfig(exchange="heads").exchange == "head_groups"
    for name in ("ring", None, 3):
        with pytest.raises(LRSAError, match=r"choose one of gather_kept, head_groups \(formerly kept, heads\)"):
            ParallelConfig(exchange=name)
    with pytest.raises(LRSAError, match="exists already"):
        EXCHANGES.add("kept", object())


@pytest.mark.parametrize("name,stretches", [("gather_kept", [0, 1, 2, 2, 1, 0]), ("head_groups", [0, 1, 2])])
def test_who_holds_which_tokens(name, stretches):
    strategy = EXCHANGES[name]
    assert list(strategy.owners(3)) == stretches and strategy.num_stretches == len(stretches) // 3
    length = 60 // len(stretches)
    held = [part for rank in range(3) for part in strategy.local_tokens(60, 3, rank)]
    assert sorted((part.start, part.stop) for part in held) == [(i, i + length) for i in range(0, 60, length)]
    order = strategy.token_order(60, 3, CPU)
    if name == "head_groups":
        assert order is None
    else:
        assert torch.equal(order[0], torch.cat([torch.arange(60)[part] for part in held]))
        assert torch.equal(order[0][order[1]], torch.arange(60))


def test_no_other_code_compares_with_a_name_of_a_table():
    """The name "chunked" is also a way to prefill, of which `evaluate` speaks."""
    names = {*KERNELS, *EXCHANGES, *EXCHANGES._former, *SELECTION_RULES} - {"chunked"}
    found = []
    for package in ("lrsa_ds", "launch", "recipes"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Compare):
                    constants = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)}
                    found += [f"{path.relative_to(ROOT)}:{node.lineno}" for _ in constants & names]
    assert not found
