"""`generate` with a compressed cache, beside the dense one: `python examples/generate_compressed.py`.

The model is used as it is, without LRSA training: a moderate compression, with some layers dense, leaves most of its
answers intact. Training (examples/finetune_jsonl.py) is what makes small caches work.
"""

import argparse

import torch
from small_model import ask, load_small
from transformers import DynamicCache

import lrsa_ds

TEXT = "The harbour of Tarn has a lighthouse. " + "Ships come and go with the tide, and gulls follow them. " * 60
QUESTION = "What does the harbour of Tarn have?"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a name of the hub or a directory; default: the model of `make setup`")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    options = parser.parse_args()
    model, tokenizer = load_small(options.model)
    ids = ask(tokenizer, TEXT, QUESTION)

    def answer(cache) -> str:
        found = model.generate(
            ids, past_key_values=cache, max_new_tokens=options.max_new_tokens, do_sample=False,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
        return tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)

    dense = DynamicCache(config=model.config)
    print(f"dense: {answer(dense)!r}")
    megabytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in dense.layers) / 1e6
    print(f"  {ids.shape[1]:,} tokens read, {megabytes:.2f} MB of cache", flush=True)

    # Every layer keeps a quarter of each partition of 128 tokens; the first and the last layer keep everything.
    last = model.config.get_text_config().num_hidden_layers - 1
    config = lrsa_ds.LRSAConfig(sink_size=16, lag_size=128, retention=0.25)
    lrsa_ds.apply_lrsa(model, config, layers={f"0 {last}": 1.0, "rest": 0.25})
    compressed = lrsa_ds.new_cache(model)
    print(f"compressed: {answer(compressed)!r}")
    print(f"  {compressed.num_bytes / 1e6:.2f} MB of cache")


if __name__ == "__main__":
    main()
