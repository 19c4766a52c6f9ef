"""The trainer under DeepSpeed on several ranks gives the loss and the gradients of plain torch on one."""

import json

import pytest

from tests.helpers import ROOT, run_ranks

pytestmark = pytest.mark.dist
WORKER = ROOT / "tests/dist/parity_worker.py"


def measured(world_size, *options):
    # The launcher and DeepSpeed may print to stdout too; the worker's object is the last line.
    return json.loads(run_ranks(WORKER, world_size, *options)[0].strip().splitlines()[-1])


@pytest.mark.parametrize(
    "world_size,options",
    [
        (1, ["--micro-batch", 2]),
        (2, ["--micro-batch", 1, "--tied", "--checkpointing"]),
        (2, ["--micro-batch", 2, "--family", "llama", "--checkpointing"]),
        (4, ["--kv-heads", 1, "--checkpointing"]),
        (2, ["--stage", 2, "--tied"]),
        (2, ["--stage", 1, "--micro-batch", 2]),
    ],
)
def test_loss_and_gradients(world_size, options):
    result = measured(world_size, *options)
    assert result["loss_error"] < 1e-6
    assert result["worst_gradient"][0] < 1e-5, result
    assert result["norm_error"] < 1e-5
    assert result["num_tokens"] == 160 + 70 + 50 + 31 + 110 + 45 + 155
    assert result["num_target_tokens"] == 100


def test_a_wrong_scale_is_seen():
    result = measured(2, "--break-scale")
    assert result["worst_gradient"][0] > 0.5 and result["norm_error"] > 0.5
