"""Layers without keys and values: recurrent ones, which carry a state, and those that only have an MLP.

LRSA leaves them as they are; `lrsa_ds.models.recurrent` keeps documents and rows apart in them.
"""

from dataclasses import dataclass
from typing import ClassVar

from lrsa_ds.attention.kinds.kind import KeylessKind
from lrsa_ds.layer_settings import WithoutKeys


@dataclass(frozen=True, kw_only=True)
class Keyless(WithoutKeys):
    """The settings of such a layer: none that can be set.

    Args:
        name: what it keeps, for a list of layers.
    """

    kind: ClassVar[str] = "keyless"

    name: str

    def said(self) -> str:
        return self.name


# By the types of transformers, which calls all recurrences "linear_attention", state-space models too.
KEYLESS = KeylessKind(
    layers={
        "linear_attention": Keyless(name="linear attention or a state space"),
        "conv": Keyless(name="a short convolution"),
        "mlp": Keyless(name="an MLP without attention"),
        "moe": Keyless(name="experts without attention"),
    }
)
