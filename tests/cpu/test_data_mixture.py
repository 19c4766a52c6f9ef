"""Several sources: shares by weights, no row again before all others, and the same order from any place on."""

import json
import pickle
from collections import Counter
from itertools import islice

import pytest

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.mixture import open_rows, shares
from lrsa_ds.data.stream import TrainStream
from lrsa_ds.data.tokenizer import load_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.inputs import check_inputs
from lrsa_ds.settings.attention import AttentionConfig
from lrsa_ds.settings.data import DataConfig, SourceConfig
from lrsa_ds.settings.model import ModelConfig
from lrsa_ds.settings.run import EvalConfig
from recipes.qa import prepare

MODEL = ModelConfig(random={"model_type": "llama"}, tokenizer="bytes")


def write(path, name, count):
    rows = [{"prompt": "Say it " * (1 + i % 5), "completion": f"{name}{i}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def mixture(tmp_path, *weights, counts=(40, 20, 10), **settings):
    sources = [
        SourceConfig(path=write(tmp_path / f"{name}.jsonl", name, count), weight=weight)
        for name, count, weight in zip("abc", counts, weights)
    ]
    return DataConfig(source="mixture", sources=sources, **settings)


def config_of(data):
    attention = AttentionConfig(lag_size=16)
    return TrainConfig(model=MODEL, seq_len=128, attention=attention, data=data, eval=EvalConfig(num_examples=3))


def said(rows):
    return [row.content["completion"] for row in rows]


def test_without_weights_every_row_is_seen_once(tmp_path):
    rows = open_rows(mixture(tmp_path, None, None, None), 0, 6)
    held, first, second = said(rows.validation()), said(rows.epoch(0)), said(rows.epoch(1))
    everything = sorted(f"{name}{i}" for name, count in zip("abc", (40, 20, 10)) for i in range(count))
    assert sorted(held + first) == sorted(held + second) == everything and first != second
    assert Counter(text[0] for text in held) == {"a": 2, "b": 2, "c": 2}
    assert [row.index for row in rows.epoch(1)] == rows.order(1).tolist()
    assert len({row.index for row in [*rows.epoch(0), *rows.validation()]}) == 70
    assert said(pickle.loads(pickle.dumps(rows)).epoch(0)) == first


def test_a_source_has_its_own_number_of_validation_rows(tmp_path):
    data = mixture(tmp_path, 1, 1, 1)
    data.sources[1].num_validation = 5
    held = said(open_rows(data, 0, 6).validation())
    assert Counter(text[0] for text in held) == {"a": 2, "b": 5, "c": 2}


def test_weights_are_shares_of_the_rows(tmp_path):
    rows = open_rows(mixture(tmp_path, 3, 1, 2), 0, 6)
    epochs = [said(rows.epoch(epoch)) for epoch in range(6)]
    assert {len(epoch) for epoch in epochs} == {64} and rows.num_trained == 64
    assert all(Counter(text[0] for text in epoch) == {"a": 32, "b": 11, "c": 21} for epoch in epochs)
    for name, count in zip("abc", (37, 19, 8)):
        drawn = [text for epoch in epochs for text in epoch if text[0] == name]
        for start in range(0, len(drawn) - count, count):
            assert len(set(drawn[start : start + count])) == count, "all of a source, before any of it again"
    assert rows.order(0) is None
    for place in (0, 5, 63):
        assert said(rows.epoch(2, place)) == epochs[2][place:]
        assert rows.at(2, [place])[place].content["completion"] == epochs[2][place]


def test_shares():
    assert shares(10, [1, 1, 1]) == [4, 3, 3] and shares(0, [1, 2]) == [0, 0] and shares(7, [0.5, 3]) == [1, 6]


def test_a_mixture_goes_on_from_any_step(tmp_path):
    data = prepare(config_of(mixture(tmp_path, 3, 1, 2)), load_tokenizer(MODEL))
    whole = list(islice(iter(TrainStream(data, 3, 0, 1)), 12))
    assert whole[-1].position["epoch"] >= 1
    for num_done in (1, 4, 9):
        position = json.loads(json.dumps(whole[num_done - 1].position))
        for ours, theirs in zip(TrainStream(data, 3, 0, 1, position), whole[num_done:]):
            assert [s.input_ids.tolist() for s in ours.sequences] == [s.input_ids.tolist() for s in theirs.sequences]
    other = prepare(config_of(mixture(tmp_path, 3, 1, 1)), load_tokenizer(MODEL))
    assert other.fingerprint() != data.fingerprint()


def test_sources_that_cannot_be_mixed(tmp_path):
    for make, sentence in {
        "path and name": (lambda: SourceConfig(path="a", name="b"), "give path or name in each source"),
        "neither": (lambda: SourceConfig(weight=1), "give path or name in each source"),
        "no weight": (lambda: SourceConfig(path="a", weight=0), "weight=0 is not valid"),
        "no validation": (lambda: SourceConfig(path="a", num_validation=0), "num_validation=0 is not valid"),
        "some weights": (lambda: mixture(tmp_path, 1, None), "a weight in every source, or in none"),
        "streaming": (lambda: mixture(tmp_path, 1, 1, streaming=True), "data.streaming=true does not know"),
        "no sources": (lambda: DataConfig(source="mixture"), "data=mixture needs data.sources"),
        "unread": (lambda: DataConfig(sources=[SourceConfig(path="a")]), "data=mixture needs data.sources"),
        "a path beside": (lambda: mixture(tmp_path, 1, 1, path="x"), "data.path .* read only with data=files"),
    }.values():
        with pytest.raises(LRSAError, match=sentence):
            make()
    (tmp_path / "d.jsonl").write_text('{"prompt": "a"}\n')
    sources = [*mixture(tmp_path, 1, 1).sources, SourceConfig(path=str(tmp_path / "d.jsonl"), weight=1)]
    with pytest.raises(LRSAError, match=r"d.jsonl, line 1: completion is missing"):
        open_rows(DataConfig(source="mixture", sources=sources), 0, 2)


def test_sources_inside_the_output_directory_are_refused(tmp_path):
    inside = write(tmp_path / "a.jsonl", "a", 4)
    outside = str(tmp_path.parent / "elsewhere.jsonl")
    for data in (
        DataConfig(source="files", path=[outside, inside]),
        DataConfig(source="mixture", sources=[SourceConfig(path=outside), SourceConfig(path=[inside])]),
        DataConfig(source="mixture", sources=[SourceConfig(path=outside, validation_path=inside)]),
    ):
        with pytest.raises(LRSAError, match=r"data.(validation_)?path='.*a.jsonl' lies in output_dir="):
            check_inputs(tmp_path, MODEL, data)
