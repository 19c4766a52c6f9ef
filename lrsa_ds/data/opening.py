"""The rows that a run trains on: read, generated, or a mixture of both."""

from lrsa_ds.config import TrainConfig
from lrsa_ds.data.context_sources import open_contexts
from lrsa_ds.data.encoder import Encoder
from lrsa_ds.data.mixture import open_rows
from lrsa_ds.data.rows import RowSource
from lrsa_ds.data.shapes import ToRow
from lrsa_ds.data.sources import Rows
from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.settings.data import DataConfig


def rows_of(config: TrainConfig, tokenizer: Tokenizer, encoder: Encoder, to_row: ToRow | None = None) -> RowSource:
    """The rows of `config.data`: one source or several.

    Raises:
        LRSAError: a source raises it.
    """

    def open_source(data: DataConfig, seed: int, num_validation: int) -> RowSource:
        if data.makes_contexts:
            return open_contexts(data, config, seed, num_validation, tokenizer, encoder, to_row)
        return Rows(data, seed, num_validation, to_row, config.eval.allow_fewer)

    return open_rows(config.data, config.seed, config.eval.num_examples, open_source)
