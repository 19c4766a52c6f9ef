"""The traits of a kernel of interval attention, which its callers depend on, and the choice of a kernel."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lrsa_ds.attention.extras import PLAIN, Extras
from lrsa_ds.attention.kernels.interval import Intervals
from lrsa_ds.attention.saved_outputs import attend_once
from lrsa_ds.dtypes import dtype_name
from lrsa_ds.errors import require
from lrsa_ds.layer_settings import LayerSettings
from lrsa_ds.lrsa_config import AUTO
from lrsa_ds.notices import say_once
from lrsa_ds.registry import KERNELS

# From q [B, H, N, D], k and v [B, G, M, D], intervals and extras to output [B, H, N, D] and log-sum-exp [B, H, N].
IntervalAttention = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Intervals, Extras], tuple[torch.Tensor, torch.Tensor]
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Kernel:
    """A kernel and its traits.

    Args:
        attend: the same function as `interval_attention`.
        is_readable: whether it is written to be read and compared with. A complete sequence is then processed chunk by
            chunk, without a kept buffer, and the selection runs in PyTorch.
        wants_whole_blocks: whether it is faster if keys, kept buffer and halos are whole numbers of blocks.
        compiles_shapes: whether it is compiled for every number of queries and keys. Passes behind a cache, whose sizes
            vary, are then padded.
        skips_queries_ahead: whether it may start its blocks after `Intervals.ahead`.
        has_lse_gradient: whether gradients flow through the log-sum-exp, which merges two parts.
        devices: types of devices that it runs on; None: all.
        dtypes, head_dims: those that it supports; None: all.
        min_head_dim: the smallest head dim that it supports.
        takes_other_value_dims: whether values may have another head dim than keys.
        caps_scores: whether it applies `Extras.softcap`.
        what_is_missing: returns another reason why it cannot run on a device, such as a missing package, or None.
    """

    attend: IntervalAttention
    is_readable: bool = False
    wants_whole_blocks: bool = True
    compiles_shapes: bool = False
    skips_queries_ahead: bool = False
    has_lse_gradient: bool = True
    devices: tuple[str, ...] | None = None
    dtypes: tuple[torch.dtype, ...] | None = None
    head_dims: tuple[int, ...] | None = None
    min_head_dim: int = 1
    takes_other_value_dims: bool = False
    caps_scores: bool = False
    what_is_missing: Callable[[torch.device], str | None] = lambda device: None

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, intervals: Intervals, extras: Extras
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`attend`; a recomputed layer takes what the forward pass has saved of it, see `attend_once`."""
        if self.is_readable:  # what it saves is as large as the scores
            return self.attend(q, k, v, intervals, extras)
        return attend_once(lambda q, k, v: self.attend(q, k, v, intervals, extras), q, k, v)

    def runs_on(self, device: torch.device) -> bool:
        return self.devices is None or device.type in self.devices

    def why_not(
        self,
        device: torch.device,
        dtype: torch.dtype,
        head_dim: int,
        value_dim: int | None = None,
        is_capped: bool = False,
    ) -> str | None:
        """Why the kernel cannot run on such tensors; None if it can."""
        if self.devices is not None and not self.runs_on(device):
            return f"it needs a {' or '.join(map(str.upper, self.devices))} device, and this is {device}"
        if (missing := self.what_is_missing(device)) is not None:
            return missing
        if self.dtypes is not None and dtype not in self.dtypes:
            return f"it computes in {' or '.join(map(dtype_name, self.dtypes))}, not in {dtype_name(dtype)}"
        if self.head_dims is not None and head_dim not in self.head_dims:
            return f"head dims {' and '.join(map(str, self.head_dims))} are supported, not {head_dim}"
        if (least := min(head_dim, value_dim or head_dim)) < self.min_head_dim:
            return f"head dims from {self.min_head_dim} on are supported, not {least}"
        if not self.takes_other_value_dims and value_dim not in (None, head_dim):
            return f"it takes values of the head dim of the keys, {head_dim}, not {value_dim}"
        if is_capped and not self.caps_scores:
            return "it cannot cap attention scores, as the model does"
        return None


def choose_kernel(
    config: LayerSettings,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    has_history: bool = True,
    needs_lse_gradient: bool = False,
    value_dim: int | None = None,
    extras: Extras = PLAIN,
) -> Kernel:
    """The kernel for such tensors; "auto" is the last one of the table that can run on them.

    Args:
        has_history: whether any query has a history. If not, a readable kernel is the fastest: it makes one plain
            causal call for each document, for which SDPA has dense kernels, unless there are extras.
        needs_lse_gradient: whether the caller merges parts by their log-sum-exp.
        value_dim: head dim of the values; default: that of the keys.
        extras: those of the layer.

    Raises:
        LRSAError: the kernel that the settings name cannot run on them.
    """

    def reason(kernel: Kernel) -> str | None:
        if needs_lse_gradient and not kernel.has_lse_gradient:
            return "it gives no gradient through the log-sum-exp, by which this exchange merges history and window"
        if extras.sinks is not None and not kernel.has_lse_gradient:
            return "it gives no gradient through the log-sum-exp, by which learned sinks take their share"
        return kernel.why_not(device, dtype, head_dim, value_dim, extras.softcap is not None)

    names = list(KERNELS)
    able = [name for name in names if reason(KERNELS[name]) is None]
    if config.backend != AUTO:
        require(
            config.backend in able,
            f"{KERNELS.key}={config.backend} is not possible: {reason(KERNELS[config.backend])}; use "
            f"{', '.join([AUTO, *able])}.",
        )
        return KERNELS[config.backend]
    if not has_history and extras.is_plain:
        return KERNELS[[name for name in able if KERNELS[name].is_readable][-1]]
    for name in names[names.index(able[-1]) + 1 :]:
        if KERNELS[name].runs_on(device):
            why = reason(KERNELS[name])
            say_once(f"{KERNELS.key}={AUTO} is {able[-1]} here, since {name} is not possible: {why}.")
    return KERNELS[able[-1]]
