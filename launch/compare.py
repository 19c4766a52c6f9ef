"""Compares runs question by question: for example several seeds of dense tuning with several of LRSA.

    python launch/compare.py dense=outputs/dense_1,outputs/dense_2 lrsa=outputs/lrsa_1,outputs/lrsa_2

Each group has a name and the directories of its runs. Runs at the same place of their groups must have answered the
same questions under the same caches (`eval.layers`, `eval.retentions`): use the same data and seed. The other groups
are compared with the first. Prints a Markdown table with 95 % intervals, and writes it to comparison.md, all numbers to
comparison.csv, and a figure to comparison.png.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import launch.cli.interrupts  # noqa: F401

# isort: split
from lrsa_ds.comparison import Group, compare, draw, markdown_table, read_group, write_csv
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.process.exits import Exit


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="+", metavar="NAME=RUN[,RUN...]", help="a name and directories of runs")
    parser.add_argument("--when", default="after", help='"before", "after", or "step N"')
    parser.add_argument("--output", type=Path, default=Path("outputs/comparison"), help="a directory for the files")
    return parser.parse_args()


def group_of(written: str, when: str) -> Group:
    name, _, directories = written.partition("=")
    require(bool(name and directories), f"{written} is not a group of runs: write NAME=RUN,RUN.")
    return read_group(name, [Path(directory) for directory in directories.split(",")], when)


def main() -> int:
    options = arguments()
    try:
        rows = compare([group_of(written, options.when) for written in options.groups])
        options.output.mkdir(parents=True, exist_ok=True)
        table = markdown_table(rows)
        (options.output / "comparison.md").write_text(table + "\n", encoding="utf-8")
        write_csv(rows, options.output / "comparison.csv")
        draw(rows, options.output / "comparison.png")
    except LRSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return Exit.REFUSED
    except OSError as error:
        print(f"error: {options.output} cannot be written: {error.strerror}.", file=sys.stderr)
        return Exit.REFUSED
    print(table)
    return Exit.DONE


if __name__ == "__main__":
    sys.exit(main())
