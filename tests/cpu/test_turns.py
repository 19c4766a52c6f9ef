"""What is trained of a turn, for templates and tokenizers of every family: inference's prompt, and its continuation."""

import pytest
import torch
from transformers import ByT5Tokenizer, GenerationConfig

from lrsa_ds.data.encoder import Encoder, after_lead
from lrsa_ds.data.packing import IGNORE
from lrsa_ds.errors import LRSAError
from lrsa_ds.models.loading import load_model
from lrsa_ds.models.stop_tokens import set_stop_tokens, trained_stop_tokens
from lrsa_ds.settings.model import ModelConfig
from tests.chat_templates import IM, TEMPLATES
from tests.chat_tokenizers import KINDS, tokenizer_of

QUESTION = {"context": "Some long text.\nMore of it.", "question": "Where is it?", "answer": "Paris"}
SYSTEM = {"role": "system", "content": "Be kind."}
CHAT = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "See you.", "train": True},
    {"role": "user", "content": "What is the capital of France?\n\nAnswer: "},
    {"role": "assistant", "content": "It is Paris.", "train": True},
]


def turns_of(examples):
    """For every run of targets: the tokens before it, and its own."""
    found = []
    for example in examples:
        start = None
        for place, label in enumerate([*example.labels, IGNORE]):
            assert place == len(example.labels) or label in (IGNORE, example.input_ids[place])
            if label != IGNORE and start is None:
                start = place
            elif label == IGNORE and start is not None:
                found.append((example.input_ids[:start], example.input_ids[start:place]))
                start = None
    return found


def without_train(messages):
    return [{key: value for key, value in message.items() if key != "train"} for message in messages]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_those_of_inference_and_targets_continue_them(name, kind):
    template = TEMPLATES[name]
    tokenizer = tokenizer_of(kind, template)
    encoder = Encoder(tokenizer, 4096)
    user = {"role": "user", "content": f"{QUESTION['context']}\n\nQuestion: {QUESTION['question']}"}
    question = [user, {"role": "assistant", "content": "Paris", "train": True}]
    conversation = [SYSTEM, *CHAT] if template.system else CHAT
    for row, messages in ((QUESTION, question), ({"messages": conversation}, conversation)):
        examples = encoder.examples(row)
        trained = [i for i, message in enumerate(messages) if message.get("train")]
        found = turns_of(examples)
        # Turns share an example where all prompts stand in the whole conversation, as inference tokenizes it.
        whole = tokenizer.apply_chat_template(without_train(messages), return_dict=False)
        stands = all(whole[: len(prompt)] == prompt for prompt, _ in found)
        is_shared = template.keeps_history and encoder.special.is_border(template.ends) and stands
        assert len(found) == len(trained)
        assert len(examples) == (1 if is_shared else len(trained))
        for number, (prompt, target) in zip(trained, found, strict=True):
            before = without_train(messages[:number])
            assert prompt == tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)
            end = template.ends or tokenizer.eos_token
            assert target[-1] == tokenizer.convert_tokens_to_ids(end) and target[-1] in trained_stop_tokens(tokenizer)
            assert target.count(target[-1]) == 1
            rendered = tokenizer.apply_chat_template(before, add_generation_prompt=True, tokenize=False)
            text = rendered + template.lead + messages[number]["content"] + template.trail + end
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert dense(tokenizer, prompt + target) == dense(tokenizer, ids)
        if is_shared:
            assert examples[0].input_ids == whole


def dense(tokenizer, ids):
    return "".join(tokenizer.decode(ids).split())


PLAIN_ROWS = [
    {"prompt": "Answer: ", "completion": "Paris"},
    {"prompt": "Answer:", "completion": " Paris"},
    {"prompt": "What is it?\n", "completion": "\nIt is Paris."},
    {"prompt": "What is it?\n\n", "completion": "  It is Paris.\n"},
    {"prompt": "It is Pa", "completion": "ris."},
]


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_template_the_prompt_stays_and_is_continued(kind):
    tokenizer = tokenizer_of(kind)
    for repeated in ("", "Some long text. More of it.\n" * 60):
        for row in [QUESTION, *PLAIN_ROWS]:
            row = {key: repeated + text if key in ("prompt", "context") else text for key, text in row.items()}
            (example,) = Encoder(tokenizer, 9999).examples(row)
            ((prompt, target),) = turns_of([example])
            text = row.get("prompt") or f"{row['context']}\n\nQuestion: Where is it?\nAnswer:"
            answer = row.get("completion") or " Paris"
            assert prompt == tokenizer(text).input_ids and target[-1] == tokenizer.eos_token_id
            whole = tokenizer(text + answer).input_ids
            assert tokenizer.decode(example.input_ids[:-1]) == tokenizer.decode(whole)
            if whole[: len(prompt)] == prompt:
                assert example.input_ids[:-1] == whole


