"""The report before training: every count against rows of which all is known."""

import pytest

from lrsa_ds import LRSAConfig
from lrsa_ds.compression import long_answers_sentence
from lrsa_ds.data.packing import IGNORE, Example, LeftOut
from lrsa_ds.data.survey import num_packed, steps_of_epochs, survey
from lrsa_ds.layers import resolve


class Data:
    """Rows of given lengths, of which the second half is learnt; None is a bad row, 0 one that is too long."""

    seq_len, pad_id = 64, 0

    def __init__(self, rows, knows_order=False):
        self.rows, self.num_rows, self.num_read = rows, len(rows), 0
        if knows_order:
            self.row_order = self.order

    def order(self, epoch):
        return list(range(len(self.rows)))[:: -1 if epoch % 2 else 1]

    def examples_of_rows(self, epoch, first=0):
        for index in self.order(epoch)[first:]:
            self.num_read += 1
            yield self.row(index)

    def row(self, index):
        length = self.rows[index]
        if not length:
            return LeftOut(f"row {index}", is_too_long=length == 0)
        labels = [IGNORE] * (length - length // 2) + [1] * (length // 2)
        num_cut = 10 if length == 64 else 0
        return [Example([1] * length, labels, "t", index, num_cut=num_cut, answer_lost=num_cut > 0 and index % 2 == 0)]


ROWS = [64, 20, None, 30, 0, 64, 16, 0]


def test_counts_over_all_rows():
    report = survey(Data(ROWS), short_length=20)
    assert report.is_whole and (report.num_rows, report.num_read) == (8, 8)
    assert (report.num_bad_rows, report.num_too_long_rows, report.num_examples) == (1, 2, 5)
    assert (report.num_tokens, report.num_target_tokens) == (194, 97)
    assert (report.num_cut_examples, report.num_cut_tokens, report.num_lost_answers) == (2, 20, 1)
    assert report.share_cut == pytest.approx(20 / 214)
    assert (report.num_short_examples, report.num_short_tokens) == (2, 36)
    assert report.num_sequences == 4  # 64, 64, 20 + 30, 16
    said = "\n".join(report.lines(sequences_per_step=2, num_steps=6))
    assert "counted over all 8 rows: 5 documents of 194 tokens" in said
    assert "1 rows are left out since they cannot be used, 2 since they are too long" in said
    assert "2 documents are cut, which takes 9.3% of all tokens; 1 of them lose the answer" in said
    assert report.share_short == pytest.approx(36 / 194)
    assert "48 target tokens a step; 6 steps are 3.00 epochs" in said


def test_answers_behind_what_may_be_dropped_are_measured():
    """Each run of targets by itself, where it begins behind the first tokens, which are always there."""

    class Turns(Data):
        def row(self, index):
            labels = [IGNORE] * 64
            labels[5:15] = [1] * 10  # before anything is dropped
            labels[20:24] = [1] * 4
            labels[30 : 30 + self.rows[index]] = [1] * self.rows[index]
            return [Example([1] * 64, labels, "t", index)]

    report = survey(Turns([1, 2, 3, 4, 5, 6, 7, 8, 30]), short_length=20)
    assert sorted(report.answer_lengths) == sorted([4] * 9 + [1, 2, 3, 4, 5, 6, 7, 8, 30])
    assert report.long_answers() == (8, 30)
    row = report.row()
    assert (row["answer_length_p90"], row["answer_length_max"]) == (8, 30) and "answer_lengths" not in row
    assert survey(Turns([5]), short_length=0).long_answers() == (0, 0)  # dense attention drops nothing

    config = LRSAConfig(sink_size=2, lag_size=16, retention=0.25)
    said = long_answers_sentence((8, 30), config)
    assert "one answer in ten has 8 tokens or more (the longest 30)" in said and "keeps 4 of the tokens" in said
    for enough in (
        config.at_retention(0.5),
        resolve(config, {"0": 1.0, "1-": None}, 2),  # the first layer holds all of it
        LRSAConfig(sink_size=2, lag_size=16, retention=0.25, selection="window"),  # which is to keep nothing
    ):
        assert long_answers_sentence((8, 30), enough) is None
    assert long_answers_sentence((0, 0), config) is None


def test_a_sample_says_so():
    data = Data([32] * 1000)
    report = survey(data, short_length=0, limit=640)
    assert not report.is_whole and (report.num_rows, report.num_read) == (1000, 20) and data.num_read == 20
    assert report.sequences_of_epoch() == 500
    first, last = report.lines(sequences_per_step=5, num_steps=50)
    assert "counted over a sample, the first 20 rows of 1,000" in first and "50 steps are about 0.50 epochs" in last
    del data.num_rows
    (_, last) = survey(data, short_length=0, limit=640).lines(5, 50)
    assert "epochs" not in last


@pytest.mark.parametrize("knows_order", [False, True])
def test_steps_of_epochs(knows_order):
    data = Data([40, 30, 20, 50, 64, 0, 10, 14] * 5, knows_order)
    by_epoch = [num_packed(([len(e.input_ids) for e in row] for row in data.examples_of_rows(i)), 64) for i in (0, 1)]
    data.num_read = 0
    assert steps_of_epochs(data, 1, 1) == by_epoch[0]
    assert data.num_read == 40
    assert steps_of_epochs(data, 2, 1) == sum(by_epoch)
    assert data.num_read == (80 if knows_order else 120)
    assert steps_of_epochs(data, 1.5, 1) == -(-(2 * by_epoch[0] + by_epoch[1]) // 2)
    assert steps_of_epochs(data, 2, 7) == -(-sum(by_epoch) // 7)
    assert steps_of_epochs(data, 0.001, 100) == 1
