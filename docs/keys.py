"""Writes docs/keys.md, every key of the configuration: `python docs/keys.py`.

Names, types and defaults are those of the dataclasses; what a key means is the comment behind it in conf/, or else the
`Args:` of its dataclass. `tests/cpu/test_config.py` compares the page with what this program writes.
"""

import inspect
import re
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from lrsa_ds.config import TrainConfig
from lrsa_ds.costs.settings import PlanConfig
from lrsa_ds.evaluate.config import EvaluateConfig
from lrsa_ds.settings.data import SourceConfig

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "keys.md"
LINE = re.compile(r"^(\s*)(\w+):(?:\s*(.*?))?(?:\s+# (.*))?$")
MORE = re.compile(r"^\s{10,}# (.*)$")  # a comment that goes on in the next line
# Keys whose names say all, and that conf/ and the dataclasses therefore do not comment on.
PLAIN = {
    "activation_checkpointing": "whether activations are recomputed in the backward pass instead of stored",
    "attention.kind": "lrsa, dense",
    "data.source": "files, hub, mixture, recall, stdlib_qa",
    "data.streaming": "true: read rows while training instead of indexing them before",
    "data.chat_template": "true: the tokenizer's chat template; false: plain text",
    "data.subset": "subset (configuration) of a data set of the hub",
    "data.split": "split of a data set of the hub",
    "data.validation_split": "split of held-out rows; null: rows of the training data are held out",
    "data.name": "name of a data set of the hub",
    "data.num_workers": "processes that prepare batches; 0: the training process itself",
    "data.tasks": "questions of stdlib_qa, from signature, passkey, lookup",
    "data.sources: source": "files, hub, recall, stdlib_qa; null: from path or name",
    "data.sources: path": "as data.path",
    "data.sources: validation_path": "as data.validation_path",
    "data.sources: name": "as data.name",
    "data.sources: subset": "as data.subset",
    "data.sources: split": "as data.split",
    "data.sources: validation_split": "as data.validation_split",
    "data.sources: columns": "as data.columns; empty: that of data",
    "data.sources: make_contexts": "as data.make_contexts",
    "data.sources: tasks": "as data.tasks",
    "data.sources: recall_tasks": "as data.recall_tasks",
    "data.sources: num_examples": "as data.num_examples",
    "data.sources: num_validation": "held-out rows of this source, instead of its share of eval.num_examples",
    "data.sources: weight": "share of the rows beside the other sources; null for all: every row once in an epoch",
    "eval.before": "whether to evaluate before training",
    "eval.after": "whether to evaluate after training",
    "eval.retentions": "caches to evaluate, by the share of each partition that is kept; 1.0: the dense cache",
    "log.group": "group of the run in W&B",
    "log.tags": "tags of the run in W&B",
    "log.progress": "whether to show a progress bar",
    "model.dtype": "auto (bf16 on a GPU, fp32 on a CPU), bf16, fp32",
    "model.name": "a name on the hub, or a directory in Hugging Face format",
    "model.random": "an architecture with random weights: model_type and fields of its configuration",
    "model.revision": "branch, tag or commit on the hub",
    "model.trust_remote_code": "whether to run code from the hub",
    "model.lora.alpha": "scale of the adapters: alpha / rank",
    "objective.kind": "target_loss, distill",
    "optim.num_steps": "optimizer steps of the run",
    "optim.beta1": "of AdamW",
    "optim.beta2": "of AdamW",
    "tasks": "see the list in conf/evaluate.yaml, and [Evaluate](evaluation.md)",
    "zero.stage": "1: optimizer states are sharded, 2: gradients too, 3: parameters too",
    "zero.reduce_bucket_size": "numbers of gradients that are reduced at once",
    "zero.overlap_comm": "whether collectives run beside the backward pass",
}


@dataclass
class Comments:
    """Comments of a YAML file by key, with the groups above it."""

    of: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> "Comments":
        found, groups, last = {}, [], None
        for line in path.read_text().splitlines():
            if last and (more := MORE.match(line)):
                found[last] += " " + more[1]
                continue
            last, match = None, LINE.match(line)
            if not match:
                continue
            depth, name, comment = len(match[1]) // 2, match[2], match[4]
            groups = [*groups[:depth], name]
            if comment:
                last = ".".join(groups)
                found[last] = comment
        return cls(found)


def comments() -> dict[str, str]:
    """What conf/ says of each key; of the files of a group the first one that says anything."""
    found: dict[str, str] = {}
    for name in ("train", "evaluate"):
        for key, said in Comments.read(ROOT / "conf" / f"{name}.yaml").of.items():
            found.setdefault(f"{name}:{key}", said)
    first = {"default.yaml": 0, "lrsa.yaml": 0, "hub.yaml": 1}
    for path in sorted((ROOT / "conf").glob("*/*.yaml"), key=lambda p: (first.get(p.name, 2), p.name)):
        if path.parent.name not in ("recipe", "sweep"):
            for key, said in Comments.read(path).of.items():
                found.setdefault(f"train:{path.parent.name}.{key}", said)
    return found


