"""Documents, padding and positions of a pass: honoured as if each document were alone, or refused in one sentence."""

import pytest
import torch
from transformers import DataCollatorWithFlattening

from lrsa_ds import LagKVCache, LRSAConfig, apply_lrsa, prefill
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.documents import document_lengths
from tests.cpu.test_model import FAMILIES, tiny
from tests.helpers import assert_close

CONFIG = LRSAConfig(sink_size=2, lag_size=8, retention=0.25)
LENGTHS = (50, 7, 1, 41)
TOTAL = sum(LENGTHS)


def make(family="llama"):
    return apply_lrsa(tiny(family), CONFIG)


def restarting(lengths, start=0):
    return torch.cat([torch.arange(n) + start for n in lengths])[None]


def numbers(lengths, first):
    return torch.arange(first, first + len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def alone(model, ids, lengths):
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)


WAYS = {
    "positions": dict(position_ids=restarting(LENGTHS)),
    "positions and a mask of ones": dict(position_ids=restarting(LENGTHS), attention_mask=torch.ones(1, TOTAL).long()),
    "cumulative": dict(cu_seq_lens_q=cumulative(LENGTHS), cu_seq_lens_k=cumulative(LENGTHS), max_length_q=50),
    "cumulative, in a list": dict(cu_seqlens=cumulative(LENGTHS).tolist()),
    "cumulative, padded": dict(cu_seq_lens_q=cumulative((*LENGTHS, 0, 0))),
    "lengths": dict(document_lengths=LENGTHS),
    "seq_idx": dict(seq_idx=numbers(LENGTHS, 0).int()),
    "mask of numbers": dict(attention_mask=numbers(LENGTHS, 1)),
    "all of them": dict(
        position_ids=restarting(LENGTHS),
        cu_seq_lens_q=cumulative(LENGTHS),
        seq_idx=numbers(LENGTHS, 0),
        attention_mask=numbers(LENGTHS, 1),
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_documents_are_found(way):
    model, ids = make(), torch.randint(0, 101, (1, TOTAL))
    expected = alone(model, ids, LENGTHS)
    for options in ({"use_cache": False}, {}):
        assert (model(ids, **WAYS[way], **options).logits - expected).abs().max() <= 1e-5
    hidden = model.get_decoder()(ids, **WAYS[way], use_cache=False).last_hidden_state
    assert (model.lm_head(hidden) - expected).abs().max() <= 1e-5


def test_positions_may_start_elsewhere_than_at_0():
    model, ids, positions = make(), torch.randint(0, 101, (1, TOTAL)), restarting(LENGTHS, start=2)
    packed = model(ids, position_ids=positions, use_cache=False).logits
    parts = zip(ids.split(LENGTHS, dim=1), positions.split(LENGTHS, dim=1), strict=True)
    expected = [model(part, position_ids=where, use_cache=False).logits for part, where in parts]
    assert (packed - torch.cat(expected, dim=1)).abs().max() <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_the_batch_of_a_flattening_collator_in_a_training_step(family):
    """Loss and every gradient are those of the documents one by one."""
    model = make(family).train()
    documents = [torch.randint(0, 101, (n,)).tolist() for n in (50, 30, 45)]
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True, return_tensors="pt")
    batch = collate([{"input_ids": document} for document in documents])
    model(**batch, num_items_in_batch=122).loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for document in documents:
        ids = torch.tensor([document])
        model(ids, labels=ids, num_items_in_batch=122).loss.backward()
    for one, other in zip(packed, (p.grad for p in model.parameters()), strict=True):
        assert_close(one, other, 1e-5, "gradient")


def test_rows_with_documents_of_their_own():
    rows = [(50, 14), (20, 25, 19), (64,)]
    model, ids = make("qwen2"), torch.randint(0, 101, (3, 64))
    expected = torch.cat([alone(model, ids[i : i + 1], lengths) for i, lengths in enumerate(rows)])
    flat = [length for row in rows for length in row]
    ways = [
        dict(position_ids=torch.cat([restarting(row) for row in rows])),
        dict(attention_mask=torch.cat([numbers(row, 1) for row in rows])),
        dict(seq_idx=torch.cat([numbers(row, 0) for row in rows])),
        dict(cu_seq_lens_q=cumulative(flat)),
        dict(document_lengths=tuple(flat)),
    ]
    for way in ways:
        assert (model(ids, use_cache=False, **way).logits - expected).abs().max() <= 1e-5
    same = model(ids, use_cache=False, position_ids=restarting((40, 24))).logits  # one row of positions for all
    assert (same - torch.cat([alone(model, row[None], (40, 24)) for row in ids])).abs().max() <= 1e-5


def test_packed_documents_with_padding_on_their_right():
    model, ids = make(), torch.randint(0, 101, (1, 80))
    expected = alone(model, ids[:, :70], (40, 30))
    zeros = torch.zeros(1, 10, dtype=torch.int64)
    mask, tail = torch.ones(1, 80, dtype=torch.int64), torch.ones_like(zeros)
    mask[:, 70:] = 0
    ways = [
        dict(attention_mask=torch.cat([numbers((40, 30), 1), zeros], dim=1)),
        dict(attention_mask=mask, position_ids=torch.cat([restarting((40, 30)), tail], dim=1)),
        dict(cu_seq_lens_q=cumulative((40, 30)), position_ids=torch.cat([restarting((40, 30)), zeros], dim=1)),
        dict(seq_idx=torch.cat([numbers((40, 30), 0), -tail], dim=1)),
        dict(attention_mask=torch.cat([numbers((40,), 1), zeros, numbers((30,), 2)], dim=1)),
    ]
    for way in ways[:-1]:
        assert (model(ids, use_cache=False, **way).logits[:, :70] - expected).abs().max() <= 1e-5
    between = model(ids, use_cache=False, **ways[-1]).logits
    assert (between[:, 50:] - model(ids[:, 50:], use_cache=False).logits).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "given,said",
    [
        (dict(position_ids=torch.tensor([[0, 1, 2, 7, 8, 9]])), "go from 2 to 7 at token 3 of row 0"),
        (dict(position_ids=torch.tensor([[0, 1, 2]])), r"position_ids \[1, 3\] does not fit the 1 x 6 tokens"),
        (dict(seq_idx=torch.tensor([[0, 0, 1, 1, 0, 0]])), "seq_idx has a document in several pieces"),
        (dict(attention_mask=torch.tensor([[1, 1, 2, 2, 1, 1]])), "attention_mask has a document in several pieces"),
        (dict(attention_mask=torch.tensor([[1, 1, 0, 1, 2, 2]])), "attention_mask has a document in several pieces"),
        (dict(attention_mask=torch.tensor([[0, 1, 1, 2, 2, 2]])), "begins with padding"),
        (dict(attention_mask=torch.tensor([[1, 1, 1, 1, 1]])), r"attention_mask \[1, 5\] does not fit the 1 x 6"),
        (dict(attention_mask=torch.tensor([[0.0, 0.0, 0.0, 0.0, 0.0, -9.0]])), "attention_mask has negative values"),
        (dict(attention_mask=torch.ones(1, 6, 6)), "4D attention_mask is not supported"),
        (dict(attention_mask={"full_attention": torch.ones(1, 1, 6, 6)}), "4D attention_mask is not supported"),
        (dict(cu_seq_lens_q=torch.tensor([0, 3, 7])), r"cu_seq_lens_q=\[0, 3, 7\] is not valid"),
        (dict(cu_seq_lens_q=torch.tensor([2, 6])), r"cu_seq_lens_q=\[2, 6\] is not valid"),
        (dict(cu_seq_lens_q=torch.tensor([0, 4, 3, 6])), "is not valid"),
        (
            dict(cu_seq_lens_q=torch.tensor([0, 3, 6]), cu_seq_lens_k=torch.tensor([0, 2, 6])),
            "cu_seq_lens_q and cu_seq_lens_k describe different documents",
        ),
        (
            dict(cu_seq_lens_q=torch.tensor([0, 3, 6]), position_ids=torch.tensor([[0, 1, 0, 1, 2, 3]])),
            "cu_seq_lens and position_ids describe different documents",
        ),
        (
            dict(cu_seq_lens_q=torch.tensor([0, 3, 6]), position_ids=torch.arange(6)[None]),
            "position_ids run on from one document of cu_seq_lens to the next",
        ),
        (dict(document_lengths=(3, 2)), "document_lengths sum to 5, and there are 6 tokens"),
    ],
)
def test_what_cannot_be_honoured_is_refused(given, said):
    with pytest.raises(LRSAError, match=said):
        make()(torch.randint(0, 101, (1, 6)), use_cache=False, **given)


