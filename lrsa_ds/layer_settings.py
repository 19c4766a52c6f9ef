"""The interface of the settings of one layer of any kind, and the layers of a model that LRSA replaces."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


class LayerSettings(ABC):
    """All settings of the attention of a layer: `LRSAConfig`, or those of a layer of another kind.

    Attributes:
        kind: its name in the table of kinds, see `lrsa_ds.attention.kinds`.
        has_keys: whether it has keys and values, and so a share in a cache of them.
    """

    kind: ClassVar[str]
    has_keys: ClassVar[bool] = True

    @property
    @abstractmethod
    def backend(self) -> str:
        """The kernel, as in `LRSAConfig`."""

    @abstractmethod
    def num_held(self, num_tokens: int) -> int:
        """Entries of a cache for each KV head after `num_tokens` tokens of one document."""

    @abstractmethod
    def most_held(self, max_tokens: int) -> int:
        """Maximum number of entries, including its own, that a token attends to in a document of `max_tokens`."""

    @abstractmethod
    def room_in_chunk(self, num_tokens: int) -> int:
        """Tokens that may follow `num_tokens` before the next compression."""

    @abstractmethod
    def said(self) -> str:
        """Such as "retention 0.125", in a list of layers."""


@dataclass(frozen=True, kw_only=True)
class OtherSettings(LayerSettings):
    """Those of a layer that LRSA leaves as it is."""

    backend: str = "auto"


@dataclass(frozen=True, kw_only=True)
class WithoutKeys(OtherSettings):
    """Those of a layer that has no keys and values of its own, and so nothing in a cache of them."""

    has_keys: ClassVar[bool] = False

    def num_held(self, num_tokens: int) -> int:
        return 0

    def most_held(self, max_tokens: int) -> int:
        return 0

    def room_in_chunk(self, num_tokens: int) -> int:
        return UNLIMITED


@dataclass(frozen=True, kw_only=True)
class SharedKeys(WithoutKeys):
    """Those of a layer that attends, as the layer `source` does, to the keys and values of that earlier layer."""

    kind: ClassVar[str] = "shared_keys"

    source: int

    def said(self) -> str:
        return f"the keys and values of layer {self.source}"


@dataclass(frozen=True)
class ModelLayers:
    """The layers of a model: None where LRSA takes the place of the attention, the settings of those that stay."""

    others: tuple[OtherSettings | None, ...]

    @classmethod
    def of(cls, layers: "int | ModelLayers") -> "ModelLayers":
        """Those of a model that is known by the number of its layers, of which LRSA takes all."""
        return cls((None,) * layers) if isinstance(layers, int) else layers

    @property
    def taken(self) -> list[int]:
        """The layers that LRSA takes."""
        return [index for index, other in enumerate(self.others) if other is None]

    def source(self, layer: int) -> int:
        """The layer whose keys and values a layer attends to: an earlier one that shares them, or itself."""
        other = self.others[layer]
        return other.source if isinstance(other, SharedKeys) else layer

    def num_readers(self, layer: int) -> int:
        """Layers that attend to the keys and values of a layer, itself among them."""
        return sum(self.source(other) == layer for other in range(len(self)))

    def __len__(self) -> int:
        return len(self.others)


# A model, by its layers, or by their number where LRSA takes all of them.
Layers = int | ModelLayers
# Room in a chunk where nothing is ever compressed.
UNLIMITED = 2**63 - 1
