"""The ways to share a sequence that `parallel.exchange` may name. To add one, write a file with it and add it here."""

from lrsa_ds.parallel.sequence.gather_kept import GATHER_KEPT
from lrsa_ds.parallel.sequence.head_groups import HEAD_GROUPS
from lrsa_ds.registry import EXCHANGES

EXCHANGES.add(GATHER_KEPT.name, GATHER_KEPT, former="kept")
EXCHANGES.add(HEAD_GROUPS.name, HEAD_GROUPS, former="heads")
