"""Raw texts, split into excerpts for training and excerpts that are held out."""

import re
from dataclasses import replace
from typing import Any, cast

import numpy as np

from lrsa_ds.data.material import Split, all_rows, say_left_out, split_key, validation_rows
from lrsa_ds.data.shapes import ToRow
from lrsa_ds.data.sources import Rows
from lrsa_ds.data.stdlib_docs import documents_fingerprint, load_documents
from lrsa_ds.errors import LRSAError
from lrsa_ds.settings.data import DataConfig

# A text is split into excerpts of about this many characters, of which one in ten is held out.
EXCERPT_CHARACTERS = 16_000
ONE_HELD_OUT_IN = 10
_WITH_ITS_END = re.compile(r".+?(?:\n\s*\n|\Z)", re.DOTALL)
_BREAK = re.compile(r"(?<=[.!?])\s+|(?<=[\u3002\uff01\uff1f])|\s+")


def open_texts(data: DataConfig, seed: int, to_row: ToRow | None = None) -> Split[str]:
    """The texts of `data.path` or `data.name`, or the embedded documentation if neither is set.

    Those of `data.validation_path` or `data.validation_split` are held out. If neither is set, one excerpt in ten is
    held out, in an order that `seed` gives. All texts are read into memory.

    Raises:
        LRSAError: as `Rows`; rows have no text; or there is too little text to hold any out.
    """
    if data.path is None and data.name is None:
        documents = load_documents()
        train, held_out = ([d.text for d in documents if d.is_validation == held] for held in (False, True))
        return Split(train, held_out, "data=recall", documents_fingerprint())
    data = replace(data, source="files" if data.name is None else "hub", questions_per_context=1)
    rows = all_rows(data, seed, to_row, needs="text")
    excerpts, label, content = _excerpts(rows), rows.source.opened.label, rows.source.opened.fingerprint()
    say_left_out(rows)
    separate = validation_rows(data, seed, to_row, needs="text")
    if separate is not None:
        held_out = _excerpts(separate)
        content += f", without those of {separate.source.opened.fingerprint()}"
    else:
        if len(excerpts) < 2:
            raise LRSAError(
                f"{label} holds one excerpt of {EXCERPT_CHARACTERS:,} characters or fewer, of which none can be held "
                f"out: add texts, or set data.validation_{split_key(data)}."
            )
        order = np.random.default_rng([seed, 0]).permutation(len(excerpts))
        chosen = sorted(order[: -(-len(excerpts) // ONE_HELD_OUT_IN)].tolist())
        held_out = [excerpts[i] for i in chosen]
        content += f", {len(held_out)} stretches held out"  # earlier runs saved this text
    taken = set(held_out)
    train = [excerpt for excerpt in excerpts if excerpt not in taken]
    if not train:
        raise LRSAError(f"{label}: all texts are held out; leave some others to train on.")
    return Split(train, held_out, label, content, rows.num_bad)


def _excerpts(rows: Rows) -> list[str]:
    found = []
    for row in rows.source.good_rows():
        text = cast(dict[str, Any], row.content)["text"].strip()
        pieces, length = [], 0
        for piece in pieces_of(f"{text}\n\n", EXCERPT_CHARACTERS):
            if pieces and length + len(piece) > EXCERPT_CHARACTERS:
                found.append("".join(pieces))
                pieces, length = [], 0
            pieces.append(piece)
            length += len(piece)
        found.append("".join(pieces))
    return found


def pieces_of(text: str, most: int) -> list[str]:
    """Splits a text into pieces of at most about `most` characters: paragraphs, or, if these are longer, sentences."""
    pieces = []
    for paragraph in _WITH_ITS_END.findall(text):
        while len(paragraph) > most:
            stops = [match.end() for match in _BREAK.finditer(paragraph, 0, most)]
            sentences = [stop for stop in stops if not paragraph[:stop].rstrip()[-1:].isalnum()]
            stop = (sentences or stops or [most])[-1]
            pieces.append(paragraph[:stop])
            paragraph = paragraph[stop:]
        pieces.append(paragraph)
    return [piece for piece in pieces if piece]
