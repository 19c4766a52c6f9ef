"""Every recipe and group composes into a `TrainConfig`, and every mistake is one sentence."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from launch.accelerator import PICKS, register_resolver
from launch.sentences import hydra_sentence
from lrsa_ds.config import TrainConfig, save_settings, typed_config
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import EvaluateConfig
from tests.helpers import ROOT

CONF = ROOT / "conf"
register_resolver()


def composed(*overrides) -> TrainConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed_config(compose("train", list(overrides)))


def test_the_evaluation_composes_to_the_defaults_of_the_code():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        ConfigStore.instance().store(name="evaluate_schema", node=EvaluateConfig)
        config = typed_config(compose("evaluate", ["model.name=some/model"]), EvaluateConfig)
        assert config == EvaluateConfig(model=config.model, data=config.data)
        with pytest.raises(LRSAError, match=r"cache.retention is not a key .*retentions.* Did you mean retentions\?"):
            typed_config(compose("evaluate", ["model.name=a/b", "+cache.retention=1"]), EvaluateConfig)


def sentence(*overrides) -> str:
    with pytest.raises((LRSAError, HydraException, OmegaConfBaseException)) as caught:
        composed(*overrides)
    return hydra_sentence(caught.value)


RECIPES = sorted(p.stem for p in (CONF / "recipe").glob("*.yaml"))
CHOICES = sorted(
    f"{p.parent.name}={p.stem}" for p in CONF.glob("*/*.yaml") if p.parent.name != "recipe" and p.stem != "default"
)
NEEDED = {
    "model=hub": ["model.name=some/model"],
    "data=hub": ["data.name=some/data"],
    "data=files": ["data.path=rows.jsonl"],
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_compose(recipe):
    config = composed(f"+recipe={recipe}")
    assert config.run_name == recipe


@pytest.mark.parametrize("choice", CHOICES)
def test_group_choices_compose(choice):
    optional = "+" if choice.startswith("sweep=") else ""
    composed(optional + choice, *NEEDED.get(choice, []))


def test_numbers_of_a_choice_are_the_defaults_of_the_code():
    """A default that is written twice must not drift apart."""
    code, files = TrainConfig(model=composed().model), composed()
    for group in ("parallel", "zero", "optim", "eval", "log", "checkpoint", "attention"):
        assert getattr(code, group) == getattr(files, group), group


def test_the_command_line_wins_over_a_recipe():
    config = composed("+recipe=qa_smollm2", "attention=dense", "optim.num_steps=7", "attention.lag_size=256")
    assert config.attention.kind == "dense" and config.optim.num_steps == 7 and config.attention.lag_size == 256
    assert composed("+recipe=qa_smollm2", "attention.retention=[0.5,1.0]").attention.retentions == [0.5, 1.0]


def test_mixed_retention_is_taken_in_turn():
    attention = composed("attention=lrsa_mixed").attention
    assert [attention.at_step(s).retention for s in range(5)] == [0.125, 0.125, 0.25, 1.0, 0.125]


def test_what_the_accelerator_decides_is_said(monkeypatch):
    PICKS.clear()
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    on_cpu = composed("+recipe=qa_smollm2")
    assert any("no GPU" in said and f"seq_len={on_cpu.seq_len}" in said for said in PICKS.values())
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert composed("+recipe=qa_smollm2").seq_len == 8192


def test_a_resolved_configuration_reads_back(tmp_path):
    from dataclasses import asdict

    config = composed("+recipe=smoke")
    save_settings(asdict(config), tmp_path / "config.yaml")
    assert typed_config(OmegaConf.load(tmp_path / "config.yaml")) == config


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["optim.lrr=1"], "optim.lrr is not a key of the configuration; valid here: lr, .* Did you mean lr?"),
        (["+optim.lrr=1"], "optim.lrr is not a key of the configuration; valid here: lr, "),
        (["+attention.typo=1"], "attention.typo is not a key .*sink_size, lag_size, retention"),
        (["sedd=1"], "sedd is not a key .* Did you mean seed?"),
        (["optm.lr=1"], "optm is not a key .* Did you mean optim?"),
        (["optim.num_steps=many"], "optim.num_steps: .*many"),
        (["optim.num_steps=1.5"], "optim.num_steps: .*1.5"),
        (["optim.num_steps=0"], "optim.num_steps=0 is not valid: give a whole number of at least 1"),
        (["attention.retention=0"], "attention.retention=0 .*above 0 and at most 1"),
        (["attention.retention=1.5"], "attention.retention=1.5 .*above 0 and at most 1"),
        (["attention.retention=[0.5,2]"], "attention.retention=2 "),
        (["attention.retention=[]"], r"attention.retention=\[\]"),
        (["attention.retention=some"], "attention.retention='some'"),
        (["attention.lag_size=0"], "attention.lag_size=0"),
        (["attention.lag_size=4"], "keeps nothing"),
        (["attention.sink_size=-1"], "attention.sink_size=-1"),
        (["attention.backend=fast"], "attention.backend='fast' .*auto, chunked, flex"),
        (["attention=dense", "attention.retention=0.5"], "no effect under dense attention"),
        (["attention=sparse"], "attention/sparse.*dense, lrsa"),
        (["+recipe=nothing"], "recipe/nothing.*qa_128k, qa_smollm2, smoke"),
        (["recipe=smoke"], r"\+recipe=smoke"),
        (["seq_len=8"], "seq_len=8"),
        (["zero.stage=4"], "zero.stage=4 .*1, 2, 3"),
        (["zero.stage=2", "zero.offload_param=cpu"], "zero.offload_param=cpu needs zero.stage=3"),
        (["parallel.sp_size=0"], "parallel.sp_size=0"),
        (["parallel.exchange=ring"], "parallel.exchange=.*ring.*kept, heads"),
        (["log.wandb=maybe"], "log.wandb='maybe' .*auto, online, offline, disabled"),
        (["data.path=rows.jsonl"], "add data=files"),
        (["data=files"], "data.path"),
        (["data.tasks=[signature,poem]"], "data.tasks='poem' .*signature, passkey, lookup"),
        (["data.context_length=9000"], "data.context_length=9000 is longer than seq_len=8192"),
        (["optim.warmup_steps=2000"], "optim.warmup_steps=2000 is more than optim.num_steps=1000"),
        (["model=hub"], "model.name"),
        (["optim.lr"], "optim.lr"),
    ],
)
def test_mistakes(overrides, said):
    import re

    text = sentence(*overrides)
    assert re.search(said, text), text
    assert "\n" not in text


def test_there_is_a_file_for_every_group_the_readme_names():
    readme = (ROOT / "README.md").read_text()
    for folder in sorted(p.name for p in Path(CONF).iterdir() if p.is_dir()):
        assert f"`{folder}`" in readme, folder