def test_a_document_may_not_go_on_in_the_next_row():
    with pytest.raises(LRSAError, match="continues in the next row"):
        document_lengths({"cu_seq_lens_q": torch.tensor([0, 5, 8])}, 2, 4)
    with pytest.raises(LRSAError, match="leave a row without tokens"):
        document_lengths({"cu_seq_lens_q": torch.tensor([0, 4])}, 2, 4)


MASKS = {
    "left": [[0] * 5 + [1] * 40, [1] * 45],
    "right": [[1] * 40 + [0] * 5, [1] * 45],
    "middle": [[1] * 20 + [0] * 5 + [1] * 20, [1] * 45],
    "one in the middle": [[1] * 45, [1] * 30 + [0] + [1] * 14],
    "left and right": [[0] * 5 + [1] * 40, [1] * 40 + [0] * 5],
    "only the last": [[1] * 44 + [0], [1] * 45],
}


@pytest.mark.parametrize("place", MASKS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_padding_is_left_out_wherever_a_cache_is_filled(place, dtype):
    model, ids, mask = make(), torch.randint(1, 101, (2, 45)), torch.tensor(MASKS[place]).to(dtype)
    alone = [model(ids[row : row + 1, mask[row] == 1], use_cache=False).logits[0, -1] for row in range(2)]
    last = [int((mask[row] == 1).nonzero()[-1]) for row in range(2)]
    entries = [
        lambda: model(ids, attention_mask=mask, past_key_values=LagKVCache(CONFIG)).logits[range(2), last],
        lambda: model(ids, mask, use_cache=True).logits[range(2), last],
        lambda: prefill(model, ids, LagKVCache(CONFIG), attention_mask=mask),
    ]
    for entry in entries:
        assert (entry() - torch.stack(alone)).abs().max() <= 1e-4


@pytest.mark.parametrize("place", MASKS)
def test_padding_that_a_cache_has_taken_for_tokens_is_refused(place):
    model, ids, mask = make(), torch.randint(1, 101, (2, 45)), torch.tensor(MASKS[place])
    cache = LagKVCache(CONFIG)
    prefill(model, ids[:, :-1], cache)
    entries = [
        lambda: model(ids[:, -1:], attention_mask=mask, past_key_values=cache),
        lambda: model.get_decoder()(ids[:, -1:], mask, past_key_values=cache),
        lambda: model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3),
    ]
    if place == "only the last":  # which the cache has not seen
        assert (entries[0]().logits[1] - model(ids[1:], use_cache=False).logits[0, -1]).abs().max() <= 1e-4
        return
    for entry in entries:
        with pytest.raises(LRSAError, match=r"cannot drop tokens as padding later|pad on the left"):
            entry()
    assert cache.get_seq_length() == 44


