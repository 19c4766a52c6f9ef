"""The load-balancing loss of a mixture of experts in a step, exact however its tokens are dealt out.

The loss is that of Switch Transformers (Fedus et al. 2021, arXiv 2101.03961, equations 4 to 6), as transformers
computes it (`load_balancing_loss_func`), over all layers at once. Of E experts, with c_e how often expert e is among
the likeliest of a token, p_e the sum of its probabilities, both over the T tokens of all routers:

    aux_loss = E * sum over e of (c_e / T) * (p_e / T)

A product of sums: over which tokens they run is a choice. Here these are the tokens of one micro-batch, padding left
out, on all ranks that share it, and a step has the mean over its micro-batches of all replicas. So the loss is the same
for any number of ranks to a sequence, and for replicas in the place of micro-batches; `optim.micro_batch` changes it.

Choices have no gradient. A rank that knows those of all ranks adds the part of its own probabilities, and the parts sum
to the loss and to its gradient. Shapes: E experts, L routers.
"""

import torch

from lrsa_ds.data.packing import PackedSequence
from lrsa_ds.models.routers import Routers, Routing
from lrsa_ds.parallel.mesh import Mesh


class Balance:
    """What one step adds up.

    Args:
        routers: of the model that is trained, or None: it has none.
        num_passes: micro-batches of the step, of one replica.
    """

    def __init__(self, routers: Routers | None, mesh: Mesh, num_passes: int):
        self.routers, self.mesh = routers, mesh
        self.num_passes = num_passes * mesh.dp_size
        self.aux_loss: torch.Tensor | float = 0.0
        self.load: torch.Tensor | float = 0.0

    def loss(self, row: PackedSequence, *routing: torch.Tensor) -> torch.Tensor | float:
        """This rank's part of what a micro-batch adds to the loss of the step.

        Args:
            row: the micro-batch, or this rank's shard of it.
            routing: what the objective returns of it, none without routers.
        """
        if self.routers is None:
            return 0.0
        probabilities, choices, load = Routing(*routing)
        self.load = self.load + load
        if self.routers.coefficient is None:
            return 0.0
        num_tokens = max(1, int(row.is_token().sum())) * self.routers.num_routers
        choices = self.mesh.sum_in_sequence(choices)
        part = len(choices) * (choices / num_tokens) @ (probabilities / num_tokens) / self.num_passes
        self.aux_loss = self.aux_loss + part.detach()
        return self.routers.coefficient * part

    def metrics(self) -> dict[str, float]:
        """The loss, before its coefficient, and the tokens of the busiest expert over the mean, in the worst layer."""
        if self.routers is None or isinstance(self.load, float):
            return {}
        aux_loss, *counts = self.mesh.sum([float(self.aux_loss), *self.load.flatten().tolist()])
        load = torch.tensor(counts, dtype=torch.float64).view(self.load.shape)
        busiest = (load.amax(1) / load.mean(1)).max().item()
        return ({} if self.routers.coefficient is None else {"aux_loss": aux_loss}) | {"expert_load": busiest}
