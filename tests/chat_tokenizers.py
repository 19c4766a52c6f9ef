"""Small tokenizers of the kinds that models are published with, trained on a few words for these tests."""
# ruff: noqa: SIM905 (one text reads better than a list of words)

from functools import lru_cache

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.chat_templates import Template

WORDS = (
    "the answer is Paris and the question was where it stands in this text Answer: Question: Hello there Bye See you "
    "What is the capital of France? It is Paris. Be kind. user assistant system model Think about it first USER: "
    "12 345\nYou help.\n\nSome long text. More of it.\n\n  Leading spaces   and trailing ones \n### Response:\n"
).split(" ")


@lru_cache
def _base(kind: str) -> str:
    """A small tokenizer of this kind, trained on these words, as JSON."""
    corpus = [" ".join(WORDS)] * 4
    if kind == "byte level":
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    elif kind.startswith("metaspace"):
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        scheme = kind.removeprefix("metaspace ")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "first")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    elif kind == "normalized":  # as the first Llama: the normalizer writes the prefix, and nothing splits at spaces
        tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
        special = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
        trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=special, show_progress=False)
        corpus = [word for text in corpus for word in text.split()]
    elif kind == "unigram":
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        characters = [chr(code) for code in range(32, 127)]
        trainer = trainers.UnigramTrainer(
            vocab_size=400,
            special_tokens=["<unk>"],
            unk_token="<unk>",
            initial_alphabet=["\n", *characters],
            show_progress=False,
        )
    else:
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        alphabet = [chr(code) for code in range(33, 127)]
        trainer = trainers.WordPieceTrainer(
            vocab_size=500, special_tokens=["[UNK]"], initial_alphabet=alphabet, show_progress=False
        )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer.to_str()


KINDS = ("byte level", "metaspace first", "metaspace always", "normalized", "unigram", "wordpiece")


def tokenizer_of(kind: str, template: Template | None = None) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `KINDS` with the tokens of a template, or without a template."""
    template = template or Template("", [], "</s>", eos="</s>", bos="<s>")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(_base(kind)),
        eos_token=template.eos or template.ends,
        pad_token="<|pad|>",
        bos_token=template.bos,
        additional_special_tokens=[token for token in template.special if token != template.eos],
        chat_template=template.source or None,
        clean_up_tokenization_spaces=False,
    )
    if template.added:
        tokenizer.add_tokens(template.added)
    return tokenizer
