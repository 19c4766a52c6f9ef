"""Names of runs in a configuration, chosen so that runs that compare settings have different names.

`${run_name:BASE}` is BASE, attention and length, such as "qa_smollm2-lrsa-0.125-8192"; without BASE it begins with the
model's name. `${evaluation_name:}` is "evaluate" and the model's name.
"""

import re
from pathlib import Path

from omegaconf import Container, ListConfig, OmegaConf

# Parts of a path that do not identify a model: the directory of an export, and the time of a run.
ALIKE = re.compile(r"model|best|[\d_-]+")


def run_name(base: str = "", *, _root_: Container) -> str:
    attention = _attention(*(_value(_root_, f"attention.{key}") for key in ("kind", "retention", "layers")))
    return f"{base or _model(_root_)}-{attention}-{_value(_root_, 'seq_len')}"


def evaluation_name(*, _root_: Container) -> str:
    return f"evaluate-{_model(_root_)}"


def _value(root: Container, key: str):
    # A missing or wrong key is reported later, with a better message.
    return OmegaConf.select(root, key, throw_on_missing=False)


def _model(root: Container) -> str:
    """The last part of the model's name that identifies it, or the type of a random model."""
    parts = Path(str(_value(root, "model.name") or _value(root, "model.random.model_type") or "model")).parts
    return next((part for part in reversed(parts) if not ALIKE.fullmatch(part) and part != "/"), "model")


def _attention(kind: object, retention: object, layers: object) -> str:
    if kind != "lrsa":
        return str(kind)
    if layers:
        return "lrsa-layers"
    return "lrsa-mixed" if isinstance(retention, ListConfig) else f"lrsa-{retention}"
