"""The table of families in docs/models.json: a family that changes column fails here."""

import pytest
import transformers

from launch.cli.checkout import ROOT
from lrsa_ds.families.checks import CHECKS, TOLERANCE
from lrsa_ds.families.table import measure_all, read_rows, write_json, write_markdown
from lrsa_ds.families.tiny import families

pytestmark = pytest.mark.dist
TABLE = ROOT / "docs" / "models.json"
WRITTEN_WITH, ROWS = read_rows(TABLE)
VERDICTS = {row.family: row.verdict for row in ROWS}
# Dense, with encoders beside the text, a mixture of experts, learned positions, scaled logits, latent attention,
# chunked attention beside experts and layers that keep keywords, a recurrence, shared keys; and three reasons of
# refusal.
SOME = ("llama", "phi4_multimodal", "mixtral", "gpt2", "granite", "deepseek_v3", "llama4_text", "qwen3_next")
SOME += ("gemma3n_text", "doge", "diffllama", "git")


def check(names):
    rows = measure_all(names)
    assert {row.family: row.verdict for row in rows} == {name: VERDICTS[name] for name in names}
    for row in rows:
        if row.verdict == "passed":
            unshared = {"gather_kept", "head_groups"} if row.alone else set()
            assert set(row.errors) == set(CHECKS) - unshared
            assert not row.alone or row.alone.endswith("set parallel.sp_size=1.")
            assert max(row.errors.values()) <= TOLERANCE


def test_some_families_stay_in_their_column():
    check(SOME)


def test_both_files_of_the_table_are_of_the_same_rows(tmp_path):
    write_json(ROWS, tmp_path / "models.json")
    write_markdown(ROWS, tmp_path / "models.md")
    for name in ("models.json", "models.md"):
        saved = (TABLE.parent / name).read_text().replace(WRITTEN_WITH, transformers.__version__)
        assert (tmp_path / name).read_text() == saved


def test_nothing_passes_the_check_and_then_fails():
    assert "failed" not in VERDICTS.values()


@pytest.mark.slow
@pytest.mark.skipif(transformers.__version__ != WRITTEN_WITH, reason="the table is of another version of transformers")
def test_all_families_stay_in_their_column():
    assert families() == sorted(VERDICTS)
    check(families())