def test_a_space_between_question_and_answer_is_part_of_the_answer():
    tokenizer = tokenizer_of("byte level")
    (example,) = Encoder(tokenizer, 4096).examples(QUESTION)
    text = "Some long text.\nMore of it.\n\nQuestion: Where is it?\nAnswer: Paris"
    assert example.input_ids[:-1] == tokenizer(text).input_ids
    assert tokenizer.convert_ids_to_tokens(turns_of([example])[0][1])[0].startswith("Ġ")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["chatml over another eos", "llama 2", "qwen 3, always thinking", "vicuna"])
def test_what_is_cut_could_have_been_asked(name, kind):
    """The tokens of an example that was too long are those of its text with a shorter context."""
    template = TEMPLATES[name]
    tokenizer = tokenizer_of(kind, template)
    context = "".join(f"Some long text {i}.\n\nMore of it. é " for i in range(60))
    start = context.index("text 40")
    for row in (
        QUESTION | {"context": context},
        QUESTION | {"context": context, "answer": "text 40", "answer_start": start},
    ):
        prompt = Encoder(tokenizer, 9999).prompt(row)
        for limit in (len(prompt.ids) // 2, 200, 130):
            (example,) = Encoder(tokenizer, limit).examples(row)
            ((ids, _),) = turns_of([example])
            assert limit - 10 < len(example.input_ids) <= limit
            text = tokenizer.decode(ids)
            assert "answer_start" not in row or "text 40" in text or "[UNK]" in text
            user = tokenizer.apply_chat_template(
                [{"role": "user", "content": cut_content(tokenizer, row, limit)}],
                add_generation_prompt=True,
                return_dict=False,
            )
            assert ids == user


def cut_content(tokenizer, row, limit):
    """The content of the user's message as the encoder shortens it."""
    seen = []
    encoder = Encoder(tokenizer, limit)
    turn = encoder.frame.turn
    encoder.frame.turn = lambda conversation, *rest: (seen.append(conversation), turn(conversation, *rest))[1]
    encoder.examples(row)
    return seen[-1].messages[0]["content"]


ASKED = {"role": "user", "content": "What is the capital of France?"}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object", "properties": {}}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"country": "France"}}}


def said(name, row, kind="byte level"):
    """The trained turns of a row as text."""
    tokenizer = tokenizer_of(kind, TEMPLATES[name])
    return [tokenizer.decode(target) for _, target in turns_of(Encoder(tokenizer, 4096).examples(row))]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen 3", "<think>\nFirst think.\n</think>\n\nIt is Paris.<|im_end|>"),
        ("qwen 3, always thinking", "First think.\n</think>\n\nIt is Paris.<|im_end|>"),
        ("deepseek, reasoning", "First think.\n</think>\n\nIt is Paris.<｜end▁of▁sentence｜>"),
        (
            "harmony",
            "<|channel|>analysis<|message|>First think.<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It is Paris.<|return|>",
        ),
    ],
)
def test_reasoning_is_trained_where_the_template_has_a_place_for_it(name, expected):
    answer = {"role": "assistant", "content": "It is Paris.", "reasoning_content": "First think."}
    assert said(name, {"messages": [ASKED, answer]}) == [expected]
    inside = {"role": "assistant", "content": "<think>\nFirst think.\n</think>\n\nIt is Paris."}
    if name != "harmony":
        assert said(name, {"messages": [ASKED, inside]}) == [expected]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen 2.5", '<tool_call>\n{"name": "look_up", "arguments": {"country": "France"}}\n</tool_call><|im_end|>'),
        ("llama 3 with tools", '{"name": "look_up", "parameters": {"country": "France"}}<|eom_id|>'),
        (
            "mistral, tools before the last question",
            '[TOOL_CALLS]{"name": "look_up", "arguments": {"country": "France"}}</s>',
        ),
    ],
)
def test_tools_and_their_calls_go_through_the_template(name, expected):
    called = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    messages = [ASKED, called, {"role": "tool", "content": '{"capital": "Paris"}'}, ANSWER]
    row = {"messages": messages, "tools": [TOOL]}
    assert said(name, row)[0] == expected and said(name, row)[1].startswith("Paris")
    tokenizer = tokenizer_of("byte level", TEMPLATES[name])
    ((prompt, _), *_) = turns_of(Encoder(tokenizer, 4096).examples(row))
    options = {"tools": [TOOL], "add_generation_prompt": True, "return_dict": False}
    assert prompt == tokenizer.apply_chat_template([ASKED], **options)
    assert tokenizer.convert_tokens_to_ids("<|eom_id|>") in trained_stop_tokens(tokenizer) or "eom" not in expected


