"""Caches of fixed storage and `lrsa_ds.generate` against the growing cache and `model.generate`."""

import copy
import warnings
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import MaxLengthCriteria, MaxTimeCriteria, TextIteratorStreamer

import lrsa_ds
from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, new_cache, prefill
from lrsa_ds.attention.decoding import Step, attend_entries
from lrsa_ds.attention.extras import PLAIN
from lrsa_ds.attention.partition import num_held
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.models import step_graph
from lrsa_ds.models.decoder import Decoder
from tests.cpu.test_model import tiny
from tests.helpers import assert_close

CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
MIXED = {"0": 1.0, "1": {"retention": 0.0, "lag_size": 5}, "2": {"sink_size": 0, "lag_size": 11}, "rest": 0.3}
OPERATORS = (torch.ops.lrsa_ds.few_rows.default, torch.ops.lrsa_ds.attend_step.default, torch._C._nn.linear)
GREEDY = dict(max_new_tokens=40, do_sample=False, pad_token_id=0)


def make(config=CONFIG, layers=None, **settings):
    return apply_lrsa(tiny("qwen2", vocab_size=300, **settings), config, layers)


def tokens(count, batch=1):
    return torch.randint(1, 101, (batch, count))


def logits_of_training(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.fixture
def mixed():
    return make(layers=MIXED, num_hidden_layers=4, num_key_value_heads=1)


@pytest.mark.parametrize(
    "settings", [{}, dict(sink_size=0), dict(retention=0.9), dict(retention=1.0), dict(retention=0.0, sink_size=20)]
)
def test_most_that_is_held(settings):
    config = LRSAConfig(**(dict(sink_size=3, lag_size=8, retention=0.3) | settings))
    for most in range(1, 90):
        assert config.most_held(most) == 1 + max(num_held(seen, config) for seen in range(most))


RULES = [{}, dict(value_weight=0.3), dict(selection="key_norm"), dict(selection="random"), dict(selection="window")]


@pytest.mark.parametrize("settings", [*RULES, dict(sink_size=0), dict(lag_size=7, retention=0.5), dict(retention=1.0)])
@pytest.mark.parametrize("steps", [(1,) * 83, (45, *[1] * 38), (20, 13, 1, 1, 30, 18)])
def test_passes_give_the_logits_of_training(settings, steps):
    config = LRSAConfig(**(dict(sink_size=3, lag_size=8, retention=0.3) | settings))
    model, ids = make(config), tokens(83)
    cache, growing, found, addresses = LagKVCache(config, max_tokens=83), LagKVCache(config), [], set()
    with torch.no_grad():
        for part in ids.split(steps, dim=1):
            found.append(model(part, past_key_values=cache).logits)
            model(part, past_key_values=growing)
            assert cache.num_held == growing.num_held == num_held(cache.get_seq_length(), config)
            addresses.add(tuple(cache.storage))
            for fixed, other in zip(cache.layers, growing.layers, strict=True):
                assert_close(fixed.keys, other.keys, 1e-5, "keys")
    assert (torch.cat(found, dim=1) - logits_of_training(model, ids)).abs().max() <= 1e-4
    assert len(addresses) == 1
    assert cache.num_bytes == 2 * 2 * 2 * 12 * 4 * config.most_held(83)


def decoded(model, ids, cache, given, mask=None, compiles=False):
    """Logits behind the tokens of `ids` from `given` on, each from a step as `generate` makes it."""
    prefill(model, ids[:, :given], cache, attention_mask=mask)
    decoder, found = Decoder(model, captures=False, compiles=compiles), []
    decoder.start(cache)
    for column in ids[:, given:].T:
        found.append(decoder(cache, column).clone())
        decoder.end_step(cache)
    decoder.finish(cache)
    return torch.stack(found, dim=1)


@pytest.mark.parametrize("settings", [*RULES, dict(sink_size=0), dict(lag_size=7, retention=0.5), dict(retention=1.0)])
def test_steps_give_the_logits_of_training(settings):
    config = LRSAConfig(**(dict(sink_size=3, lag_size=8, retention=0.3) | settings))
    model, ids, cache = make(config), tokens(71, batch=2), LagKVCache(config, max_tokens=71)
    found = decoded(model, ids, cache, given=13)
    assert (found - logits_of_training(model, ids)[:, 13:]).abs().max() <= 1e-4
    assert cache.get_seq_length() == 71 and cache.num_held == num_held(71, config)


def test_steps_of_layers_that_differ(mixed):
    ids, cache = tokens(77), new_cache(mixed, max_tokens=77)
    assert (decoded(mixed, ids, cache, given=30) - logits_of_training(mixed, ids)[:, 30:]).abs().max() <= 1e-4
    assert cache.num_held == num_held(77, cache.config)


def cache_of_padded_rows(model, compiles=False):
    """A cache of fixed storage behind rows of 40, 9 and 25 tokens and 40 steps, which give the logits of training."""
    ids, lengths = tokens(80, batch=3), (40, 9, 25)
    mask = torch.arange(40) >= 40 - torch.tensor(lengths)[:, None]
    cache = new_cache(model, max_tokens=80)
    found = decoded(model, ids, cache, given=40, mask=mask, compiles=compiles)
    for row, length in enumerate(lengths):
        alone = logits_of_training(model, ids[row : row + 1, 40 - length :])[0, length:]
        assert (found[row] - alone).abs().max() <= 1e-4
    return cache


def test_steps_of_rows_of_different_lengths(mixed):
    cache = cache_of_padded_rows(mixed)
    assert cache.row_lengths == (80, 49, 65)
    assert cache.num_held == sum(num_held(length, cache.config) for length in cache.row_lengths) / 3


def test_compiled_steps(mixed, monkeypatch):
    """Without a break in the graph, and once for all sizes and contents of caches, as the passes over prompts.

    Operators are joined as on a GPU.
    """
    graphs = []

    def join(graph):
        step_graph.join_operators(graph)
        graphs.append([(node.target, node.args) for node in graph.nodes])

    monkeypatch.setattr(step_graph, "can_join", lambda x, parameters: True)
    monkeypatch.setattr("lrsa_ds.models.decoder.join_operators", join)
    torch._dynamo.utils.counters.clear()
    cache_of_padded_rows(mixed, compiles="aot_eager")
    ids = tokens(60, batch=3)
    expected = lrsa_ds.generate(mixed, ids, **GREEDY)
    assert torch.equal(lrsa_ds.generate(mixed, ids, compile="aot_eager", **GREEDY), expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2
    assert not torch._dynamo.utils.counters["graph_break"]
    joined, attended, linear = ([args for target, args in graphs[0] if target is given] for given in OPERATORS)
    # Queries, keys and values; output; gate and up; down. With a norm in front, or a residual behind.
    layer = [
        (3, 3, False, True, False),
        (1, 0, False, False, True),
        (2, 0, True, True, False),
        (1, 0, False, False, True),
    ]
    found = [
        (len(w), len(b), gated, norm is not None, added is not None) for _, w, b, gated, norm, _, added, *_ in joined
    ]
    assert found == [*layer * 4, (1, 0, False, True, False)]
    # Gate and up fetch a part of what is read behind them.
    behind = [after[1][0] if args[3] else None for args, after in pairwise(joined)]
    assert [args[7] if len(args) > 7 else None for args in joined] == [*behind, None]
    # With cosine and sine, which all layers but the first find where they are.
    assert [(len(args), args[-1]) for args in attended] == [(13, False)] + [(13, True)] * 3
    assert not linear


class Calls(TorchDispatchMode):
    """What is asked of the device: functions, and the shapes that they are given."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.made.append((str(function), [tuple(x.shape) for x in args if isinstance(x, torch.Tensor)]))
        return function(*args, **(kwargs or {}))


def test_a_step_asks_the_device_for_nothing_and_the_same_each_time(mixed):
    ids, cache, asked = tokens(60), new_cache(mixed, max_tokens=60), []
    prefill(mixed, ids[:, :30], cache)
    decoder = Decoder(mixed, captures=False)
    decoder.start(cache)
    for column in ids[:, 30:].T:
        with Calls() as calls:
            decoder(cache, column)
        decoder.end_step(cache)
        asked.append(calls.made)
    assert all(made == asked[0] for made in asked)
    names = {name for name, _ in asked[0]}
    assert not [name for name in names if "scalar_dense" in name or "nonzero" in name or "masked_select" in name]


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(do_sample=False, repetition_penalty=1.3, min_new_tokens=5),
        dict(do_sample=True, temperature=0.7, top_p=0.9),
        dict(do_sample=True, top_k=20, num_return_sequences=2),
    ],
)
@pytest.mark.parametrize("padded", [False, True])
def test_answers_are_those_of_model_generate(options, padded):
    model, ids = make(), tokens(45, batch=3)
    model.generation_config.eos_token_id = list(range(20))  # rows end at different tokens
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :20] = mask[2, :40] = 0
    options = options | dict(attention_mask=mask, max_new_tokens=40, pad_token_id=299)
    torch.manual_seed(3)
    expected = model.generate(ids, **options)
    for generate in (lrsa_ds.generate, lambda *args, **more: model.generate(*args[1:], **more)):
        torch.manual_seed(3)
        more = {} if generate is lrsa_ds.generate else dict(cache_implementation="static")
        assert torch.equal(generate(model, ids, **options, **more), expected)


@pytest.mark.parametrize("criterion", [MaxLengthCriteria(52), MaxTimeCriteria(0.0)])
def test_criteria_of_the_caller(criterion):
    model, ids = make(), tokens(45, batch=2)
    expected = model.generate(ids, stopping_criteria=[criterion], **GREEDY)
    assert expected.shape[1] < 60
    assert torch.equal(lrsa_ds.generate(model, ids, stopping_criteria=[criterion], **GREEDY), expected)


def test_several_turns_behind_one_cache(mixed):
    text, cache, growing = tokens(30), new_cache(mixed, max_tokens=210), new_cache(mixed)
    prefill(mixed, text[:, :20], cache)
    for _ in range(3):
        expected = mixed.generate(text, past_key_values=growing, **GREEDY)
        assert torch.equal(lrsa_ds.generate(mixed, text, cache, **GREEDY), expected)
        assert cache.get_seq_length() == expected.shape[1] - 1
        text = torch.cat([expected, tokens(5)], dim=1)
    storage, decoder = cache.storage, cache.decoder
    cache.reset()
    assert torch.equal(lrsa_ds.generate(mixed, text, cache, **GREEDY), mixed.generate(text, **GREEDY))
    assert (cache.storage, cache.decoder) == (storage, decoder)


def test_a_copy_of_a_cache_goes_its_own_way():
    model, ids, cache = make(), tokens(45), LagKVCache(CONFIG, max_tokens=120)
    text = torch.cat([lrsa_ds.generate(model, ids, cache, **GREEDY), tokens(3)], dim=1)
    copied = copy.deepcopy(cache)
    expected = lrsa_ds.generate(model, text, cache, max_new_tokens=9, do_sample=False)
    assert torch.equal(lrsa_ds.generate(model, text, copied, max_new_tokens=9, do_sample=False), expected)


@pytest.mark.parametrize("padded", [False, True])
def test_a_fixed_copy_of_a_growing_cache(mixed, padded):
    ids, growing = tokens(45, batch=2), new_cache(mixed)
    mask = torch.ones_like(ids)
    mask[1, : 30 * padded] = 0
    prefill(mixed, ids[:, :-1], growing, attention_mask=mask[:, :-1])
    cache = growing.fixed(max_tokens=85)
    assert cache.num_held == growing.num_held and cache.row_lengths == growing.row_lengths
    options = GREEDY | dict(attention_mask=mask)
    found = lrsa_ds.generate(mixed, ids, cache, **options)
    assert torch.equal(found, mixed.generate(ids, past_key_values=growing, **options))
    with pytest.raises(LRSAError, match="text of 84 tokens does not fit into a cache of max_tokens=60"):
        growing.fixed(max_tokens=60)


def test_beams_and_samples_behind_a_fixed_cache():
    model, ids = make(), tokens(45, batch=2)
    options = GREEDY | dict(num_beams=3)
    cache = LagKVCache(CONFIG, max_tokens=90)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
    prefilled = LagKVCache(CONFIG, max_tokens=90)
    prefill(model, ids[:, :-1], prefilled)
    torch.manual_seed(1)
    found = lrsa_ds.generate(model, ids, prefilled, do_sample=True, num_return_sequences=2, max_new_tokens=9)
    torch.manual_seed(1)
    assert torch.equal(found, model.generate(ids, do_sample=True, num_return_sequences=2, max_new_tokens=9))


def test_tokens_are_streamed_and_stop_strings_end_a_row():
    model, ids, tokenizer = make(), tokens(45), byte_tokenizer()
    options = dict(max_new_tokens=40, do_sample=True, pad_token_id=0)

    def said(generate, **more):
        torch.manual_seed(2)
        return generate(**options, **more)

    whole = said(partial(lrsa_ds.generate, model, ids))
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    assert torch.equal(said(partial(lrsa_ds.generate, model, ids), streamer=streamer), whole)
    assert "".join(streamer) == tokenizer.decode(whole[0, 45:])
    stop = next(text for text in map(tokenizer.decode, whole[0, 50:]) if text.isascii() and text.isalnum())
    options |= dict(tokenizer=tokenizer, stop_strings=[stop])
    found = said(partial(lrsa_ds.generate, model, ids))
    assert torch.equal(found, said(partial(model.generate, ids)))
    assert found.shape[1] < whole.shape[1] and tokenizer.decode(found[0, -1]) == stop


def test_what_a_dense_cache_keeps_goes_into_a_fixed_one():
    model, ids = make(), tokens(60)
    dense = new_cache(model, {"0-": 1.0})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other settings than those of the training
        prefill(model, ids, dense)
    cache, growing = (LagKVCache.from_dense(dense, CONFIG, *most) for most in ((99,), ()))
    assert cache.num_held == growing.num_held < 60
    following = tokens(30)
    found = [model(following, past_key_values=each).logits for each in (cache, growing)]
    assert_close(found[0], found[1], 1e-5, "logits")


@pytest.mark.parametrize("groups", [1, 3])
def test_entries_outside_of_a_row_are_not_seen(groups):
    q, k, v = torch.randn(2, 2 * groups, 1, 12), torch.randn(2, 2, 30, 12), torch.randn(2, 2, 30, 12)
    step = Step([(k, v)])
    step.set([4, 5], [19], [[7, 0]])
    step.advance()
    assert step.positions.tolist() == [[5], [6]] and step.places.tolist() == [[20]]
    found = attend_entries(q, k, v, step.firsts[0], step.places[0], PLAIN)
    for row, first in enumerate((7, 0)):
        keys, values = (x[row, :, first:21].repeat_interleave(groups, dim=0) for x in (k, v))
        scores = (q[row] @ keys.transpose(1, 2) / 12**0.5).softmax(-1)
        assert_close(found[row], scores @ values, 1e-5, "output")


def test_mistakes_of_generate():
    model, ids = make(), tokens(30)
    full = LagKVCache(CONFIG, max_tokens=40)
    prefill(model, ids, full)
    dense = apply_lrsa(tiny("llama"), CONFIG)
    dense.set_attn_implementation("sdpa")
    for said, call in (
        ("prompt and answer may take 69 tokens .* max_tokens=20:", lambda: lrsa_ds.generate(
            model, ids, LagKVCache(CONFIG, max_tokens=20), **GREEDY)),
        ("text of 30 tokens does not fit into a cache of max_tokens=20", lambda: prefill(
            model, ids, LagKVCache(CONFIG, max_tokens=20))),
        ("text of 41 tokens does not fit", lambda: model.generate(
            torch.cat([ids, ids[:, :1]], dim=1), past_key_values=copy.deepcopy(full), **GREEDY)),
        (r"input_ids \[1, 0\] has no tokens", lambda: lrsa_ds.generate(model, ids[:, :0], **GREEDY)),
        ("batch of 1 and was given one of 2", lambda: lrsa_ds.generate(
            model, tokens(31, batch=2), copy.deepcopy(full), max_new_tokens=3)),
        ("has no LRSA settings", lambda: lrsa_ds.generate(tiny("llama"), ids, **GREEDY)),
        ("the attention of the model is 'sdpa'", lambda: lrsa_ds.generate(dense, ids, **GREEDY)),
        ("a cache of fixed storage: give .*max_tokens", lambda: lrsa_ds.generate(model, ids, LagKVCache(CONFIG))),
        ("the cache has seen 30 tokens, and input_ids has 30", lambda: lrsa_ds.generate(model, ids, full)),
        ("ask for beam search", lambda: lrsa_ds.generate(model, ids, num_beams=2, **GREEDY)),
        ("neither use_cache=False nor", lambda: lrsa_ds.generate(model, ids, use_cache=False, **GREEDY)),
        ("give tokenizer=", lambda: lrsa_ds.generate(model, ids, stop_strings="a", **GREEDY)),
        ("graph=True needs the complete model on one CUDA", lambda: lrsa_ds.generate(model, ids, graph=True, **GREEDY)),
        ("max_tokens=0 is not valid", lambda: new_cache(model, max_tokens=0)),
    ):  # fmt: skip
        with pytest.raises(LRSAError, match=said):
            call()


class StopsAfter(TextIteratorStreamer):
    """A streamer that fails at a token, as where a user interrupts."""

    def __init__(self, count):
        super().__init__(byte_tokenizer())
        self.left = count

    def put(self, value):
        self.left -= 1
        if self.left < 0:
            raise InterruptedError


def test_an_answer_that_was_interrupted_can_be_continued(mixed):
    ids = tokens(30)
    expected = lrsa_ds.generate(mixed, ids, **GREEDY)
    cache = new_cache(mixed, max_tokens=70)
    with pytest.raises(InterruptedError):
        lrsa_ds.generate(mixed, ids, cache, streamer=StopsAfter(25), **GREEDY)
    seen = cache.get_seq_length()
    assert 30 < seen < 60
    options = GREEDY | dict(max_new_tokens=69 - seen)
    assert torch.equal(lrsa_ds.generate(mixed, expected[:, : seen + 1], cache, **options), expected)
