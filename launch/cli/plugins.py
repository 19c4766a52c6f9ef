"""The user's modules that extend lrsa_ds: imported before the settings that may name what they register."""

from typing import Any

from omegaconf import DictConfig

from lrsa_ds.config import typed_config
from recipes.user_code import import_code


def typed_with_plugins(composed: DictConfig, schema: type) -> Any:
    """`typed_config`, after the modules of the key `plugins` have been imported.

    Raises:
        LRSAError: a plugin cannot be imported, or `typed_config` raises it.
    """
    for name in composed.plugins:
        import_code(f"plugins: {name!r}", name)
    return typed_config(composed, schema)
