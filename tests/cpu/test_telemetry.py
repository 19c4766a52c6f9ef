"""Telemetry against plain torch: what is dropped, what is kept, and the loss without it."""

import math
from dataclasses import replace

import pytest
import torch
from matplotlib.image import imread
from torch.nn.functional import cross_entropy

from lrsa_ds import LRSAConfig, apply_lrsa, lrsa_attention, select_kept
from lrsa_ds.data.packing import IGNORE, Example, packed
from lrsa_ds.data.tokenizer import byte_tokenizer
from lrsa_ds.errors import LRSAError
from lrsa_ds.evaluate.telemetry import measure_samples
from lrsa_ds.intervals import ratio_interval
from lrsa_ds.layers import resolve
from lrsa_ds.objectives import TargetLoss
from lrsa_ds.parallel.mesh import Mesh
from lrsa_ds.telemetry import probe as probe_module
from lrsa_ds.telemetry.answers import find_answers, spelling
from lrsa_ds.telemetry.measure import Measurement, some_of_each_task
from lrsa_ds.telemetry.probe import RetentionProbe
from lrsa_ds.telemetry.report import draw, layers_setting, rows, sentences, turns_setting
from lrsa_ds.telemetry.settings import every_layer, smallest_cache
from recipes.longeval import GeneratedSamples
from tests.cpu.test_config import composed, sentence
from tests.cpu.test_model import tiny

TOKENIZER = byte_tokenizer()
CONFIG = LRSAConfig(sink_size=3, lag_size=8, retention=0.3)
TEXT = "The key of the house is 4711, and that of the garden is 0815. Nobody else has one. "


class Alone(Mesh):
    """The mesh of one process that has no process group."""

    def sum(self, values):
        return [float(value) for value in values]


ALONE = Alone(0, 1, 0, torch.device("cpu"))


def example(context, *turns, task="qa"):
    """A document of the bytes of a context and of questions with their answers, each of which ends with a newline."""
    ids = TOKENIZER(context).input_ids
    labels = [IGNORE] * len(ids)
    for question, answer in turns:
        asked, said = (TOKENIZER(text).input_ids for text in (question, answer))
        ids, labels = [*ids, *asked, *said], labels + [IGNORE] * len(asked) + said
    return Example(ids, labels, task, 0)


EXAMPLES = [
    example(TEXT, ("House? ", "4711\n"), ("Garden? ", "0815\n")),
    example("Blue. ", ("Colour? ", "Blue\n")),  # too short to be compressed
    example(TEXT * 2, ("Who? ", "Nobody\n"), ("Where? ", "on Mars\n"), task="other"),
]
ROW = packed(EXAMPLES, 400, TOKENIZER.pad_token_id)


def make_model(num_layers=3, seed=0):
    torch.manual_seed(seed)
    model = tiny("qwen2", vocab_size=len(TOKENIZER), num_hidden_layers=num_layers)
    for parameter in model.parameters():  # attention that looks somewhere, so that it matters what is dropped
        parameter.data *= 4 if parameter.ndim == 2 else 1
    return apply_lrsa(model, CONFIG)


def pass_of(model):
    objective = TargetLoss(model, 64).eval()

    def run_pass(row, attention, num_slots, attend):
        tokens = {name: getattr(row, name)[None] for name in ("input_ids", "position_ids", "labels")}
        tokens |= {"document_lengths": row.document_lengths, "lrsa_config": attention}
        return objective(**tokens, num_slots=num_slots, attend=attend)

    return run_pass


def measurement(model, num_layers=3, examples=EXAMPLES, seq_len=400, compressed=CONFIG, **other):
    return Measurement(pass_of(model), compressed, num_layers, examples, seq_len, TOKENIZER, ALONE, **other)


@pytest.mark.parametrize(
    "answer,context,expected",
    [
        (["Ġcat"], ["The", "Ġcat", ",", "Ġcat", "s"], [1]),  # not in another word
        (["cat", "Ċ"], ["The", "Ġcat"], [1]),
        (["▁4", "71", "1"], ["▁is", "▁47", "11", "."], [1, 2]),
        (["7"], ["is", "Ġ47", "11"], []),
        (["New", "ĠYork"], ["New", "ĠYork", "ĠNew", "ĠYork"], [0, 1, 2, 3]),
        (["åĮĹ"], ["äº¬", "åĮĹ", "äº¬"], [1]),  # Chinese has no spaces
        (["Ċ"], ["a", "Ċ"], []),
        ([], ["a"], []),
        (["a"], [], []),
    ],
)
def test_spelling(answer, context, expected):
    assert spelling(answer, context) == expected


