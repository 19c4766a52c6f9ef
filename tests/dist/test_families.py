"""The table of families in docs/models.json: a family that changes column fails here."""

import pytest
import transformers

from launch.cli.checkout import ROOT
from lrsa_ds.families.checks import CHECKS, TOLERANCE
from lrsa_ds.families.table import measure_all, read_verdicts
from lrsa_ds.families.tiny import families

pytestmark = pytest.mark.dist
WRITTEN_WITH, VERDICTS = read_verdicts(ROOT / "docs" / "models.json")
# Dense, with encoders beside the text, a mixture of experts, learned positions, scaled logits, latent attention; and
# three reasons of refusal.
SOME = ("llama", "phi4_multimodal", "mixtral", "gpt2", "granite", "deepseek_v3", "doge", "diffllama", "nemotron")


def check(names):
    rows = measure_all(names)
    assert {row.family: row.verdict for row in rows} == {name: VERDICTS[name] for name in names}
    for row in rows:
        if row.verdict == "passed":
            assert set(row.errors) == set(CHECKS)
            assert max(row.errors.values()) <= TOLERANCE


def test_some_families_stay_in_their_column():
    check(SOME)


def test_nothing_passes_the_check_and_then_fails():
    assert "failed" not in VERDICTS.values()


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ != WRITTEN_WITH, reason="the table is of another version of transformers")
def test_all_families_stay_in_their_column():
    assert families() == sorted(VERDICTS)
    check(families())