@pytest.mark.parametrize("place", MASKS)
def test_padding_of_a_training_pass_is_harmless_or_refused(place):
    model, ids, mask = make(), torch.randint(1, 101, (2, 45)), torch.tensor(MASKS[place])
    if place in ("right", "only the last"):
        for options in ({}, {"use_cache": False}, {"position_ids": (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)}):
            padded = model(ids, attention_mask=mask, **options).logits
            for row, length in enumerate(mask.sum(1).tolist()):
                single = model(ids[row : row + 1, :length], use_cache=False).logits
                assert (padded[row : row + 1, :length] - single).abs().max() <= 1e-5
        return
    with pytest.raises(LRSAError, match=r"padding.* pad on the right"):
        model(ids, attention_mask=mask, use_cache=False)


def test_prefill_refuses_rows_that_begin_or_end_with_padding():
    model, ids = make(), torch.randint(1, 101, (2, 45))
    model.generation_config.pad_token_id = 0
    for place in (0, -1):
        padded = ids.clone()
        padded[1, place] = 0
        with pytest.raises(LRSAError, match="begin or end with the padding token 0"):
            prefill(model, padded, LagKVCache(CONFIG))
        prefill(model, padded, LagKVCache(CONFIG), attention_mask=torch.ones_like(padded))
        model.generation_config.eos_token_id = [0, 5]
        prefill(model, padded, LagKVCache(CONFIG))  # as `generate`: it may be the end of a turn
        model.generation_config.eos_token_id = None


def test_a_cache_holds_one_document():
    model, ids = make(), torch.randint(1, 101, (1, 40))
    for given in (
        dict(document_lengths=(30, 10)),
        dict(cu_seq_lens_q=cumulative((30, 10))),
        dict(seq_idx=numbers((30, 10), 0)),
        dict(position_ids=restarting((30, 10))),
    ):
        for cache in (dict(past_key_values=LagKVCache(CONFIG)), dict(use_cache=True)):
            with pytest.raises(LRSAError, match=r"one document in each row, .*documents of \(30, 10\) tokens"):
                model(ids, **cache, **given)
    with pytest.raises(LRSAError, match="have position_ids 3 to 42, and the cache has seen 0 tokens"):
        model(ids, past_key_values=LagKVCache(CONFIG), position_ids=torch.arange(3, 43)[None])


def test_a_mask_that_nobody_reads_is_refused():
    model = tiny("llama")
    model.config.lrsa = {"sink_size": 2, "lag_size": 8, "retention": 0.25}
    model.set_attn_implementation("lrsa")
    with pytest.raises(LRSAError, match=r"the attention mask has not been read: call lrsa_ds.apply_lrsa"):
        model(torch.ones(1, 3).long(), attention_mask=torch.tensor([[0, 1, 1]]), use_cache=False)
