"""Keys or values one after another, copied in the widest elements that their layout allows.

torch.cat of slices copies single elements on a GPU: 2 bytes at a time took three times as long as the memory needs.
"""

from collections.abc import Sequence

import torch

WIDE = torch.complex128  # the widest element of torch, 16 bytes


def join(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` of tensors [B, G, length, D] along their lengths; the result shares no memory with them."""
    parts = [part for part in parts if part.shape[2]] or list(parts[:1])
    dtypes = {part.dtype for part in parts}
    if len(dtypes) > 1 or any(part.requires_grad for part in parts) or not all(map(_has_wide_rows, parts)):
        return torch.cat(parts, dim=2)
    return torch.cat([part.view(WIDE) for part in parts], dim=2).view(dtypes.pop())


def _has_wide_rows(x: torch.Tensor) -> bool:
    """Whether the rows [D] of a tensor are whole numbers of wide elements."""
    ratio = WIDE.itemsize // x.element_size()
    places = [x.storage_offset(), x.shape[-1], *x.stride()[:-1]]
    return x.stride(-1) == 1 and x.data_ptr() % WIDE.itemsize == 0 and all(place % ratio == 0 for place in places)
