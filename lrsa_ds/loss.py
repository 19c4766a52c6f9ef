"""The loss over answer tokens, in chunks, so that the logits of a long sequence are never held at once.

Shapes: N tokens, T target slots, C hidden size.
"""

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from lrsa_ds.attention import AttentionFunction, lrsa_attention
from lrsa_ds.config import LRSAConfig
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.model import output_layer


class TargetLoss(nn.Module):
    """A causal language model together with its loss: what DeepSpeed wraps.

    Logits are computed at target positions only, `chunk_size` at a time, and recomputed in the backward pass.
    """

    def __init__(self, lm: nn.Module, chunk_size: int):
        super().__init__()
        self.lm = lm
        self.chunk_size = chunk_size

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor,
        document_lengths: tuple[int, ...],
        lrsa_config: LRSAConfig,
        num_slots: int,
        attend: AttentionFunction = lrsa_attention,
    ) -> torch.Tensor:
        """In training the sum of the negative log-likelihoods of all targets; in evaluation [T, 3] per target.

        Args:
            input_ids, position_ids: [1, N], packed documents with positions that restart.
            labels: [1, N], the token that each position has to predict, or IGNORE.
            document_lengths: of the whole row, also where this rank holds only a shard of it.
            num_slots: at least the number of targets, and the same on every rank: under ZeRO-3 each use of the output
                layer is a collective, so every rank must use it equally often.
            attend: the attention function of the pass; another one where this rank holds only a shard of the row.

        Returns:
            Training: a scalar in fp32. Evaluation: for each target in order, its negative log-likelihood, whether the
            likeliest token is the target (1.0 or 0.0), and the likeliest token, which fp32 holds exactly.
        """
        decoder = self.lm.get_decoder()
        hidden = decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=False,
            document_lengths=document_lengths,
            lrsa_config=lrsa_config,
            attend=attend,
        ).last_hidden_state[0]
        targets = (labels[0] != IGNORE).nonzero()[:, 0]
        slots = nn.functional.pad(targets, (0, num_slots - len(targets)))
        slot_labels = labels[0][slots].masked_fill(torch.arange(num_slots, device=slots.device) >= len(targets), IGNORE)
        chunks = zip(hidden[slots].split(self.chunk_size), slot_labels.split(self.chunk_size), strict=True)
        if self.training:
            return sum(checkpoint(self._loss, h, y, use_reentrant=False) for h, y in chunks)
        return torch.cat([self._statistics(h, y) for h, y in chunks])[: len(targets)]

    def _loss(self, hidden_TC: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        logits = output_layer(self.lm)(hidden_TC).float()
        return cross_entropy(logits, labels_T, ignore_index=IGNORE, reduction="sum")

    def _statistics(self, hidden_TC: torch.Tensor, labels_T: torch.Tensor) -> torch.Tensor:
        logits = output_layer(self.lm)(hidden_TC).float()
        nll = cross_entropy(logits, labels_T, ignore_index=IGNORE, reduction="none")
        likeliest = logits.argmax(-1)
        return torch.stack([nll, (likeliest == labels_T).float(), likeliest.float()], dim=1)
