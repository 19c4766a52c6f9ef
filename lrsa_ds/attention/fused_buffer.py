"""[copies of the kept buffer | tokens] in one Triton kernel per direction, and the fused kernels of the selection.

The readable form is in `select_and_gather`. The gradient of a token is the sum of its own gradient and those of its
copies, computed in fp32 and rounded once, without atomics: the same input always gives the same gradient.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch

from lrsa_ds.attention.kept_buffer import buffer_plan
from lrsa_ds.attention.kernels.blocks import Copies, padded_buffer_size
from lrsa_ds.attention.partition import PartitionTable
from lrsa_ds.attention.selection.fused_lagkv import HAS_TRITON
from lrsa_ds.attention.selection.rule import Partitions
from lrsa_ds.registry import SELECTION_RULES

ROWS = 64  # rows of a program

if HAS_TRITON:
    import triton
    import triton.language as tl

    @triton.jit
    def _copy_kernel(
        k, v, out_k, out_v, positions, slots, others, k_b, k_g, k_n, v_b, v_g, v_n,
        num_heads, num_copied, num_others, num_slots, num_tokens,
        dim: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        """[copies of kept keys | keys], and the same for the values: [B * G, num_copied + num_tokens, D] each.

        Only the tokens `others` are copied: the selection has copied the rest.
        """
        rows, channels = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
        head = tl.program_id(1).to(tl.int64)
        is_copy, is_row = rows < num_copied, rows < num_copied + num_others
        slot = tl.load(slots + rows, mask=is_copy, other=0)
        kept = tl.load(positions + head * num_slots + slot, mask=is_copy, other=0)
        other = tl.load(others + rows - num_copied, mask=is_row & ~is_copy, other=0)
        token = tl.where(is_copy, kept, other)
        row = head * (num_copied + num_tokens) + tl.where(is_copy, rows, num_copied + other)
        inside = is_row[:, None] & (channels < dim)[None, :]
        at = row[:, None] * dim + channels[None, :]
        batch, group = head // num_heads, head % num_heads
        key = tl.load(k + batch * k_b + group * k_g + token[:, None] * k_n + channels[None, :], mask=inside)
        value = tl.load(v + batch * v_b + group * v_g + token[:, None] * v_n + channels[None, :], mask=inside)
        tl.store(out_k + at, key, mask=inside)
        tl.store(out_v + at, value, mask=inside)

    @triton.jit
    def _copy_backward_kernel(
        grad_k, grad_v, out_k, out_v, slot_of, parts, k_b, k_g, k_n, v_b, v_g, v_n,
        num_heads, num_copied, num_tokens,
        num_parts: tl.constexpr, dim: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr,
    ):  # fmt: skip
        """Gradients of keys and values [B * G, N, D]; `parts` has first slot, last slot and offset of each part."""
        rows, channels = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, DIM)
        head = tl.program_id(1).to(tl.int64)
        is_token, is_channel = rows < num_tokens, (channels < dim)[None, :]
        grad_k += (head // num_heads) * k_b + (head % num_heads) * k_g + channels[None, :]
        grad_v += (head // num_heads) * v_b + (head % num_heads) * v_g + channels[None, :]
        row, inside = (num_copied + rows).to(tl.int64)[:, None], is_token[:, None] & is_channel
        sum_k = tl.load(grad_k + row * k_n, mask=inside, other=0.0).to(tl.float32)
        sum_v = tl.load(grad_v + row * v_n, mask=inside, other=0.0).to(tl.float32)
        slot = tl.load(slot_of + head * num_tokens + rows, mask=is_token, other=-1)
        for part in tl.static_range(num_parts):
            lo, hi, offset = tl.load(parts + 3 * part), tl.load(parts + 3 * part + 1), tl.load(parts + 3 * part + 2)
            row = (offset + slot - lo).to(tl.int64)[:, None]
            inside = ((slot >= lo) & (slot < hi))[:, None] & is_channel
            sum_k += tl.load(grad_k + row * k_n, mask=inside, other=0.0).to(tl.float32)
            sum_v += tl.load(grad_v + row * v_n, mask=inside, other=0.0).to(tl.float32)
        at, inside = (head * num_tokens + rows)[:, None] * dim + channels[None, :], is_token[:, None] & is_channel
        tl.store(out_k + at, sum_k.to(out_k.dtype.element_ty), mask=inside)
        tl.store(out_v + at, sum_v.to(out_v.dtype.element_ty), mask=inside)


def fused_buffers(
    k: torch.Tensor, v: torch.Tensor, table: PartitionTable, copies: Copies, layer: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Puts the copies of the kept KV before keys and values [B, G, N, D]: two [B, G, copies + N, D], with gradients.

    The fused kernels of the table's rule select.
    """
    return _Buffers.apply(k, v, table, copies, layer)


