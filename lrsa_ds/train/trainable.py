"""What of a model is trained, and how its backward pass gets its activations."""

from lrsa_ds.config import TrainConfig
from lrsa_ds.models.adapters import add_adapters, freeze
from lrsa_ds.models.patch import PreTrainedModel, enable_checkpointing
from lrsa_ds.models.wrappers import freeze_encoders


def make_trainable(model: PreTrainedModel, config: TrainConfig) -> None:
    """Adds the adapters of a run, freezes what is not trained, and enables activation checkpointing, in place."""
    freeze_encoders(model)
    if config.model.lora.rank:
        add_adapters(model, config.model.lora)
    freeze(model, config.model.freeze)
    if config.activation_checkpointing:
        enable_checkpointing(model, config.memory.offload_checkpoints, config.memory.save_attention)
