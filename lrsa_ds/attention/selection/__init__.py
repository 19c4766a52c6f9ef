"""Selection rules: which tokens of each partition are kept.

To add a rule, write a file with a function from `Candidates` to scores and add it to the table below. Outside of this
package, call `lrsa_ds.register_selection`. Training, sequence parallelism, cache and evaluation need no change.
"""

from lrsa_ds.attention.selection.key_norm import KEY_NORM
from lrsa_ds.attention.selection.lagkv import LAGKV
from lrsa_ds.attention.selection.random import RANDOM
from lrsa_ds.attention.selection.rule import Candidates, SelectionRule, register_selection
from lrsa_ds.attention.selection.window import WINDOW

register_selection("lagkv", LAGKV)
register_selection("key_norm", KEY_NORM)
register_selection("random", RANDOM)
register_selection("window", WINDOW)

__all__ = ["Candidates", "SelectionRule", "register_selection"]