@dataclass(frozen=True)
class _Plan:
    """The part that does not depend on the data: int tensors on one device."""

    positions: torch.Tensor  # int64 [R]: tokens of the sinks, in their slots of the kept buffer
    slot_of: torch.Tensor  # int32 [N]: slots of the tokens of the sinks; -1 for other tokens
    partitions: Partitions  # those whose kept KV is history
    first_slots: torch.Tensor  # int64 [P]: first slot of the kept KV of each partition
    slots: torch.Tensor  # int64 [copies]: slot of the kept buffer that each copied slot reads
    others: torch.Tensor  # int64 [O]: tokens that are in none of these partitions
    parts: torch.Tensor  # int32 [parts, 3]: first slot, last slot, offset


@lru_cache(maxsize=64)
def _plan(table: PartitionTable, copies: Copies, device: torch.device) -> _Plan:
    buffer = buffer_plan(table, padded_buffer_size(table), device)
    slot_of = torch.full((table.num_tokens,), -1, dtype=torch.int32, device=device)
    sinks = torch.arange(table.sink_size, dtype=torch.int32, device=device)
    others, end = [], 0
    for document in table.kept_documents:
        first = document.start + table.sink_size
        slot_of[document.start : first] = document.buffer_lo + sinks
        others.append(torch.arange(end, first, device=device))
        end = first + document.num_partitions * table.lag_size
    others = torch.cat([*others, torch.arange(end, table.num_tokens, device=device)])
    parts = [[lo, hi, offset] for (lo, hi), offset in zip(copies.parts, copies.offsets(), strict=True)]
    parts = torch.tensor(parts, dtype=torch.int32).to(device)
    first_slots = buffer.slots[:: table.num_kept].contiguous()
    return _Plan(buffer.positions, slot_of, buffer.partitions, first_slots, copies.slots(device), others, parts)


class _Buffers(torch.autograd.Function):
    @staticmethod
    def forward(ctx, k, v, table, copies, layer):
        plan = _plan(table, copies, k.device)
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        batch, heads, num_tokens, dim = k.shape
        positions = plan.positions.repeat(batch, heads, 1)
        slot_of = plan.slot_of.repeat(batch, heads, 1)
        out_k, out_v = (x.new_empty(batch, heads, copies.size + num_tokens, dim) for x in (k, v))
        select_into = SELECTION_RULES[table.config.selection].fused
        select_into(positions, k, v, plan.partitions, plan.first_slots, table.config, layer, slot_of, (out_k, out_v))
        strides = (*k.stride()[:3], *v.stride()[:3])
        sizes = (heads, copies.size, len(plan.others), positions.shape[2], num_tokens, dim)
        grid = (triton.cdiv(copies.size + len(plan.others), ROWS), batch * heads)
        _copy_kernel[grid](
            k, v, out_k, out_v, positions, plan.slots, plan.others, *strides, *sizes,
            ROWS=ROWS, DIM=triton.next_power_of_2(dim),
        )  # fmt: skip
        ctx.save_for_backward(slot_of)
        ctx.plan, ctx.num_copied = plan, copies.size
        return out_k, out_v

    @staticmethod
    def backward(ctx, *gradients):
        (slot_of,) = ctx.saved_tensors
        batch, heads, num_tokens = slot_of.shape
        grad_k, grad_v = (x if x.stride(-1) == 1 else x.contiguous() for x in gradients)
        dim = grad_k.shape[3]
        out_k, out_v = (x.new_empty(batch, heads, num_tokens, dim) for x in (grad_k, grad_v))
        strides = (*grad_k.stride()[:3], *grad_v.stride()[:3])
        sizes = (heads, ctx.num_copied, num_tokens, len(ctx.plan.parts), dim)
        grid = (triton.cdiv(num_tokens, ROWS), batch * heads)
        _copy_backward_kernel[grid](
            grad_k, grad_v, out_k, out_v, slot_of, ctx.plan.parts, *strides, *sizes,
            ROWS=ROWS, DIM=triton.next_power_of_2(dim),
        )  # fmt: skip
        return out_k, out_v, None, None, None