def documented(schema: type) -> dict[str, str]:
    """The `Args:` of a dataclass and of those it inherits from: what each field means."""
    found: dict[str, str] = {}
    for each in schema.__mro__:
        text = inspect.cleandoc(each.__doc__ or "")
        if "Args:\n" not in text:
            continue
        block = re.split(r"\n(?=\S)", text.split("Args:\n")[1])[0]
        for names, said in re.findall(r"^    ([\w, ]+): (.*(?:\n {8,}.*)*)", block, re.MULTILINE):
            for name in names.split(", "):
                found.setdefault(name, " ".join(said.split()))
    return found


def type_name(kind: Any) -> str:
    text = kind if isinstance(kind, str) else getattr(kind, "__name__", None) if isinstance(kind, type) else str(kind)
    text = str(kind) if "[" in str(kind) else text
    for long, short in (("typing.", ""), ("NoneType", "null"), ("None", "null"), ("Any", "see below")):
        text = text.replace(long, short)
    return text.replace("see below", "any").replace("|", "or")


def default_of(field: Field) -> str:
    if field.default_factory is not MISSING:
        value = field.default_factory()
    elif field.default is MISSING:
        return "required"
    else:
        value = field.default
    written = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return f"`{written[value]}`"
    return f"`{value}`"


def rows(schema: type, name: str, group: str, said: dict[str, str]) -> list[str]:
    """A table row for each field of `schema` that is no group itself."""
    prefix = f"{group}." if group and not group.endswith(": ") else group
    args, lines = documented(schema), []
    for field in fields(schema):
        key = prefix + field.name
        if is_dataclass(field.type):
            continue
        meaning = said.get(f"{name}:{key}") or args.get(field.name) or PLAIN.get(key) or said.get(f"train:{key}")
        if not meaning:
            raise SystemExit(f"{key} has no meaning: write a comment behind it in conf/, or Args in {schema.__name__}.")
        meaning = meaning.replace("|", "\\|").replace("<", "&lt;")
        lines.append(f"| `{key}` | {type_name(field.type)} | {default_of(field)} | {meaning} |")
    return lines


def table(lines: list[str]) -> str:
    return "\n".join(["| key | type | default | meaning |", "|---|---|---|---|", *lines])


def groups(schema: type, prefix: str = "") -> list[tuple[str, type]]:
    """The groups of a schema, and theirs."""
    found = []
    for field in fields(schema):
        if is_dataclass(field.type):
            found += [(prefix + field.name, field.type), *groups(field.type, f"{prefix}{field.name}.")]
    return found


def first_line(schema: type) -> str:
    text = inspect.cleandoc(schema.__doc__ or "").split("\n\n")[0]
    return " ".join(text.split())


def page() -> str:
    said = comments()
    parts = [
        "# Every key",
        "Made by `python docs/keys.py` from the dataclasses and from the comments in [`conf/`](../conf): change those, "
        "not this page. Keys are written `group.key=value` on the command line; defaults are those without a recipe, "
        "before the files of `conf/` that a command takes.",
        "## launch/train.py",
        table(rows(TrainConfig, "train", "", said)),
    ]
    for group, schema in groups(TrainConfig):
        files = sorted(p.stem for p in (ROOT / "conf" / group).glob("*.yaml"))
        choices = f" Files: {', '.join(f'`{group}={name}`' for name in files)}." if files else ""
        parts += [f"### {group}", first_line(schema) + choices, table(rows(schema, "train", group, said))]
        if group == "data":
            source = rows(SourceConfig, "train", "data.sources: ", said)
            parts += ["#### data.sources", first_line(SourceConfig), table(source)]
    own = {field.name for field in fields(TrainConfig)}
    planned = [line for line in rows(PlanConfig, "train", "", said) if line.split("`")[1] not in own]
    parts += ["## launch/plan.py", "All keys of `launch/train.py`, and:", table(planned)]
    parts += ["## launch/evaluate.py", "`model`, `data` and `log` as above, and:"]
    parts += [table(rows(EvaluateConfig, "evaluate", "", said))]
    for group, schema in groups(EvaluateConfig):
        if group not in own and not group.startswith("model."):
            parts += [f"### {group}", first_line(schema), table(rows(schema, "evaluate", group, said))]
    recipes = []
    for path in sorted((ROOT / "conf" / "recipe").glob("*.yaml")):
        about = []
        for line in path.read_text().splitlines()[1:]:
            if not line.startswith("#"):
                break
            about.append(line[1:].strip())
        sentence = re.split(r"(?<=[.:])\s", " ".join(about))[0].rstrip(".:")
        recipes.append(f"| [`{path.stem}`](../conf/recipe/{path.name}) | {sentence} |")
    parts += ["## Recipes", "\n".join(["| `+recipe=` | |", "|---|---|", *recipes])]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)
