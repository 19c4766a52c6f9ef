"""Checks of a run that need no data and hold on any machine: of the model, and of how it is trained."""

from dataclasses import replace

from lrsa_ds.config import TrainConfig
from lrsa_ds.layers import OfLRSA, of_lrsa
from lrsa_ds.models.heads import num_kv_heads
from lrsa_ds.models.loading import empty_model
from lrsa_ds.models.patch import PreTrainedModel, check_supported
from lrsa_ds.models.quantized import check_quantizable
from lrsa_ds.models.recurrent import check_unshared
from lrsa_ds.models.rope import check_reach
from lrsa_ds.models.routers import router_coefficient
from lrsa_ds.models.structure import layers_of
from lrsa_ds.models.tiling import check_tiling
from lrsa_ds.objectives import check_objective
from lrsa_ds.parallel.mesh import check_world
from lrsa_ds.parallel.sequence.strategy import Sharing
from lrsa_ds.parallel.sequence.ulysses import check_dense
from lrsa_ds.registry import EXCHANGES
from lrsa_ds.settings.caches import caches_of
from lrsa_ds.telemetry.settings import check_telemetry


def check_model(config: TrainConfig, num_ranks: int | None = None) -> tuple[TrainConfig, PreTrainedModel]:
    """Checks that a model can be trained with this configuration, on any machine.

    Args:
        num_ranks: processes of the run; None for those that the launcher has started.

    Returns:
        The configuration with the settings of every layer, and the model on the meta device.
    """
    objective = check_objective(config)
    structure = empty_model(config.model)
    check_supported(structure)
    check_quantizable(config.model, structure)
    check_reach(structure.config, config.model.rope, "seq_len", config.seq_len)
    check_tiling(config, structure)
    router_coefficient(config.model, structure)
    config = replace(config, attention=config.attention.resolved(layers_of(structure.config)))
    check_sharing(config, structure, objective.retentions, num_ranks)
    check_telemetry(config, layers_of(structure.config))
    return config, structure


def check_sharing(
    config: TrainConfig, structure: PreTrainedModel, others: tuple[float, ...], num_ranks: int | None
) -> None:
    """Checks that `parallel.sp_size` ranks can share the sequences.

    In training, also with `others`, the retentions of the objective's passes, and in evaluation.
    """
    size, attention = config.parallel.sp_size, config.attention
    if size == 1:
        return
    check_unshared(structure, size)
    architecture = structure.config.get_text_config()
    check_world(size, num_ranks)
    row = config.seq_len * config.optim.micro_batch
    heads = architecture.num_attention_heads, num_kv_heads(architecture)
    strategy = EXCHANGES[config.parallel.exchange]
    every: list[OfLRSA] = [*attention.turns, *map(attention.with_retention, others)]
    every += [of_lrsa(cache.config) for cache in caches_of(attention, config.eval, layers_of(structure.config))]
    layers = {layer for settings in every for layer in settings.layers}
    for settings in sorted(layers, key=lambda layer: layer.retention, reverse=True):
        check = check_dense if settings.is_dense else strategy.check
        check(Sharing(size, row, "seq_len * optim.micro_batch", *heads, settings))
