"""All samples of an evaluation: generated tasks, files and benchmarks behind one interface."""

from typing import Protocol

from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.evaluate.evaluator import Sample
from recipes.benchmarks import BENCHMARKS
from recipes.benchmarks.samples import BenchmarkSamples, drawn_cases
from recipes.eval_sets import FileSamples, qa_entries
from recipes.longeval import GeneratedSamples


class Source(Protocol):
    """Samples of some tasks, by task, length and index."""

    def sample(self, task: str, length: int, index: int) -> Sample: ...


class Samples:
    """All samples of an evaluation, each a function of the configuration, the task, the length and the index."""

    def __init__(self, config: EvaluateConfig, tokenizer: Tokenizer):
        self.counts: dict[tuple[str, int], int] = {}
        self._sources: dict[tuple[str, int], Source] = {}
        options, chat_template = (config.seed, config.num_samples), config.data.chat_template
        made = [task for task in config.tasks if task not in ("qa", *BENCHMARKS)]
        if made:
            generated = GeneratedSamples(tokenizer, config.seed, config.num_depths, chat_template)
            counts = {(task, length): config.num_samples for task in made for length in config.lengths}
            self._add(generated, counts)
        if "qa" in config.tasks:
            entries = qa_entries(config.data, *options)
            counts = {(task, length): len(mine) for task, mine in entries.items() for length in config.lengths}
            self._add(FileSamples(tokenizer, entries, chat_template), counts)
        cases = {}
        for key in BENCHMARKS:
            if key in config.tasks:
                cases |= drawn_cases(key, getattr(config, key), config.lengths, *options)
        self.benchmarks = BenchmarkSamples(tokenizer, cases, chat_template)
        self._add(self.benchmarks, {at: len(mine) for at, mine in cases.items()})

    def _add(self, source: Source, counts: dict[tuple[str, int], int]) -> None:
        self.counts |= counts
        self._sources |= dict.fromkeys(counts, source)

    def items(self) -> list[tuple[str, int, int]]:
        """Task, length and index of every sample; the first of every task and length before the second of any."""
        everything = [(*at, index) for at, count in self.counts.items() for index in range(count)]
        return sorted(everything, key=lambda item: item[2])

    def sample(self, task: str, length: int, index: int) -> Sample:
        return self._sources[task, length].sample(task, length, index)

    def check(self) -> None:
        """Makes a sample of every task and length, so that a length that is too short is reported at once."""
        self.benchmarks.check()
        for task, length in self.counts.keys() - self.benchmarks.cases.keys():
            self.sample(task, length, 0)
