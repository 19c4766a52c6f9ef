"""Reads a long file once, then answers many questions from the cache: `python examples/ask_many_questions.py [FILE]`.

Without a file it reads one that it makes up. The cache of the file is filled once; each question continues a copy of
it. A small model that was not trained with LRSA errs often. `python -m lrsa_ds chat` is the same as a command, for
models that were.
"""

import argparse
import time
from pathlib import Path

import torch
from small_model import ask, load_small

import lrsa_ds

FACTS = {"Ada": "a red kite", "Bo": "a brass key", "Cleo": "two oranges"}
MADE_UP = "".join(
    f"{name} has {thing}. " + "The train stops at every village, and nobody is in a hurry. " * 20
    for name, thing in FACTS.items()
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path)
    parser.add_argument("questions", nargs="*", default=[f"What does {name} have?" for name in FACTS])
    parser.add_argument("--model", help="a name of the hub or a directory; default: the model of `make setup`")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    options = parser.parse_args()
    text = options.file.read_text() if options.file else MADE_UP
    model, tokenizer = load_small(options.model)
    lrsa_ds.apply_lrsa(model, lrsa_ds.LRSAConfig(sink_size=16, lag_size=128, retention=0.5))

    prompts = [ask(tokenizer, text, question) for question in options.questions]
    # What all prompts begin with is the file: it is read once. The last token of it may belong to a question already.
    shared = min(len(prompt[0]) for prompt in prompts)
    for prompt in prompts[1:]:
        shared = min(shared, int((prompts[0][0, :shared] == prompt[0, :shared]).int().cumprod(0).sum()))
    started = time.monotonic()
    cache = lrsa_ds.new_cache(model)
    lrsa_ds.prefill(model, prompts[0][:, : shared - 1], cache)
    print(f"read {shared - 1:,} tokens in {time.monotonic() - started:.1f} s; {cache.num_bytes / 1e6:.2f} MB are kept")
    for question, prompt in zip(options.questions, prompts, strict=True):
        started = time.monotonic()
        copy = cache.fixed(prompt.shape[1] + options.max_new_tokens)  # the next question finds the cache as it was
        found = lrsa_ds.generate(
            model, prompt, copy, max_new_tokens=options.max_new_tokens, do_sample=False,
            attention_mask=torch.ones_like(prompt),
        )  # fmt: skip
        answer = tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True)
        print(f"{question}  {answer!r}  {time.monotonic() - started:.1f} s", flush=True)


if __name__ == "__main__":
    main()
