"""The table of families: measured by two processes, written as JSON for programs and as Markdown for people."""

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import transformers

from lrsa_ds.families.checks import CHECKS, TOLERANCE, Row, measure, measure_shared
from lrsa_ds.parallel.mesh import Mesh, start_mesh, stop_mesh
from lrsa_ds.parallel.rendezvous import free_port

INTRODUCTION = """# Models

Made by `python launch/families.py`, which builds a tiny random model of every family that `AutoModelForCausalLM`
knows, with every kind of layer that its default configuration has. What LRSA cannot train is refused before a run
starts, in the sentence that is shown here. The checks: at retention 1 the model predicts what the stock model does; at
retention 1/4 the training pass predicts what chunk-by-chunk prefill, token-by-token decoding and the steps of
`lrsa_ds.generate` do; packed documents are what each is alone; and two ranks that share packed documents and recompute
their layers get the loss and every gradient of one rank.
"""
ALONE = (
    "Ranks cannot share the sequences of a family with recurrent layers: a run says so before it starts, and the table "
    '"refused". Gradients of its packed documents, with recomputed layers, are those of each document alone: the error '
    'is part of "packed = alone".'
)
INSTALLED = transformers.__version__
NUM_RANKS = 2  # that share a sequence


def measure_all(names: Sequence[str]) -> list[Row]:
    """A row for each family, in the order of the names; two processes share the work."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        context = mp.get_context("spawn")
        results = context.SimpleQueue()
        mp.start_processes(_rank, (list(names), free_port(), results), nprocs=NUM_RANKS, start_method="spawn")
    return results.get()


def _rank(rank: int, names: list[str], port: int, results: Any) -> None:
    """One of the two processes: checks half of the families alone, and then shares those that passed."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS), "OMP_NUM_THREADS": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    mesh = start_mesh(NUM_RANKS)
    alone = {name: measure(name) for name in names[rank::NUM_RANKS]}
    rows = {name: row for part in mesh.gather(alone) for name, row in part.items()}
    done = [_shared(rows[name], mesh) for name in names]
    stop_mesh()
    if rank == 0:
        results.put(done)


def _shared(row: Row, mesh: Mesh) -> Row:
    return measure_shared(row, mesh) if row.verdict == "passed" else row


def write_json(rows: Sequence[Row], path: Path) -> None:
    """The verdict of each family, why it is not "passed", its errors, and the version of transformers."""
    found = {row.family: _saved(row) for row in sorted(rows, key=lambda row: row.family)}
    path.write_text(json.dumps({"transformers": INSTALLED, "families": found}, indent=1) + "\n")


def _saved(row: Row) -> dict[str, Any]:
    errors = {name: float(f"{error:.0e}") for name, error in (row.errors or {}).items()}
    saved = {"verdict": row.verdict, "model": row.model, "why": row.why}
    if row.verdict != "passed":
        return saved
    return saved | {"errors": errors} | ({"alone": row.alone} if row.alone else {})


def read_rows(path: Path) -> tuple[str, list[Row]]:
    """The version of transformers of a table, and its rows."""
    saved = json.loads(path.read_text())
    return saved["transformers"], [_read(family, row) for family, row in saved["families"].items()]


def _read(family: str, saved: dict[str, Any]) -> Row:
    why = {} if saved["verdict"] == "passed" else {saved["verdict"]: saved["why"]}
    return Row(family, saved["model"], errors=saved.get("errors"), alone=saved.get("alone", ""), **why)


def write_markdown(rows: Sequence[Row], path: Path) -> None:
    """The table for people."""
    rows = sorted(rows, key=lambda row: row.family)
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("passed", "refused", "failed")}
    unbuilt = len(rows) - sum(counts.values())
    lines = [
        INTRODUCTION,
        f"transformers {INSTALLED}: of {len(rows)} families **{counts['passed']} pass every check**, "
        f"{counts['refused']} are refused, {counts['failed']} fail a check, and of {unbuilt} no tiny model could be "
        "built.",
        "",
        "## Families that pass",
        "",
        f"Relative errors in fp32; the limit is {TOLERANCE:.0e}. {ALONE}",
        "",
        f"| family | model | {' | '.join(CHECKS.values())} |",
        f"|---|---|{'---|' * len(CHECKS)}",
        *(_line(row) for row in rows if row.verdict == "passed"),
        "",
        "## The others",
        "",
        "| family | model | | why |",
        "|---|---|---|---|",
        *(f"| {r.family} | {r.model} | {r.verdict} | {r.why.replace('|', '/')} |" for r in rows if r.why),
    ]
    path.write_text("\n".join(lines) + "\n")


def _line(row: Row) -> str:
    errors, missing = row.errors or {}, "refused" if row.alone else ""
    cells = [f"{errors[name]:.0e}" if name in errors else missing for name in CHECKS]
    return f"| {row.family} | {row.model} | {' | '.join(cells)} |"
