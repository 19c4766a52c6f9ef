"""Prefilling and decoding of random models behind dense and compressed caches, for `launch/benchmark.py`."""

import argparse
import time
from collections.abc import Callable
from functools import partial

import torch
from transformers import AutoConfig, AutoModelForCausalLM, Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.generation.streamers import BaseStreamer

from benchmarks.timing import gpu_ms, peak_gb, percentiles, timed
from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, generate, prefill
from lrsa_ds.models import generation
from lrsa_ds.models.cache import cached_states
from lrsa_ds.models.liger import apply_liger

# Shapes of models whose weights do not matter: (hidden, intermediate, layers, query heads, KV heads).
SHAPES = {"tiny": (64, 128, 2, 4, 2), "1.5b": (1536, 8960, 28, 12, 2), "8b": (4096, 14336, 32, 32, 8)}
DECODED_TOKENS = 64
WARM_UP = 8  # tokens that are not timed: the first of them capture a graph


def settings_of(options: argparse.Namespace, retention: float) -> LRSAConfig:
    return LRSAConfig(sink_size=options.sink_size, lag_size=options.lag_size, retention=retention)


def random_model(shape: str, num_tokens: int, device: torch.device) -> PreTrainedModel:
    hidden, intermediate, layers, heads, kv_heads = SHAPES[shape]
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=32000,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=2 * num_tokens,
        tie_word_embeddings=True,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def captured(function: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The kernels of a call as a CUDA graph, which one launch of the host replays."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph


def cache_gb(cache: Cache) -> float:
    """Memory that the keys and values take."""
    states = [x for layer in cache.layers for x in (layer.keys, layer.values) if x is not None]
    return sum(x.untyped_storage().nbytes() for x in states) / 1e9


def use(model: PreTrainedModel, config: LRSAConfig | None, dense: str = "sdpa") -> None:
    """LRSA attention with these settings, or dense attention as transformers names it."""
    if config is None:
        model.set_attn_implementation(dense)
    else:
        apply_lrsa(model, config)


@torch.no_grad()
def generation_rows(options: argparse.Namespace, num_tokens: int, device: torch.device, add: Callable) -> None:
    """Rows of one context length: prefilling and decoding with the dense cache, and with each compressed one."""
    model = random_model(options.model, num_tokens, device)
    if options.liger:
        apply_liger(model)
    ids = torch.randint(0, 32000, (1, num_tokens), device=device)
    configs = [None, *(settings_of(options, retention) for retention in options.retention)]
    # The stock model does not compile its passes: with the option the dense cache is filled by `prefill` too.
    filled_alike = [settings_of(options, 1.0)] if options.compile else []

    def fill(config: LRSAConfig | None) -> Cache:
        if config is None:
            dense = DynamicCache(config=model.config)
            model(ids, past_key_values=dense, logits_to_keep=1)
            return dense
        cache = LagKVCache(config)
        passes = dict(chunks_at_once=options.chunks_at_once, max_tokens_at_once=options.max_tokens_at_once)
        prefill(model, ids, cache, **passes, compile=options.compile)
        return cache

    caches: list[Cache] = []
    for config in [*configs[:1], *filled_alike, *configs[1:]]:
        use(model, config, options.dense_attention)
        started = time.perf_counter()
        peak = peak_gb(lambda config=config: fill(config), device)
        first = time.perf_counter() - started
        filled = [timed(lambda config=config: caches.append(fill(config)), device) for _ in range(3)]
        del caches[-3:-1]
        values = percentiles(filled) | {"cache_gb": cache_gb(caches[-1]), "peak_gb": peak, "first_call_s": first}
        if config in filled_alike:
            add("dense too", None, "prefill" + _kernels(options), values)
            caches.pop()
        else:
            name = "dense" + f" {options.dense_attention}" * (options.dense_attention != "sdpa")
            add(name if config is None else "LRSA", config, "prefill" + _kernels(options), values)
    if not options.prefill_only:
        _eager_rows(model, configs, caches, add)


def _eager_rows(model: PreTrainedModel, configs: list[LRSAConfig | None], caches: list[Cache], add: Callable) -> None:
    """Rows of decoding without `generate`: from the host, and from a graph."""
    device = model.device
    token = torch.ones(1, 1, dtype=torch.int64, device=device)

    def step(cache: Cache, **kwargs) -> None:
        model(token, past_key_values=cache, **kwargs)

    times: list[list[float]] = [[] for _ in caches]
    for _ in range(DECODED_TOKENS):
        for config, cache, mine in zip(configs, caches, times, strict=True):
            use(model, config)
            mine.append(timed(lambda cache=cache: step(cache), device))
    for config, cache, mine in zip(configs, caches, times, strict=True):
        use(model, config)
        decoded = {**percentiles(mine[DECODED_TOKENS // 4 :]), "cache_gb": cache_gb(cache)}
        busy = {"gpu_ms": gpu_ms(lambda cache=cache: step(cache), device)}
        add("dense" if config is None else "LRSA", config, "decode one token", decoded | busy)
    if device.type != "cuda":
        return
    # The graphs read these tensors, which the caches let go of; their memory would be freed before the replay.
    read = [cached_states(cache) for cache in caches]
    graphs = []
    for config, cache in zip(configs, caches, strict=True):
        use(model, config)
        # A token sees all that is cached: no mask. While a graph is captured transformers would make one nevertheless,
        # and the dense attention with it takes six times as long.
        no_mask = {"attention_mask": {"full_attention": None}} if config is None else {}
        graphs.append(captured(lambda cache=cache, no_mask=no_mask: step(cache, **no_mask)))
    times = [[timed(graph.replay, device) for graph in graphs] for _ in range(DECODED_TOKENS)]
    for config, mine in zip(configs, zip(*times, strict=True), strict=True):
        add("dense" if config is None else "LRSA", config, "replay one token", percentiles(list(mine)))
    del read, graphs


class Clock(BaseStreamer):
    """When each token came, in seconds; the prompt comes first."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass

    def token_ms(self) -> list[float]:
        """Milliseconds from token to token, from the second on: the first comes from the prompt."""
        return [1e3 * (after - before) for before, after in zip(self.times[1:], self.times[2:], strict=False)]


def fill(cache: Cache, model: PreTrainedModel, num_tokens: int, streams: int) -> Cache:
    """Random keys and values of so many tokens, the same in every row: what they are makes no difference in time."""
    config = model.config
    shape = (1, config.num_key_value_heads, num_tokens, config.hidden_size // config.num_attention_heads)
    keys, values = torch.randn(2, *shape, device=model.device, dtype=model.dtype)
    if isinstance(cache, LagKVCache):
        cache.begin_pass(rows=None)
    for layer in range(config.num_hidden_layers):
        cache.update(*(x.expand(streams, -1, -1, -1) for x in (keys, values)), layer)
    if isinstance(cache, LagKVCache):
        cache.end_pass()
    return cache


def decoding_rows(options: argparse.Namespace, num_tokens: int, device: torch.device, add: Callable) -> None:
    """Rows of one context length: tokens through `lrsa_ds.generate`, the dense cache too, and transformers' own."""
    model = random_model(options.model, num_tokens, device)
    if options.liger:
        apply_liger(model)
    room = num_tokens + WARM_UP + DECODED_TOKENS + 2
    for streams in options.streams:
        what = f"token, {streams} stream{'s' * (streams > 1)}{_kernels(options)}"
        ours = partial(generate, compile=True) if options.compile else generate
        for retention in (1.0, *options.retention):
            config = settings_of(options, retention)
            apply_lrsa(model, config)
            cache = fill(LagKVCache(config, max_tokens=room), model, num_tokens, streams)
            names = ("dense", None) if config.is_dense else ("LRSA", config)
            add(*names, what, _through(ours, model, cache, streams))
            del cache
        model.set_attn_implementation("sdpa")
        # What compiles our steps makes no difference to transformers' own `generate`.
        for name in ("transformers", "compiled")[options.compile : 1 + options.compiled]:
            stock = DynamicCache(config=model.config) if name == "transformers" else StaticCache(model.config, room)
            add(
                name, None, what, _through(generation.generate, model, fill(stock, model, num_tokens, streams), streams)
            )
            del stock


def _kernels(options: argparse.Namespace) -> str:
    """What fuses the small kernels of the model, as part of the name of a row."""
    return ", Liger" * options.liger + ", compiled" * options.compile


def _through(
    answer: Callable[..., torch.Tensor], model: PreTrainedModel, cache: Cache, streams: int
) -> dict[str, float | str]:
    """Times of tokens that a function generates behind a filled cache."""
    given = int(cache.get_seq_length()) + 1
    text = torch.randint(0, 32000, (1, given), device=model.device).expand(streams, -1)
    options = dict(past_key_values=cache) if answer is generation.generate else dict(cache=cache)
    options |= dict(do_sample=False, attention_mask=torch.ones_like(text))
    started = time.perf_counter()
    text = answer(model, text, max_new_tokens=WARM_UP, **options)
    first = time.perf_counter() - started
    clock = Clock()
    options |= dict(attention_mask=torch.ones_like(text), streamer=clock)
    answer(model, text, max_new_tokens=DECODED_TOKENS, **options)
    return percentiles(clock.token_ms()) | {"cache_gb": cache_gb(cache), "first_call_s": first}
