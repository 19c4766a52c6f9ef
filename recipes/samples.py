"""All samples of an evaluation: generated tasks and files behind one interface."""

from lrsa_ds.data.tokenizer import Tokenizer
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.evaluate.evaluator import Sample
from recipes.eval_sets import Entry, FileSamples, longbench_entries, qa_entries, ruler_entries
from recipes.longeval import GeneratedSamples


class Samples:
    """All samples of an evaluation, each a function of the configuration, the task, the length and the index."""

    def __init__(self, config: EvaluateConfig, tokenizer: Tokenizer):
        self.config = config
        files: dict[str, list[Entry]] = {}
        options = (config.seed, config.num_samples)
        if "qa" in config.tasks:
            files |= qa_entries(config.data, *options)
        if "longbench" in config.tasks:
            assert config.longbench is not None  # checked with the configuration
            files |= longbench_entries(config.longbench, *options)
        if "ruler" in config.tasks:
            assert config.ruler is not None
            files |= ruler_entries(config.ruler, *options)
        self.files = FileSamples(tokenizer, files, config.data.chat_template)
        self.generated = GeneratedSamples(tokenizer, config.seed, config.num_depths, config.data.chat_template)
        self.counts = {task: config.num_samples for task in config.tasks if task not in ("qa", "longbench", "ruler")}
        self.counts |= {task: len(entries) for task, entries in files.items()}

    def items(self) -> list[tuple[str, int, int]]:
        """Task, length and index of every sample; the first of every task and length before the second of any."""
        everything = [(t, n, i) for t, count in self.counts.items() for n in self.config.lengths for i in range(count)]
        return sorted(everything, key=lambda item: item[2])

    def sample(self, task: str, length: int, index: int) -> Sample:
        source = self.files if task in self.files.entries else self.generated
        return source.sample(task, length, index)

    def check(self) -> None:
        """Makes the first sample of every task and length, so that a length that is too short is said at once."""
        for task, length, index in self.items():
            if index == 0:
                self.sample(task, length, index)
