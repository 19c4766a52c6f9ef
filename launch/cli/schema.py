"""The schema that Hydra composes with: all keys, their types, and which of them are dictionaries."""

from dataclasses import fields, is_dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf


def register_schema(name: str, schema: type) -> None:
    """Registers the dataclass `schema` with Hydra as `<name>_schema`, the first entry of `conf/<name>.yaml`."""
    node = OmegaConf.structured(schema)
    _open_dictionaries(node, schema)
    ConfigStore.instance().store(name=f"{name}_schema", node=node)


def _open_dictionaries(node: DictConfig, schema: type) -> None:
    """Allows the user's own keys in fields that are dictionaries; fields that are dataclasses stay checked.

    Otherwise Hydra would refuse `data.columns.context=passage` as a misspelt key. Such a field must have an empty
    dictionary as its default: OmegaConf cannot merge into None.
    """
    for field in fields(schema):
        if isinstance(field.type, type) and is_dataclass(field.type):
            if OmegaConf.is_missing(node, field.name):
                node[field.name] = field.type
            _open_dictionaries(node[field.name], field.type)
        elif isinstance(node[field.name], DictConfig):
            OmegaConf.set_struct(node[field.name], False)
