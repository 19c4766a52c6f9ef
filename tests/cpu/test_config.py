"""Every recipe and group composes into a `TrainConfig`, and every mistake is one sentence."""

from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from docs import keys
from launch.cli.accelerator import PICKS, register_resolver
from launch.cli.checkout import check_fetched, register_checkout
from launch.cli.schema import register_schema
from launch.cli.sentences import hydra_sentence
from lrsa_ds import LRSAConfig
from lrsa_ds.attention.partition import cache_factor
from lrsa_ds.config import TrainConfig, save_settings, typed_config
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.settings.caches import caches_of
from lrsa_ds.settings.data import DataConfig, SourceConfig
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.settings.run import ObjectiveConfig
from tests.helpers import ROOT

CONF = ROOT / "conf"
register_resolver()
register_checkout()
register_schema("train", TrainConfig)
register_schema("evaluate", EvaluateConfig)


def composed(*overrides) -> TrainConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed_config(compose("train", list(overrides)))


def test_the_evaluation_composes_to_the_defaults_of_the_code():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = typed_config(compose("evaluate", ["model.name=some/Qwen2.5-7B"]), EvaluateConfig)
        named = EvaluateConfig(model=config.model, data=config.data, run_name="evaluate-Qwen2.5-7B")
        assert config == named
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
    "data=mixture": ["data.sources=[{path: rows.jsonl}]"],
}


