"""`run_name: ${run_name:BASE}` in a configuration: BASE, attention and length, such as "qa_smollm2-lrsa-0.125-8192".

Without BASE it is the model's name. So runs that compare two settings have two names.
"""

from pathlib import Path

from omegaconf import Container, ListConfig, OmegaConf


def run_name(base: str = "", *, _root_: Container) -> str:
    def value(key: str):
        # A key that is missing or wrong gets an error of its own later, which says more.
        return OmegaConf.select(_root_, key, throw_on_missing=False)

    base = base or Path(str(value("model.name") or value("model.random.model_type") or "model")).name
    return f"{base}-{_attention(value('attention.kind'), value('attention.retention'))}-{value('seq_len')}"


def _attention(kind: object, retention: object) -> str:
    if kind != "lrsa":
        return str(kind)
    return "lrsa-mixed" if isinstance(retention, ListConfig) else f"lrsa-{retention}"
