"""The LM evaluation harness over LRSA: its figures are those of the attention and of the cache."""

import json
import sys

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from launch import harness
from lrsa_ds import LRSAConfig, apply_lrsa
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.harness import LRSAModel
from lrsa_ds.models.generation import generate
from tests.cpu.test_model import tiny

TOKENIZER = byte_tokenizer()
CONFIG = LRSAConfig(sink_size=4, lag_size=16, retention=0.25)
TEXTS = ["A first text, long enough to be compressed." * 4, "Another one, which is not of the same length." * 3]
END = " the end"


@pytest.fixture
def model():
    torch.manual_seed(5)
    return tiny("llama", vocab_size=len(TOKENIZER), max_position_embeddings=512)


def make_harness(model, **settings):
    return LRSAModel(model, tokenizer=TOKENIZER, batch_size=2, **settings)


def requests(kind, arguments):
    return [Instance(kind, {}, each, index) for index, each in enumerate(arguments)]


def log_likelihood(model, ids, config):
    """Of the end of the text."""
    logits = model(ids, use_cache=False, lrsa_config=config).logits[0, -len(END) - 1 : -1].log_softmax(-1)
    return logits.gather(1, ids[0, -len(END) :, None]).sum().item()


@torch.no_grad()
def test_log_likelihoods_are_those_of_lrsa_attention(model):
    under_test = make_harness(model, retention=0.25, sink_size=4, lag_size=16)
    found = under_test.loglikelihood(requests("loglikelihood", [(text, END) for text in TEXTS]), disable_tqdm=True)
    for text, (score, _) in zip(TEXTS, found, strict=True):
        ids = torch.tensor([TOKENIZER(text + END, add_special_tokens=False).input_ids])
        expected, dense = (log_likelihood(model, ids, config) for config in (CONFIG, CONFIG.at_retention(1.0)))
        assert score == pytest.approx(expected, abs=1e-3)
        assert abs(dense - expected) > 1e-3


def test_answers_are_generated_behind_the_cache(model):
    """Two prompts of different lengths in one batch; the settings are those of the training."""
    apply_lrsa(model, CONFIG)
    under_test = make_harness(model)
    assert model.config.lrsa["retention"] == 0.25
    options = {"until": [], "max_gen_toks": 8, "do_sample": False}
    said = under_test.generate_until(requests("generate_until", [(text, options) for text in TEXTS]), disable_tqdm=True)
    for text, answer in zip(TEXTS, said, strict=True):
        ids = torch.tensor([TOKENIZER(text, add_special_tokens=False).input_ids])
        alone = generate(model, ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert answer == TOKENIZER.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize(
    "settings,said",
    [
        ({}, "was saved without LRSA settings: give retention"),
        ({"retention": 2.0}, "retention=2.0 "),
        ({"retention": 0.5, "lag_size": 0}, "cache.lag_size=0"),
        ({"retention": 0.5, "selection": "guess"}, "selection='guess'"),
    ],
)
def test_mistakes(model, settings, said):
    with pytest.raises(LRSAError, match=said):
        make_harness(model, **settings)


TASK = """
task: ends
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
output_type: generate_until
test_split: test
doc_to_text: "{{text}}"
doc_to_target: "{{end}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 4, do_sample: false}
metric_list: [{metric: exact_match}]
"""


def test_the_class_is_made_from_the_arguments_of_the_command(model, tmp_path):
    apply_lrsa(model, CONFIG).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    named = get_model("lrsa").create_from_arg_string(f"pretrained={tmp_path},retention=0.125", {"device": "cpu"})
    assert isinstance(named, LRSAModel)
    assert named.model.config.lrsa == CONFIG.at_retention(0.125).saved()


@pytest.mark.slow
def test_the_command_runs_a_task(model, tmp_path, monkeypatch, capsys):
    model.save_pretrained(tmp_path / "model")
    TOKENIZER.save_pretrained(tmp_path / "model")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text, "end": "x"}) + "\n" for text in TEXTS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/ends.yaml").write_text(TASK % rows)
    arguments = f"--model lrsa --model_args pretrained={tmp_path}/model,retention=0.25,sink_size=4,lag_size=16"
    arguments += f" --tasks ends --include_path {tmp_path}/tasks --device cpu --batch_size 2"
    monkeypatch.setattr(sys, "argv", ["harness.py", *arguments.split()])
    assert harness.main() == 0
    assert "ends" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", [word.replace("retention=0.25", "retention=7") for word in sys.argv])
    assert harness.main() == 2
    assert "error: retention=7" in capsys.readouterr().err
