from lrsa_ds.attention.lrsa import lrsa_attention
from lrsa_ds.attention.select import select_kept

__all__ = ["lrsa_attention", "select_kept"]
