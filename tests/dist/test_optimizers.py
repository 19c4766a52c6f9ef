"""`optim.name=adamw_8bit` under DeepSpeed on two ranks, and what it refuses."""

import sys

import pytest

from lrsa_ds.config import TrainConfig
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.settings.run import OptimConfig
from lrsa_ds.train.checkpoint import ResumePoint, check_resume, plain_settings
from tests.dist.test_launch import SHORT, refused
from tests.dist.test_parity import output_of

pytestmark = pytest.mark.dist


def test_states_of_8_bits_under_each_zero_stage(tmp_path):
    """A quarter of the bytes, nearly the steps of AdamW, and a checkpoint from which the run goes on exactly."""
    for stage, found in output_of("optimizer_worker.py", 2, tmp_path).items():
        assert found["bytes"] == pytest.approx(found["bytes_of_adamw"] / 4, rel=0.05), stage  # but for padding
        assert found["moved"] > 0.1 and found["distance"] < 0.05, (stage, found)
        assert found["resumed"], stage


def test_offload_and_a_missing_library_are_one_sentence(capfd, monkeypatch):
    command = ["+recipe=smoke", "optim=adamw_8bit", *SHORT]
    for key in ("zero.offload_optimizer", "zero.offload_param"):
        said = refused(capfd, monkeypatch, *command, f"{key}=cpu")
        assert "optim.name=adamw_8bit holds its states on the GPU" in said and "or optim.name=adamw." in said
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = refused(capfd, monkeypatch, *command)
    assert "optim.name=adamw_8bit needs bitsandbytes: pip install 'lrsa-ds[8bit]'" in said
    assert "choose one of adamw, adamw_8bit" in refused(capfd, monkeypatch, "+recipe=smoke", "optim.name=adam8")


def test_states_of_8_bits_belong_to_their_number_of_ranks(tmp_path):
    model = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")
    for name in ("adamw", "adamw_8bit"):
        config = TrainConfig(model=model, optim=OptimConfig(name=name))
        alone, shared = (ResumePoint(tmp_path, 3, {}, size, plain_settings(config), "rows") for size in (1, 2))
        assert check_resume(alone, config, "rows") is alone
        if name == "adamw":
            assert check_resume(shared, config, "rows") is shared
            continue
        with pytest.raises(LRSAError, match="that 2 ranks wrote, and 8-bit states cannot be resharded for 1: start"):
            check_resume(shared, config, "rows")
