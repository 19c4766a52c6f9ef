"""What Hydra raises, as one sentence that names the key and the valid values."""

from hydra.errors import MissingConfigException
from omegaconf.errors import OmegaConfBaseException

from lrsa_ds.config import TrainConfig, config_sentence
from lrsa_ds.errors import LRSAError


def hydra_sentence(error: Exception, schema: type = TrainConfig) -> str:
    """One sentence for an error of ours, of OmegaConf or of Hydra; `schema` is the root of the configuration."""
    if isinstance(error, LRSAError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return f"there is no {error.missing_cfg_file}; valid here: {', '.join(sorted(error.options))}."
    for found in (error, error.__cause__):
        if isinstance(found, OmegaConfBaseException):
            return config_sentence(found, schema)
    return " ".join(str(error).split())
