"""The model class `lrsa` of the LM evaluation harness (the extra `lm-eval`): any of its tasks under a compressed cache.

Log-likelihoods are those of a pass with LRSA attention, which is the function that inference with the cache computes;
answers are generated behind the cache itself. Importing this module registers the class.
"""

from typing import Any, cast

from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel

from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.config import CacheConfig
from lrsa_ds.layers import AnyConfig, from_saved
from lrsa_ds.lrsa_config import require_retention
from lrsa_ds.models.patch import apply_lrsa


@register_model("lrsa")
class LRSAModel(HFLM):
    """As the harness's own `hf`, and with the same arguments, under LRSA attention.

    Args:
        pretrained: a directory that training has exported, any other model, or one that is loaded.
        retention: the share of each partition that is kept; None takes what the model was trained with.
        sink_size, lag_size, selection: as in `cache` of `launch/evaluate.py`.

    Raises:
        LRSAError: a setting is not valid, or the model has no LRSA settings and there is no `retention`.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        retention: float | None = None,
        sink_size: int | None = None,
        lag_size: int | None = None,
        selection: str | None = None,
        **options: Any,
    ):
        cache = CacheConfig(sink_size=sink_size, lag_size=lag_size, selection=selection)
        if retention is not None:
            require_retention("retention", retention)
        super().__init__(pretrained, **options)
        model = cast(PreTrainedModel, self.model)
        trained = getattr(model.config, "lrsa", None)
        if retention is None:
            apply_lrsa(model, _own_cache(cache, trained))
        else:
            apply_lrsa(model, cache.attention(trained, retention))


def _own_cache(cache: CacheConfig, trained: dict | None) -> AnyConfig:
    """The smallest cache of the training, with what `cache` says otherwise."""
    if trained is None:
        raise LRSAError("the model was saved without LRSA settings: give retention, from 0 to 1.")
    own = from_saved(trained).saved()
    return cache.caches(own) if "layers" in own else cache.attention(own, own["retention"])
