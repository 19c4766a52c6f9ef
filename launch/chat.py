"""Questions about a long file, answered from a compressed cache.

    python launch/chat.py outputs/.../model long.txt "What is the pass key?" ["Another question?" ...]

Without questions it asks for them, one a line. The file is read once; every question starts from the same cache.
"""

import argparse
import copy
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # this checkout, installed or not

import torch

import lrsa_ds
from lrsa_ds.config import require
from lrsa_ds.data.segments import CUTTABLE, chat_segments
from lrsa_ds.errors import LRSAError
from lrsa_ds.generation import end_tokens


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a directory that launch/train.py has exported")
    parser.add_argument("file", type=Path, help="a text file")
    parser.add_argument("question", nargs="*")
    parser.add_argument("--max-new-tokens", type=int, default=200)
    return parser.parse_args()


class Reader:
    """A model that has read one text."""

    def __init__(self, name: str, text: str):
        self.model, self.tokenizer, new_cache = lrsa_ds.load(name)
        require(self.tokenizer.chat_template is not None, f"{name} has no chat template, which frames the questions.")
        self.text, self.cache = text, new_cache()
        before, _ = self._frame("?")
        lrsa_ds.prefill(self.model, self._ids(before), self.cache)

    def _frame(self, question: str) -> tuple[str, str]:
        """The prompt up to the end of the text, and from there to where the answer begins."""
        row = {"context": self.text, "question": question, "answer": "?"}
        segments = chat_segments(row, self.tokenizer)
        place = next(i for i, segment in enumerate(segments) if segment.kind == CUTTABLE) + 1
        answer = next(i for i, segment in enumerate(segments) if segment.kind == "target")
        return "".join(s.text for s in segments[:place]), "".join(s.text for s in segments[place:answer])

    def _ids(self, text: str) -> torch.Tensor:
        ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        return ids.to(self.model.device)

    def kept(self) -> str:
        cache = self.cache
        share = cache.get_seq_length() / cache.num_held
        return (
            f"read {cache.get_seq_length():,} tokens, kept {cache.num_held:,} of each layer and head "
            f"({share:.1f} x less): {cache.num_bytes / 1e6:.1f} MB instead of {share * cache.num_bytes / 1e6:.1f} MB"
        )

    def answer(self, question: str, max_new_tokens: int) -> str:
        before, after = self._frame(question)
        ids = torch.cat([self._ids(before), self._ids(after)], dim=1)
        found = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=copy.deepcopy(self.cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=end_tokens(self.model, self.tokenizer) or None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return self.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True).strip()


def typed_questions() -> Iterator[str]:
    """Until an empty line, or the end of the input."""
    while True:
        print("\n? ", end="", flush=True)
        question = sys.stdin.readline().strip()
        if not question:
            return
        yield question


def main() -> int:
    options = arguments()
    try:
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
