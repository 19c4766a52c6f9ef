"""Bytes that a rank sends under sequence parallelism, by content, and those that dense Ulysses would send."""

from collections import Counter
from dataclasses import dataclass, field

import torch

PASSES = ("forward", "backward")
# Contents of an all-to-all; "kv": all keys and values (dense Ulysses); "kept": only the kept KV.
CARGO = ("halo", "queries", "kept", "kv", "outputs", "lse")


@dataclass
class Traffic:
    """Bytes sent to other ranks since the last `take` or `clear`, by (cargo, pass). Recomputed passes count again."""

    sent: Counter = field(default_factory=Counter)
    ulysses: Counter = field(default_factory=Counter)

    def take(self, num_layers: int) -> dict[str, float]:
        """Bytes of an average layer: `sent_bytes_<pass>[_<cargo>]`, and `ulysses_bytes_<pass>[_kv]` to compare with."""
        sent, ulysses = self.sent, self.ulysses
        self.clear()
        counts = {}
        for direction in PASSES:
            counts[f"sent_bytes_{direction}"] = sum(sent[cargo, direction] for cargo in CARGO)
            counts |= {f"sent_bytes_{direction}_{cargo}": sent[cargo, direction] for cargo in CARGO}
            counts[f"ulysses_bytes_{direction}"] = sum(ulysses[cargo, direction] for cargo in CARGO)
            counts[f"ulysses_bytes_{direction}_kv"] = ulysses["kv", direction]
        return {name: count / num_layers for name, count in counts.items()}

    def clear(self) -> None:
        """Resets the counts."""
        self.sent, self.ulysses = Counter(), Counter()

    def count_ulysses(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, size: int, is_real: bool
    ) -> None:
        """Counts what dense Ulysses sends for this attention, and again when its backward pass comes by.

        Args:
            q, k, v: [1, H, n, D] and [1, G, n, D], of one shard; `output` is their attention.
            is_real: whether Ulysses did compute it.
        """
        num_bytes = ulysses_bytes(q, k, v, size)
        books = [self.ulysses, self.sent] if is_real else [self.ulysses]

        def count(direction: str) -> None:
            for book in books:
                book.update({(cargo, direction): n for cargo, n in num_bytes.items()})

        count("forward")
        if output.requires_grad:
            output.register_hook(lambda gradient: count("backward"))


def ulysses_bytes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: int) -> dict[str, int]:
    """Bytes that dense Ulysses sends from a rank in one pass over a layer: shards q [1, H, n, D], k and v [1, G, n, D].

    It sends keys and values of one head dim, the larger one where they differ.
    """
    one_head = q.shape[2] * max(q.shape[3], v.shape[3]) * q.element_size()
    # Fewer KV heads than ranks are repeated, so that every rank receives one.
    heads = {"queries": q.shape[1], "kv": 2 * max(k.shape[1], size), "outputs": q.shape[1]}
    return {cargo: n * one_head * (size - 1) // size for cargo, n in heads.items()}
