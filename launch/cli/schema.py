"""What Hydra knows of a configuration while it composes one: every key, its type, and which keys are dictionaries."""

from dataclasses import fields, is_dataclass

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf


def register_schema(name: str, schema: type) -> None:
    """Makes the dataclass `schema` known to Hydra as `<name>_schema`, with which `conf/<name>.yaml` begins."""
    node = OmegaConf.structured(schema)
    _open_dictionaries(node, schema)
    ConfigStore.instance().store(name=f"{name}_schema", node=node)


def _open_dictionaries(node: DictConfig, schema: type) -> None:
    """Lets the dictionaries among the fields take keys of the user's own; a field of a dataclass stays checked.

    Hydra would refuse `data.columns.context=passage` as a misspelt key. A field that is a dictionary has to default to
    an empty one: OmegaConf cannot merge into None.
    """
    for field in fields(schema):
        if isinstance(field.type, type) and is_dataclass(field.type):
            if OmegaConf.is_missing(node, field.name):
                node[field.name] = field.type
            _open_dictionaries(node[field.name], field.type)
        elif isinstance(node[field.name], DictConfig):
            OmegaConf.set_struct(node[field.name], False)
