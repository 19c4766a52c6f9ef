"""What the examples share: a small model, and a question as its chat template frames it."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

FETCHED = Path(__file__).resolve().parent.parent / "models" / "SmolLM2-135M-Instruct"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_small(name: str | None):
    """A model and its tokenizer: `name` of the hub or a directory, or the model that `make setup` fetches."""
    if name is None and not (FETCHED / GGUF).exists():
        raise SystemExit(f"{FETCHED / GGUF} is not there: run `make setup`, or give --model.")
    source = {"gguf_file": GGUF} if name is None else {}
    where = name or str(FETCHED)
    tokenizer = AutoTokenizer.from_pretrained(where, **source)
    return AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32, **source).eval(), tokenizer


def ask(tokenizer, text: str, question: str) -> torch.Tensor:
    """Tokens [1, N] of a prompt with a text and a question behind it."""
    messages = [{"role": "user", "content": f"{text}\n\n{question}"}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
