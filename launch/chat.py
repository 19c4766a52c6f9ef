"""Questions about a long file, answered from a compressed cache.

    python launch/chat.py outputs/.../model long.txt "What is the pass key?" ["Another question?" ...]

Without questions on the command line it reads them, one per line. The file is read once; all questions use one cache.
"""

import argparse
import sys
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import launch.cli.interrupts  # noqa: F401

# isort: split
import torch

import lrsa_ds
from lrsa_ds.data.encoder import Encoder, Prompt, after_lead
from lrsa_ds.data.tokenizer import decoded
from lrsa_ds.errors import LRSAError, require
from lrsa_ds.models.generation import end_tokens
from recipes.user_code import import_code


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that launch/train.py has exported")
    parser.add_argument("file", type=Path, help="a text file")
    parser.add_argument("question", nargs="*")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    parser.add_argument("--plugin", action="append", default=[], help="a module or .py file to import first")
    return parser.parse_args()


class Reader:
    """A model with the cache of one text."""

    def __init__(self, name: str, text: str):
        self.model, self.tokenizer, self.new_cache = lrsa_ds.load(name)
        require(
            self.tokenizer.chat_template is not None,
            f"{name} has no chat template, and chat needs one for its questions.",
        )
        self.encoder = Encoder(self.tokenizer, sys.maxsize)
        self.text = text
        # The common part of the prompts of two questions is read once: the beginning and the text.
        first, second = self._prompt("?").ids, self._prompt("What is it?").ids
        self.read = [token for token, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second))][:-1]
        self.cache = self.new_cache()
        lrsa_ds.prefill(self.model, torch.tensor([self.read], device=self.model.device), self.cache)

    def _prompt(self, question: str) -> Prompt:
        return self.encoder.prompt({"context": self.text, "question": question, "answer": "?"})

    def kept(self) -> str:
        cache = self.cache
        share = cache.get_seq_length() / cache.num_held
        on_average = ", on average," if len(cache.config.layers) > 1 else ""
        megabytes = cache.num_bytes / 1e6
        return (
            f"read {cache.get_seq_length():,} tokens, "
            f"kept {round(cache.num_held):,}{on_average} of each layer and head "
            f"({share:.1f} x less): {megabytes:.1f} MB instead of {share * megabytes:.1f} MB"
        )

    def answer(self, question: str, max_new_tokens: int) -> str:
        prompt = self._prompt(question)
        # A question may change how the end of the text is tokenized: then its complete prompt is read.
        is_read = prompt.ids[: len(self.read)] == self.read
        ids = torch.tensor([prompt.ids], device=self.model.device)
        found = lrsa_ds.generate(
            self.model,
            ids,
            self.cache.fixed(len(prompt.ids) + max_new_tokens) if is_read else None,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end_tokens(self.model, self.tokenizer) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        said = decoded(self.tokenizer, found[0, ids.shape[1] :], skip_special_tokens=True)
        return after_lead(said, prompt.lead_end)


def typed_questions() -> Iterator[str]:
    """Questions from the input, up to an empty line or its end."""
    while True:
        print("\n? ", end="", flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question


def main() -> int:
    options = arguments()
    try:
        for name in options.plugin:
            import_code(f"--plugin {name!r}", name)
        require(options.file.is_file(), f"{options.file} does not exist: give a text file.")
        reader = Reader(options.model, options.file.read_text(encoding="utf-8", errors="replace"))
    except LRSAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(reader.kept())
    for question in options.question or typed_questions():
        print(f"\n{question}\n  {reader.answer(question, options.max_new_tokens)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