def test_answers_are_found_in_their_own_document():
    found = find_answers(ROW, TOKENIZER)
    ids = ROW.input_ids.tolist()
    said = [TOKENIZER.decode(ids[answer.first + 1 : answer.end + 1]) for answer in found]
    assert said == ["4711\n", "0815\n", "Blue\n", "Nobody\n", "on Mars\n"]
    lengths = [len(e.input_ids) for e in EXAMPLES]
    assert [answer.start for answer in found] == [0, 0, lengths[0], *[sum(lengths[:2])] * 2]
    spelled = [TOKENIZER.decode([ids[place] for place in answer.places]) for answer in found]
    assert spelled == ["4711", "0815", "Blue", "NobodyNobody", ""]
    assert all(answer.start <= place <= answer.first for answer in found for place in answer.places)


def test_what_ends_a_turn_or_opens_a_thought_is_not_the_answer():
    end = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
    (made,) = [example(TEXT, ("House? ", "4711"))]
    ids, labels = [*made.input_ids, end], [*made.labels, end]
    (answer,) = find_answers(packed([replace(made, input_ids=ids, labels=labels)], 200, 0), TOKENIZER)
    assert answer.end - answer.first == 5 and len(answer.places) == 4


def plain_sums(model, answers, config):
    """Dropped mass and share kept from whole attention matrices, by the definition of what a cache holds."""
    states = {}

    def record(q, k, v, settings, lengths, layer, extras):
        states[layer] = q, k, v, extras.scale
        return lrsa_attention(q, k, v, settings, lengths, layer=layer, extras=extras)

    pass_of(model)(ROW, config.at_retention(1.0), 64, record)
    starts = torch.tensor([0, *ROW.document_lengths]).cumsum(0).tolist()
    found = []
    for layer in sorted(states):
        q, k, v, scale = states[layer]
        group = q.shape[1] // k.shape[1]
        mass, shares = torch.zeros(k.shape[1]).double(), []
        for answer in answers:
            length = next(end - answer.start for end in starts if end > answer.start)
            document = slice(answer.start, answer.start + length)
            kept = select_kept(k[:, :, document], v[:, :, document], config.at_layer(layer), layer)[0]
            for t in range(answer.first - answer.start, answer.end - answer.start):
                window = max(0, (t - config.sink_size) // config.lag_size - 1)  # partitions before it
                for head in range(k.shape[1]):
                    held = {*range(config.sink_size), *kept[head, :window].flatten().tolist()}
                    held |= set(range(config.sink_size + window * config.lag_size, t + 1))
                    dropped = [j for j in range(t + 1) if j not in held]
                    for h in range(head * group, (head + 1) * group):
                        scores = (k[0, head, document][: t + 1] @ q[0, h, document][t]) * scale
                        mass[head] += scores.double().softmax(0)[dropped].sum() / group
                    if t == answer.first - answer.start:
                        past = config.sink_size + window * config.lag_size
                        left = [p - answer.start for p in answer.places if config.sink_size <= p - answer.start < past]
                        shares += [[head, sum(p in held for p in left) / len(left)]] if left else []
        kept_sums = [sum(share for head, share in shares if head == g) for g in range(k.shape[1])]
        found.append(torch.tensor([*mass.tolist(), *kept_sums, len(shares) / k.shape[1]]).double())
    return torch.stack(found)


@pytest.mark.parametrize("selection", ["lagkv", "random", "window"])
@pytest.mark.parametrize("at_once", [2**24, 200])
def test_the_probe_against_whole_attention_matrices(selection, at_once, monkeypatch):
    """Grouped heads, packed documents, several answers; also when queries are taken few at a time."""
    monkeypatch.setattr(probe_module, "PROBABILITIES_AT_ONCE", at_once)
    model, config = make_model(), replace(CONFIG, selection=selection)
    answers = find_answers(ROW, TOKENIZER)
    probe = RetentionProbe(config)
    probe.answers = answers
    with torch.no_grad():
        statistics = pass_of(model)(ROW, config.at_retention(1.0), 64, probe)
        expected = plain_sums(model, answers, config)
        unobserved = pass_of(model)(ROW, config.at_retention(1.0), 64, lrsa_attention)
    sums = torch.stack([probe.sums[layer] for layer in range(3)])
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(statistics, unobserved)  # the pass is the dense one
    assert (sums[:, :2] > 0.1).all() and (sums[:, 4] == 3).all()  # "Blue" is in a short document, "on Mars" nowhere


def nll_of_examples(model, layers):
    """From the logits of a model whose layers are set by `apply_lrsa`."""
    apply_lrsa(model, CONFIG, layers)
    found = []
    for made in EXAMPLES:
        logits = model(torch.tensor([made.input_ids]), use_cache=False).logits[0, :-1]
        found.append(cross_entropy(logits, torch.tensor(made.labels[1:]), ignore_index=IGNORE, reduction="sum").item())
    return found


def nll_of(model, layers):
    return sum(nll_of_examples(model, layers)) / ROW.num_target_tokens


@torch.no_grad()
def test_the_ablation_is_that_of_separate_passes():
    model = make_model()
    calls = []
    found = measurement(model, on_pass=lambda done, total: calls.append((done, total))).run(num_greedy=2)
    passes = 2 + 3 + 3 + 2
    assert calls == [(done, passes) for done in range(passes + 1)]

    def nll(*compressed):
        return nll_of(model, {i: 0.3 if i in compressed else 1.0 for i in range(3)})

    assert found.nll_dense == pytest.approx(nll(), rel=1e-5)
    assert found.nll_compressed == pytest.approx(nll(0, 1, 2), rel=1e-5)
    for loss in found.layers:
        assert loss.nll_increase == pytest.approx(nll(loss.layer) - nll(), abs=1e-5)
        assert abs(loss.nll_increase) > 1e-4  # the layers make a difference
    alone, dense = (nll_of_examples(model, {i: 0.3 if i in layers else 1.0 for i in range(3)}) for layers in ([1], []))
    counts = [sum(label != IGNORE for label in made.labels) for made in EXAMPLES]
    _, low, high = ratio_interval([a - b for a, b in zip(alone, dense, strict=True)], counts)
    assert found.layers[1].nll_increase_low == pytest.approx(low, abs=1e-5) and low < high
    assert found.layers[1].nll_increase_high == pytest.approx(high, abs=1e-5)
    first = min(range(3), key=lambda i: nll(*{0, 1, 2} - {i}))
    second = min({0, 1, 2} - {first}, key=lambda i: nll(*{0, 1, 2} - {first, i}))
    assert [step.layer for step in found.greedy] == [first, second]
    assert found.greedy[1].nll == pytest.approx(nll(*{0, 1, 2} - {first, second}), rel=1e-5)
    assert (found.num_examples, found.num_answers, found.num_answers_found) == (3, 5, 4)
    assert found.num_answer_tokens == ROW.num_target_tokens


@torch.no_grad()
def test_packing_changes_nothing():
    together, apart = (measurement(make_model(), seq_len=length).run() for length in (400, 260))
    for ours, theirs in zip(together.layers, apart.layers, strict=True):
        assert ours.dropped_mass == pytest.approx(theirs.dropped_mass, rel=1e-4)
        assert ours.answer_kept == pytest.approx(theirs.answer_kept)
        assert ours.nll_increase == pytest.approx(theirs.nll_increase, abs=1e-5)


def test_layers_that_are_kept_dense_are_measured_too():
    trained = resolve(CONFIG, {"0": 1.0, "1-": 0.5}, 3)
    assert every_layer(trained, 0.125) == CONFIG.at_retention(0.125)
    attention = composed("attention.layers={0: 1.0, 1-: 0.5}", "attention.lag_size=64").attention
    cache = smallest_cache(attention, [1.0, 0.25, 0.125])
    assert (cache.retention, cache.lag_size) == (0.125, 64)


@torch.no_grad()
def test_the_samples_of_an_evaluation():
    """Prompts with their answers: the same words in the text, and all targets those of the answer and its end."""
    source = GeneratedSamples(TOKENIZER, seed=0, num_depths=5)
    samples = [source.sample(task, 1500, index) for task in ("passkey", "needle") for index in (0, 2)]
    assert all(sample.max_new_tokens == len(sample.answer_ids) + 16 for sample in samples)
    found = measure_samples(
        make_model(), TOKENIZER, [*samples, source.sample("perplexity", 500, 0)], CONFIG, 0, ALONE, False
    )
    assert (found.num_examples, found.num_answers, found.num_answers_found) == (4, 4, 4)
    assert found.num_answer_tokens == sum(len(sample.answer_ids) for sample in samples)


def test_examples_are_taken_from_every_task_in_turn():
    examples = [Example([i], [i], task, i) for i, task in enumerate("aaaabbbc")]
    assert [e.index for e in some_of_each_task(examples, 5)] == [0, 4, 7, 1, 5]
    assert [e.index for e in some_of_each_task(examples, 1)] == [0, 4, 7]
    assert len(some_of_each_task(examples, 100)) == 8
    with pytest.raises(LRSAError, match="there is no answer among the examples"):
        measurement(make_model(), examples=[])


@pytest.mark.parametrize("dense", [[], [2], [0, 1, 5], [0, 1, 2, 3, 4, 5]])
def test_the_printed_setting_can_be_used(dense):
    setting = f"attention.layers={layers_setting(dense, 6, 0.125)}"
    attention = composed(setting).attention.resolved(6).at_step(0)
    assert [attention.at_layer(i).is_dense for i in range(6)] == [i in dense for i in range(6)]
    assert {attention.at_layer(i).retention for i in range(6)} <= {1.0, 0.125}


def test_the_printed_list_can_be_used():
    """Dense, nine, six and three layers in turn, as one setting."""
    order = [18, 23, 20, 17, 14, 24, 7, 3, 8]
    attention = composed(f"attention.layers={turns_setting(order, 30, 0.0)}").attention.resolved(30)
    dense = [[i for i in range(30) if turn.at_layer(i).is_dense] for turn in attention.turns]
    assert dense == [list(range(30)), sorted(order), sorted(order[:6]), sorted(order[:3])]
    assert {turn.at_layer(0).num_kept for turn in attention.turns[1:]} == {0}
    assert turns_setting([1], 2, 0.5) == "[{0-: 1.0}, {1: 1.0, rest: 0.5}]"
    assert turns_setting([1, 0], 2, 0.5) == "[{0-: 1.0}, {1: 1.0, rest: 0.5}]"


@torch.no_grad()
def test_rows_sentences_and_the_picture(tmp_path):
    found = measurement(make_model()).run(num_greedy=1)
    chosen = found.greedy[0]
    written = rows(found)
    assert [row["layer"] for row in written] == [0, 1, 2] and "layers" not in written[0]
    assert [row["layer"] for row in written if row.get("greedy_place") == 1] == [chosen.layer]
    worst = max(found.layers, key=lambda layer: layer.nll_increase)
    said, setting, turns = sentences(found)
    assert f"when they alone are compressed: {worst.layer} (+{worst.nll_increase:.3f})" in said
    assert f"with dense layers {chosen.layer}: 'attention.layers={layers_setting([chosen.layer], 3, 0.3)}'" in setting
    assert f"'attention.layers=[{{0-: 1.0}}, {{{chosen.layer}: 1.0, rest: 0.3}}]'" in turns
    nothing = dict(nll_increase=-0.1, nll_increase_low=math.nan, nll_increase_high=math.nan, answer_kept=None)
    none = replace(found, layers=[replace(layer, **nothing) for layer in found.layers])
    assert "no layer alone loses anything" in sentences(none)[0]
    for name, shown in (("some", found), ("none", none)):
        draw(shown, tmp_path / f"{name}.png", "a title")
        assert imread(tmp_path / f"{name}.png").std() > 0.05
    with pytest.raises(LRSAError, match="cannot be written"):
        draw(found, tmp_path / "no" / "such.png", "a title")


@pytest.mark.parametrize(
    "overrides,said",
    [
        (["eval.telemetry_greedy=2"], "eval.telemetry_greedy has no effect without telemetry"),
        (["eval.telemetry=true", "eval.before=false", "eval.after=false"], "eval.before or eval.after"),
        (["eval.telemetry=true", "eval.telemetry_examples=0"], "eval.telemetry_examples=0 is not valid"),
        (
            ["eval.telemetry=true", "parallel.sp_size=2"],
            "needs whole sequences on each rank, and parallel.sp_size is 2",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused(overrides, said):
    assert said in sentence(*overrides)
