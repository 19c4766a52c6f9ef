"""What is said of how much LRSA compresses."""

import pytest

from lrsa_ds.attention.partition import cache_factor, num_held
from lrsa_ds.compression import Compression, held_sentence, short_documents_sentence
from lrsa_ds.labels import factor_name, retention_name
from lrsa_ds.lrsa_config import LRSAConfig
from tests.helpers import ROOT

CONFIG = LRSAConfig(sink_size=16, lag_size=512, retention=0.125)  # S + 2L = 1,040


def test_documents_are_counted():
    found = Compression.of([8192, 1040, 1041, 100], CONFIG)
    assert found.num_short == 1140  # a document of S + 2L tokens is attended to densely
    assert found.num_tokens == 8192 + 1040 + 1041 + 100
    assert found.num_held == 1920 + (1040 - 448) + (1041 - 448) + 100
    assert Compression.of([8192], CONFIG).factor == pytest.approx(4.267, abs=1e-3)


def test_sentences():
    sparse = LRSAConfig(sink_size=16, lag_size=512, retention=0.25)
    assert held_sentence(8192, [CONFIG, sparse]) == (
        "after 8,192 tokens it holds 1,920 entries at retention 1/8 (23.4 %, 4.27x smaller), "
        "2,816 entries at retention 1/4 (34.4 %, 2.91x smaller)"
    )
    assert short_documents_sentence(0.0, CONFIG, "the tokens") is None
    assert short_documents_sentence(0.1234, CONFIG, "the tokens") == (
        "12.3 % of the tokens are in documents of at most sink_size + 2 * lag_size = 1,040 tokens, "
        "of which LRSA compresses nothing"
    )
    assert short_documents_sentence(1e-5, CONFIG, "the tokens").startswith("less than 0.1 % of the tokens")
    assert short_documents_sentence(1.0, CONFIG, "the tokens").endswith("nothing: this trains like dense attention")


def test_names():
    assert [retention_name(r) for r in (1.0, 1, 0.5, 0.125, 0.0625, 0.3, 1 / 3)] == [
        "dense", "dense", "1/2", "1/8", "1/16", "0.3", "1/3",
    ]  # fmt: skip
    assert factor_name([4.2667]) == factor_name([4.2667, 4.2701]) == "4.27x"
    assert factor_name([3.9, None, 4.2667]) == "3.90–4.27x"
    assert factor_name([12.34]) == "12.3x" and factor_name([1]) == "1.00x" and factor_name([None]) == "-"


@pytest.mark.parametrize(
    "file,num_tokens,lag_size,claims",
    [
        ("README.md", 131072, 1024, {"retention 1/8: {}× smaller": 0.125}),
        ("docs/train.md", 8192, 512, {"0.125 is a {}× smaller cache after 8,192 tokens": 0.125}),
        ("benchmarks/results/2026-11-24-h100.md", 8192, 512, {"1/2: {}×": 0.5, "1/4: {}×": 0.25, "1/8: {}×": 0.125}),
        ("benchmarks/results/2026-11-cpu.md", 1024, 128, {"retention 1/8, {}× smaller": 0.125}),
    ],
)
def test_what_is_claimed_of_a_cache_is_what_it_holds(file, num_tokens, lag_size, claims):
    text = (ROOT / file).read_text()
    for claim, retention in claims.items():
        config = LRSAConfig(sink_size=16, lag_size=lag_size, retention=retention)
        assert claim.format(f"{cache_factor([num_tokens], config):.2f}") in text
    assert num_held(8192, CONFIG) == 1920
