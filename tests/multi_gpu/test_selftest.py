"""Sequence parallelism on NCCL leaves the training as it is."""

import pytest

from tests.dist.launcher import run
from tests.helpers import free_port

pytestmark = pytest.mark.gpu(devices=2)


@pytest.mark.parametrize(
    "attention,exchange", [("lrsa", "gather_kept"), ("lrsa", "head_groups"), ("dense", "gather_kept")]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_selftest_on_two_gpus(attention, exchange, dtype):
    retention = [] if attention == "dense" else ["attention.retention=0.125"]
    port = ["--master_port", str(free_port())]
    settings = ["+recipe=smoke", f"attention={attention}", "attention.lag_size=64", *retention, "parallel.sp_size=2"]
    settings.append(f"parallel.exchange={exchange}")
    done = run(["deepspeed", "--num_gpus", "2", *port, "launch/selftest.py", *settings, f"model.dtype={dtype}"], 500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed: " in done.stdout
