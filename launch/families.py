"""Checks which causal language models of the installed transformers LRSA can train: the table in docs/models.md.

    python launch/families.py                  measures every family, and writes docs/models.md and docs/models.json
    python launch/families.py llama mixtral    prints the rows of some
    python launch/families.py --refresh llama  measures some, and puts their rows into these files

Builds a tiny random model of each family, and checks it in two processes on the CPU; all take about four minutes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

from launch.cli.checkout import ROOT
from lrsa_ds.families.table import INSTALLED, measure_all, read_rows, write_json, write_markdown
from lrsa_ds.families.tiny import families

TABLE = ROOT / "docs" / "models.json"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help="model types; default: all, into docs/")
    parser.add_argument("--refresh", action="store_true", help="put the rows of the named families into docs/")
    options = parser.parse_args()
    known, chosen = families(), options.families
    unknown = sorted(set(chosen) - set(known))
    if unknown:
        parser.error(f"no such family: {', '.join(unknown)}; transformers has {', '.join(known)}")
    version, old = read_rows(TABLE)
    if options.refresh and chosen and version != INSTALLED:
        parser.error(
            f"{TABLE} is of transformers {version}, and {INSTALLED} is installed: leave the families out, so that all "
            "are measured"
        )
    rows = measure_all(chosen or known)
    for row in rows:
        errors = " ".join(f"{name}={error:.0e}" for name, error in (row.errors or {}).items())
        print(f"{row.family}: {row.verdict} {errors} {row.why}".rstrip())
    if options.refresh or not chosen:
        table = {row.family: row for row in [*(old if chosen else []), *rows]}
        write_json(list(table.values()), TABLE)
        write_markdown(list(table.values()), TABLE.with_suffix(".md"))
    return int(any(row.verdict == "failed" for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
