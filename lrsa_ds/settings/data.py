"""Settings of the group `data`."""

from dataclasses import dataclass, field, fields, replace
from typing import Any, cast

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lrsa_ds.errors import LRSAError, require, require_one_of, require_whole
from lrsa_ds.settings.paths import expand_home, require_paths

# Our names of the columns of a row, see lrsa_ds/data/shapes.py.
COLUMNS = ("messages", "conversations", "tools", "system", "prompt", "completion", "instruction", "input", "output")
COLUMNS += ("context", "question", "answer", "answers", "answer_start", "title", "text", "input_ids", "labels", "task")

# Sources that always generate contexts.
MADE_SOURCES = ("stdlib_qa", "recall")

RECALL_TASKS = ("continue", "fill", "heading", "order")

# Keys of a source that describe its part in the mixture, not its rows.
OF_MIXTURE = ("weight", "num_validation")


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture, and how often its rows are drawn.

    Files (`path`) or a data set of the hub (`name`), as rows or, with `make_contexts`, as contexts; or a `source` that
    generates contexts: stdlib_qa, or recall over files, a data set or neither. Values of None are taken from `data`.
    `num_validation` replaces this source's share of `eval.num_examples`.
    """

    source: str | None = None
    make_contexts: bool = False
    tasks: list[str] | None = None
    recall_tasks: list[str] | None = None
    num_examples: int | None = None

    path: Any = None
    validation_path: Any = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    weight: float | None = None
    num_validation: int | None = None

    def __post_init__(self):
        kinds = ("files", "hub", *MADE_SOURCES)
        if self.source is not None:
            require_one_of("data.sources: source", self.source, kinds)
        given = (self.path is not None) + (self.name is not None)
        require(
            given == 1 or (given == 0 and self.source in MADE_SOURCES),
            "data.sources: give path or name in each source, one of both, or a source that needs neither, "
            f"{' or '.join(MADE_SOURCES)}.",
        )
        weight = self.weight
        require(weight is None or weight > 0, f"data.sources: weight={weight} is not valid: give a number above 0.")
        if self.num_validation is not None:
            require_whole("data.sources: num_validation", self.num_validation, 1)


def makes_contexts(data: Any) -> bool:
    """Whether the data, or one of their sources, generate contexts; accepts settings that are not typed yet."""
    return bool(getattr(data, "make_contexts", False)) or getattr(data, "source", None) in MADE_SOURCES


def _source(value: Any) -> SourceConfig:
    """A typed source from the configuration, with keys and types checked."""
    if isinstance(value, SourceConfig):
        return value
    require(isinstance(value, dict), f"data.sources: {value!r} is not valid: give objects such as {{path: a.jsonl}}.")
    for key in value:
        require_one_of("data.sources: key", key, tuple(f.name for f in fields(SourceConfig)))
    try:
        return cast(SourceConfig, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(SourceConfig), value)))
    except OmegaConfBaseException as error:
        raise LRSAError(f"data.sources: {error.full_key}: {str(error.msg).splitlines()[0]}.") from error


@dataclass(kw_only=True)
class DataConfig:
    """The source of examples, and how they are prepared: docs/data.md."""

    source: str = "stdlib_qa"
    sources: list[Any] = field(default_factory=list)
    path: Any = None
    validation_path: Any = None
    name: str | None = None
    subset: str | None = None
    split: str = "train"
    validation_split: str | None = None
    streaming: bool = False
    columns: dict[str, str] = field(default_factory=dict)
    tasks: list[str] = field(default_factory=lambda: ["signature", "passkey", "lookup"])
    recall_tasks: list[str] | None = None
    num_examples: int = 4096
    make_contexts: bool = False
    context_length: int | None = None
    questions_per_context: int = 1
    chat_template: bool = True
    on_bad_row: str = "error"
    too_long: str = "cut"
    report: str = "sample"
    num_workers: int = 1

    def __post_init__(self):
        require_one_of("data.source", self.source, ("stdlib_qa", "recall", "files", "hub", "mixture"))
        self._check_sources()
        require_one_of("data.on_bad_row", self.on_bad_row, ("error", "skip"))
        require_one_of("data.too_long", self.too_long, ("cut", "drop", "error"))
        require_one_of("data.report", self.report, ("sample", "all"))
        for key in ("path", "validation_path"):
            require_paths(f"data.{key}", getattr(self, key))
        expand_home(self, "path", "validation_path", "name")
        require_whole("data.num_examples", self.num_examples, 1)
        require(
            self.num_workers in (0, 1),
            f"data.num_workers={self.num_workers!r} is not valid: give 0 (prepare sequences in the training process) "
            "or 1 (in another one); more would prepare the same sequences twice.",
        )
        for ours, theirs in self.columns.items():
            require_one_of("data.columns", ours, COLUMNS)
            require(
                isinstance(theirs, str),
                f"data.columns={{{ours}: {theirs!r}}} is not valid: give the name of a column, such as "
                f"{{{ours}: passage}}.",
            )
        from_files = self.source == "files" or (self.source == "recall" and self.path is not None)
        from_hub = self.source == "hub" or (self.source == "recall" and self.name is not None)
        require(
            from_files or (self.path is None and self.validation_path is None),
            "data.path and data.validation_path are read only with data=files or data=recall: add data=files.",
        )
        require(
            from_hub or self.name is None,
            "data.name names a hub data set and is read only with data=hub or data=recall: add data=hub.",
        )
        require(
            from_hub or (self.subset is None and self.validation_split is None),
            "data.subset and data.validation_split are read only with data=hub: add data=hub.",
        )
        require(
            not (from_files and from_hub), "data=recall takes its texts from data.path or data.name: give one of both."
        )
        require(self.source != "files" or self.path is not None, "data=files needs data.path, a JSONL or Parquet file.")
        require(self.source != "hub" or self.name is not None, "data=hub needs data.name, a data set of the hub.")
        for task in self.tasks:
            require_one_of("data.tasks", task, ("signature", "passkey", "lookup"))
        for task in self.recall_tasks or ():
            require_one_of("data.recall_tasks", task, RECALL_TASKS)
        require(
            self.recall_tasks != [],
            f"data.recall_tasks=[] is not valid: choose among {', '.join(RECALL_TASKS)}, or give null for all.",
        )
        require(self.tasks != [], "data.tasks=[] is not valid: choose among signature, passkey, lookup.")
        if self.context_length is not None:
            require_whole("data.context_length", self.context_length, 64)
        self._check_contexts()

    @property
    def makes_contexts(self) -> bool:
        """Whether contexts are generated instead of read as rows: with `context_length` or seq_len tokens."""
        return makes_contexts(self)

    def _check_contexts(self) -> None:
        require_whole("data.questions_per_context", self.questions_per_context, 1)
        require(
            not self.make_contexts or self.source in ("files", "hub"),
            "data.make_contexts=true makes contexts of the rows of data=files or data=hub: set it to false with "
            f"data={self.source}.",
        )
        require(
            not self.makes_contexts or not self.streaming,
            "data.streaming=true reads rows in order, and contexts need all of them: set it to false with "
            "data.make_contexts=true or data=recall.",
        )
        require(
            self.questions_per_context == 1 or self.makes_contexts or any(map(makes_contexts, self.sources)),
            f"data.questions_per_context={self.questions_per_context} is read where contexts are made: add "
            "data.make_contexts=true, or leave it at 1.",
        )

    def _check_sources(self) -> None:
        self.sources = [_source(source) for source in self.sources]
        require(
            (self.source == "mixture") == (self.sources != []),
            "data=mixture needs data.sources, which nothing else reads: such as '[{path: a.jsonl}, {path: b.jsonl}]'.",
        )
        require(
            len({source.weight is None for source in self.sources}) < 2,
            "data.sources: give a weight in every source, or in none: then every row is seen once in an epoch.",
        )
        require(
            self.source != "mixture" or not self.streaming,
            "data=mixture needs the numbers of rows, which data.streaming=true does not know: set it to false.",
        )
        for source in self.sources:
            self.of_source(source)

    def of_source(self, source: SourceConfig) -> "DataConfig":
        """These settings for one source of the mixture alone."""
        own = {f.name: getattr(source, f.name) for f in fields(source) if f.name not in OF_MIXTURE}
        own = {name: value for name, value in own.items() if value is not None}
        own["columns"] = source.columns or self.columns
        own.setdefault("source", "hub" if source.path is None else "files")
        questions = self.questions_per_context if makes_contexts(source) else 1
        return replace(self, sources=[], questions_per_context=questions, **own)
