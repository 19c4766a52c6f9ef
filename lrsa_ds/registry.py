"""Tables of what a setting may name: selection rules, attention kernels, exchanges; and of the kinds of layers.

The tables are defined here, since both the settings checked against them and the code that fills them import them.
"""

from collections.abc import Iterator
from typing import Any, Generic, TypeVar

from lrsa_ds.errors import LRSAError

Entry = TypeVar("Entry")


class Registry(Generic[Entry]):
    """Entries by name.

    Args:
        key: the setting that names an entry.
        advice: what the error for an unknown name adds to the list of the valid ones.
    """

    def __init__(self, key: str, advice: str = ""):
        self.key, self.advice = key, advice
        self._entries: dict[str, Entry] = {}
        self._former: dict[str, str] = {}

    def add(self, name: str, entry: Entry, former: str | None = None) -> None:
        """Adds an entry; `former` is its name in earlier releases, which stays a valid spelling.

        Raises:
            LRSAError: the name belongs to another entry.
        """
        if self._entries.get(name, entry) is not entry or name in self._former:
            raise LRSAError(f"{self.key}={name} exists already: choose another name than {', '.join(self)}.")
        self._entries[name] = entry
        if former is not None:
            self._former[former] = name

    def name_of(self, name: Any) -> str:
        """The present name of an entry, from that or its former one.

        Raises:
            LRSAError: there is no such entry.
        """
        known = isinstance(name, str)
        name = self._former.get(name, name) if known else name
        if not known or name not in self._entries:
            former = f" (formerly {', '.join(self._former)})" if self._former else ""
            raise LRSAError(f"{self.key}={name!r} is not valid: choose one of {', '.join(self)}{former}{self.advice}.")
        return name

    def __getitem__(self, name: Any) -> Entry:
        return self._entries[self.name_of(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)


KERNELS: Registry[Any] = Registry("attention.backend")
LAYER_KINDS: Registry[Any] = Registry("kind of layer")
EXCHANGES: Registry[Any] = Registry("parallel.exchange")
SELECTION_RULES: Registry[Any] = Registry(
    "attention.selection", ", or one that a module in plugins adds by lrsa_ds.register_selection"
)