def test_only_the_messages_that_are_to_be_trained_are():
    for flag in ({"train": False}, {"weight": 0}):
        messages = [CHAT[0], {"role": "assistant", "content": "See you.", **flag}, *CHAT[2:]]
        assert said("chatml", {"messages": messages}) == ["It is Paris.<|im_end|>"]
    last = {"role": "assistant", "content": "It is Paris.", "train": False}
    assert said("chatml", {"messages": [*CHAT[:3], last]}) == ["See you.<|im_end|>"]


def test_a_conversation_that_the_assistant_opens():
    messages = [{"role": "assistant", "content": "Hello there"}, CHAT[0], CHAT[1]]
    assert said("chatml", {"messages": messages}) == ["Hello there<|im_end|>", "See you.<|im_end|>"]
    with pytest.raises(
        LRSAError, match="its first message is from the assistant, with no prompt before it: set train to false"
    ):
        said("llama 2", {"messages": messages})


ANSWER = {"role": "assistant", "content": "Paris"}


@pytest.mark.parametrize(
    ("name", "row", "sentence"),
    [
        (
            "chatml",
            {"messages": [ASKED, ANSWER | {"reasoning_content": "First think."}]},
            r"ignores reasoning_content, which message 2 has: use a tokenizer whose template has it",
        ),
        (
            "thinking closed in the prompt",
            {"messages": [ASKED, ANSWER | {"reasoning_content": "First think."}]},
            r"generation prompt closes <think>: reasoning_content has no place",
        ),
        ("chatml", {"messages": [ASKED, ANSWER], "tools": [TOOL]}, "the chat template ignores tools: use a tokenizer"),
        (
            "chatml",
            {"messages": [ASKED, {"role": "assistant", "content": "", "tool_calls": [CALL]}]},
            r"ignores tool_calls, which message 2 has: it leaves out 'look_up'",
        ),
        (
            "mistral",
            {"messages": [SYSTEM, ASKED, ANSWER]},
            r"refuses the roles system, user.*\(Only user and assistant",
        ),
    ],
)
def test_what_a_template_has_no_place_for_is_refused(name, row, sentence):
    encoder = Encoder(tokenizer_of("byte level", TEMPLATES[name]), 4096)
    with pytest.raises(LRSAError, match=f"^file.jsonl, line 7: .*{sentence}"):
        encoder.examples(row, 6, "file.jsonl, line 7")


def test_a_tokenizer_without_offsets():
    tokenizer = ByT5Tokenizer(extra_ids=0, additional_special_tokens=IM, chat_template=TEMPLATES["chatml"].source)
    context = "Some long text. é " * 40
    for limit in (9999, 300):
        for example in Encoder(tokenizer, limit).examples(QUESTION | {"context": context}):
            ((prompt, target),) = turns_of([example])
            assert tokenizer.decode(target) == "Paris<|im_end|>"
            assert len(example.input_ids) <= limit and (limit == 9999 or len(example.input_ids) > limit - 9)
    found = turns_of(Encoder(tokenizer, 4096).examples({"messages": CHAT}))
    for number, (prompt, _) in zip((1, 3), found, strict=True):
        before = without_train(CHAT[:number])
        assert prompt == tokenizer.apply_chat_template(before, add_generation_prompt=True, return_dict=False)


def test_generation_stops_where_training_does(tmp_path):
    tokenizer = tokenizer_of("byte level", TEMPLATES["chatml over another eos"])
    ends = sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    settings = {"model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 1, "num_key_value_heads": 1, "vocab_size": len(tokenizer)}
    source = ModelConfig(random=settings, tokenizer="bytes")
    model = load_model(source, torch.float32)
    assert model.generation_config.eos_token_id == 2, "of another tokenizer"
    set_stop_tokens(model, tokenizer, source)
    model.save_pretrained(tmp_path)
    saved = GenerationConfig.from_pretrained(tmp_path)
    assert saved.eos_token_id == ends and saved.bos_token_id is None
    set_stop_tokens(model, tokenizer, source, chat_template=False)
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = 7
    set_stop_tokens(model, tokenizer, ModelConfig(name=str(tmp_path)))
    assert model.generation_config.eos_token_id == [7, *ends]


def test_what_is_said_before_the_answer_is_not_scored():
    tokenizer = tokenizer_of("byte level", TEMPLATES["qwen 3"])
    prompt = Encoder(tokenizer, 4096).prompt(QUESTION)
    assert prompt.lead_end == "</think>" and tokenizer.decode(prompt.ids).endswith("<|im_start|>assistant\n")
    assert after_lead("<think>\n\n</think>\n\nParis ", prompt.lead_end) == after_lead(" Paris", "") == "Paris"
    assert after_lead("Paris", prompt.lead_end) == "Paris"