NEEDED_BY_RECIPE = {"qa_passages": ["data.path=rows.jsonl"]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_compose(recipe):
    config = composed(f"+recipe={recipe}", *NEEDED_BY_RECIPE.get(recipe, []))
    attention = "layers" if config.attention.layers else "0.125"
    assert config.run_name.startswith(f"{recipe}-lrsa-{attention}-")


def test_the_small_model_takes_its_caches_in_turn():
    """Dense, nine, six and three dense layers of 30; dense tuning is evaluated under the same caches."""
    runs = [composed("+recipe=qa_smollm2", *more) for more in ([], ["attention=dense"])]
    runs.append(composed("+recipe=qa_passages", "data.path=rows.jsonl"))
    caches = [caches_of(run.attention, run.eval, 30) for run in runs]
    names = ["dense", "9 dense + 21 window", "6 dense + 24 window", "3 dense + 27 window"]
    assert all([cache.name for cache in each] == names for each in caches)
    assert runs[0].attention.resolved(30).turns == [cache.config for cache in caches[0]]
    factors = [[cache_factor([8192], cache.config) for cache in each] for each in caches]
    assert factors[0] == factors[1] == factors[2]
    assert 8.7 < cache_factor([8192], caches[0][-1].config) < 8.8
    uniform = composed("+recipe=qa_smollm2", "attention=lrsa", "eval.layers=[]")
    assert [cache.name for cache in caches_of(uniform.attention, uniform.eval, 30)] == ["dense"]
    assert uniform.attention.turns == [LRSAConfig(lag_size=128)]


@pytest.mark.parametrize(
    "overrides,name",
    [
        ([], "SmolLM2-135M-Instruct-lrsa-0.125-8192"),
        (["attention=dense"], "SmolLM2-135M-Instruct-dense-8192"),
        (["attention=lrsa_mixed", "seq_len=4096"], "SmolLM2-135M-Instruct-lrsa-mixed-4096"),
        (["model=hub", "model.name=Qwen/Qwen2.5-7B"], "Qwen2.5-7B-lrsa-0.125-8192"),
        (["model=hub", "model.name=outputs/mine/2026-11-25_18-00-00/model"], "mine-lrsa-0.125-8192"),
        (["model=hub", "model.name=/data/best"], "data-lrsa-0.125-8192"),
        (["model=tiny_qwen2", "attention.retention=0.5"], "qwen2-lrsa-0.5-8192"),
        (["+recipe=smoke", "attention=dense"], "smoke-dense-1024"),
        (["+recipe=smoke", "run_name=mine"], "mine"),
    ],
)
def test_runs_are_named_by_what_they_do(overrides, name):
    assert composed(*overrides).run_name == name


@pytest.mark.parametrize("choice", CHOICES)
def test_group_choices_compose(choice):
    optional = "+" if choice.startswith("sweep=") else ""
    composed(optional + choice, *NEEDED.get(choice, []))


def test_numbers_of_a_choice_are_the_defaults_of_the_code():
    """A default that is written twice must not drift apart: every key of every group that a run has by default."""
    files = composed()
    code = TrainConfig(model=files.model, run_name=files.run_name)
    for key, value in asdict(files).items():
        assert asdict(code)[key] == value, key
    assert LRSAConfig() == files.attention.at_step(0)


@pytest.mark.parametrize(
    "overrides,group,code",
    [
        (["model=hub", "model.name=some/model"], "model", ModelConfig(name="some/model")),
        (["data=hub", "data.name=some/data"], "data", DataConfig(source="hub", name="some/data")),
        (["data=files", "data.path=a.jsonl"], "data", DataConfig(source="files", path="a.jsonl")),
        (["data=mixture", "data.sources=[{path: a}]"], "data",
         DataConfig(source="mixture", sources=[SourceConfig(path="a")])),
        (["objective=distill"], "objective", ObjectiveConfig(kind="distill")),
    ],
)  # fmt: skip
def test_numbers_of_other_choices_are_the_defaults_of_the_code_too(overrides, group, code):
    assert getattr(composed(*overrides), group) == code


def keys_of_kind(schema, kind, prefix=""):
    """Every key below a dataclass whose type is a dict or a list, optional or not."""
    for field in fields(schema):
        key = prefix + field.name
        if is_dataclass(field.type):
            yield from keys_of_kind(field.type, kind, f"{key}.")
        elif kind in {get_origin(field.type), *map(get_origin, get_args(field.type))}:
            yield key


SCHEMAS = {"train": TrainConfig, "evaluate": EvaluateConfig}
DICTIONARIES = [(name, key) for name, schema in SCHEMAS.items() for key in keys_of_kind(schema, dict)]
LISTS = [(name, key) for name, schema in SCHEMAS.items() for key in keys_of_kind(schema, list)]


@pytest.mark.parametrize("name,key", DICTIONARIES)
def test_every_dictionary_can_be_set_from_the_command_line(name, key):
    """As a whole, one key of it, and one key of a dictionary in it; with and without Hydra's plus."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for override, expected in (
            (f"{key}={{one: 1, two-: 2}}", {"one": 1, "two-": 2}),
            (f"{key}.one=1", {"one": 1}),
            (f"+{key}.one=1", {"one": 1}),
            (f"++{key}={{one: 1}}", {"one": 1}),
        ):
            found = OmegaConf.to_container(OmegaConf.select(compose(name, [override]), key))
            assert {k: int(v) for k, v in found.items()} == expected, override


@pytest.mark.parametrize("name,key", LISTS)
def test_every_list_can_be_set_from_the_command_line(name, key):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for override, expected in ((f"{key}=[1,2]", ["1", "2"]), (f"{key}=[]", [])):
            found = OmegaConf.select(compose(name, [override]), key)
            assert [f"{value:g}" if isinstance(value, float) else str(value) for value in found] == expected


@pytest.mark.parametrize(
    "overrides,key,expected",
    [
        (["data=files", "data.path=x", "data.columns={context: passage, answer: 'the answer'}"], "data.columns",
         {"context": "passage", "answer": "the answer"}),
        (["data=files", "data.path=x", "data.columns.context=passage"], "data.columns", {"context": "passage"}),
        (["model=tiny_qwen2", "model.random.rope_parameters={rope_type: default, rope_theta: 1e4}"],
         "model.random.rope_parameters", {"rope_type": "default", "rope_theta": 1e4}),
        (["model=tiny_qwen2", "model.random.head_dim=8"], "model.random.head_dim", 8),
        (["model=tiny_qwen2", "model.random={num_hidden_layers: 4}"], "model.random.vocab_size", 320),
        (["model=hub", "model.name=null", "model.tokenizer=bytes", "model.random={model_type: llama}"],
         "model.random", {"model_type": "llama"}),
        (["model=hub", "model.name=null", "model.tokenizer=bytes", "model.random.model_type=llama"],
         "model.random", {"model_type": "llama"}),
        (["data=files", "data.path=[a.jsonl,my/*.jsonl]"], "data.path", ["a.jsonl", "my/*.jsonl"]),
        (["attention.retention=[0.5,1.0]"], "attention.retention", [0.5, 1.0]),
        (["eval.retentions=[0.5]"], "eval.retentions", [0.5]),
        (["eval.retentions.1=0.75"], "eval.retentions", [1.0, 0.75, 0.25, 0.125]),
        (["data.tasks=[lookup,passkey]"], "data.tasks", ["lookup", "passkey"]),
        (["model.freeze=['lm_head|embed']"], "model.freeze", ["lm_head|embed"]),
        (["log.profile_steps=[3,5]", "log={tags: [a, b]}"], "log.tags", ["a", "b"]),
        (["model.lora={rank: 2}"], "model.lora.rank", 2),
    ],
)  # fmt: skip
def test_dictionaries_and_lists_reach_the_typed_configuration(overrides, key, expected):
    value = asdict(composed(*overrides))
    for name in key.split("."):
        value = value[name]
    assert value == expected


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


def test_the_default_model_is_that_of_the_checkout_wherever_one_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = composed().model
    assert Path(model.name) == ROOT / "models" / "SmolLM2-135M-Instruct"
    model.gguf_file = "not-fetched.gguf"
    with pytest.raises(LRSAError, match=rf"not-fetched.gguf is not there; `make setup` in {ROOT} fetches it"):
        check_fetched(model)
    for name in ("some/model", "models/mine", None):
        model.name = name
        check_fetched(model)


def test_a_resolved_configuration_reads_back(tmp_path):
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
        (["attention.retention=-1"], "attention.retention=-1 .*from 0 .* to 1"),
        (["attention.retention=1.5"], "attention.retention=1.5 .*from 0 .* to 1"),
        (["attention.retention=[0.5,2]"], "attention.retention=2 "),
        (["attention.retention=[]"], r"attention.retention=\[\]"),
        (["attention.retention=some"], "attention.retention='some'"),
        (["attention.lag_size=0"], "attention.lag_size=0"),
        (["attention.lag_size=4"], "keeps nothing"),
        (["attention.sink_size=-1"], "attention.sink_size=-1"),
        (["attention.backend=fast"], "attention.backend='fast' .*auto, chunked, flex"),
        (["attention.selection=best"], "attention.selection='best' .*lagkv, key_norm, random, window"),
        (["attention.value_weight=-1"], "attention.value_weight=-1.0 .*at least 0"),
        (["attention.selection=random", "attention.value_weight=2"], "value_weight=2.0 has no effect"),
        (["attention=dense", "attention.retention=0.5"], "no effect under dense attention"),
        (["attention=sparse"], "attention/sparse.*dense, lrsa"),
        (["+recipe=nothing"], "recipe/nothing.*lora_8b_1gpu, qa_128k, qa_128k_1gpu"),
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
        (["seq_len=2064"], "seq_len=2064 .*= 2064 tokens .*at least 2065, attention.lag_size of at most 1023, or att"),
        (["data.context_length=300"], "data.context_length=300 .*at least 2065, .*of at most 141, or attention=dense"),
        (["seq_len=64", "attention.sink_size=64"], "seq_len=64 .*give at least 2113, or attention=dense"),
        (["attention=lrsa_mixed", "attention.lag_size=4096"], "seq_len=8192 .*at least 8209, .*at most 4087"),
        (["optim.warmup_steps=2000"], "optim.warmup_steps=2000 is more than optim.num_steps=1000"),
        (["model=hub"], "model.name"),
        (["optim.lr"], "optim.lr"),
        (["data.colums={context: passage}"], "data.colums is not a key .* Did you mean columns?"),
        (["data.columns={contxt: passage}"], "data.columns='contxt' .*messages, .*prompt"),
        (["data.columns={context: {a: b}}"], "data.columns={context: .* name of a column"),
        (["data.columns.context.x=1"], "data.columns.context: .*write 'data.columns={key: value}'"),
        (["data.columns=[context]"], "data.columns: .*write 'data.columns={key: value}'"),
        (["data.columns=null"], "data.columns: .*write 'data.columns={key: value}'"),
        (["data=mixture", "data.sources=[{pth: a}]"], "data.sources: key='pth' .*path, validation_path, name"),
        (["data=mixture", "data.sources=[{path: a, weight: x}]"], "data.sources: weight: .*'x'"),
        (["data=mixture", "data.sources=[3]"], "data.sources: 3 is not valid: give objects"),
        (["data=mixture", "data.sources=[]"], "data=mixture needs data.sources"),
        (["data.too_long=keep"], "data.too_long='keep' .*cut, drop, error"),
        (["optim.num_epochs=0"], "optim.num_epochs=0.0 is not valid"),
        (["eval.retentions=0.5"], r"eval.retentions: .*write 'eval.retentions=\[value,value\]'"),
        (["eval.retentions=[some]"], r"eval.retentions\[0\]: .*write 'eval.retentions=\["),
        (["log.tags={a: b}"], r"log.tags: .*write 'log.tags=\["),
        (["model.lora={rnk: 2}"], "model.lora.rnk is not a key .* Did you mean rank?"),
        (["+log={tagz: [a]}"], "log.tagz is not a key .* Did you mean tags?"),
    ],
)
def test_mistakes(overrides, said):
    import re

    text = sentence(*overrides)
    assert re.search(said, text), text
    assert "\n" not in text


@pytest.mark.parametrize(
    "overrides",
    [
        ["seq_len=2065"],
        ["seq_len=2064", "attention=dense"],
        ["seq_len=2064", "attention.retention=1.0"],
        ["seq_len=300", "attention.lag_size=141"],
        ["data.context_length=2065"],
    ],
)
def test_documents_that_lrsa_compresses_are_long_enough(overrides):
    composed(*overrides)


def test_there_is_a_file_for_every_group_the_readme_names():
    readme = (ROOT / "README.md").read_text()
    for folder in sorted(p.name for p in Path(CONF).iterdir() if p.is_dir()):
        assert f"`{folder}`" in readme, folder


def test_the_page_of_all_keys_is_that_of_the_settings():
    assert keys.PAGE.read_text() == keys.page(), "run python docs/keys.py"
