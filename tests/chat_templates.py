"""Chat templates in the manner of those that models are published with, written for these tests.

Each is what its family is known by: markers, white space, trimming, the place of the system message, what is kept of
reasoning, and how a turn ends. None is a copy.
"""
# ruff: noqa: E501 (templates read better unbroken)

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Template:
    """A template, the special tokens that it writes, and what is known of it.

    Args:
        ends: the token that ends a turn; "" where the template writes none.
        eos: the tokenizer's own end, which is another token for base models.
        system: whether it takes a system message.
        keeps_history: whether a finished turn stays in the history as it was generated, so that turns share an example.
        lead: what is generated before the content.
        trail: what is generated behind it, before the end.
        reasoning: whether it renders reasoning_content.
        tools: whether it renders tools.
    """

    source: str
    special: list[str]
    ends: str
    eos: str = ""
    bos: str | None = None
    system: bool = True
    keeps_history: bool = True
    lead: str = ""
    trail: str = ""
    reasoning: bool = False
    tools: bool = False
    added: list[str] = field(default_factory=list)


IM = ["<|im_start|>", "<|im_end|>"]
CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHATML_PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TOOLS = (
    "{% if tools %}<|im_start|>system\nTools:{% for t in tools %}\n{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
)
CALLS = "{% for c in m.tool_calls or [] %}<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}"
QWEN3 = (
    TOOLS + "{% set ns = namespace(last=-1) %}{% for m in messages %}"
    "{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% set text = m.content %}{% set thought = m.reasoning_content or '' %}"
    "{% if '</think>' in text %}{% set thought = text.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set text = text.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'assistant' and loop.index0 > ns.last and (loop.last or thought) %}"
    "<think>\n{{ thought.strip('\n') }}\n</think>\n\n{{ text }}{% else %}{{ text }}{% endif %}"
    + CALLS
    + "<|im_end|>\n{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA3_SPECIAL = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"]
ROLES_ALTERNATE = (
    "{% if m.role not in ['user', 'assistant'] %}{{ raise_exception('Only user and assistant') }}{% endif %}"
)
DEEPSEEK_USER = "<｜User｜>{{ m.content }}"

TEMPLATES = {
    "chatml": Template(CHATML + CHATML_PROMPT, IM, "<|im_end|>"),
    "chatml over another eos": Template(CHATML + CHATML_PROMPT, IM, "<|im_end|>", eos="<|endoftext|>"),
    "chatml with a bos": Template("{{ bos_token }}" + CHATML + CHATML_PROMPT, IM, "<|im_end|>", bos="<s>"),
    "chatml, not special": Template(CHATML + CHATML_PROMPT, [], "<|im_end|>", eos="</s>", added=IM),
    "chatml of plain text": Template(
        CHATML + CHATML_PROMPT, [], "", eos="</s>", trail="<|im_end|>", keeps_history=False
    ),
    "default system": Template(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nYou help.<|im_end|>\n{% endif %}"
        + CHATML
        + CHATML_PROMPT,
        IM,
        "<|im_end|>",
        eos="<|endoftext|>",
    ),
    "llama 2": Template(
        "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}{% set sys = messages[0].content %}"
        "{% else %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}"
        "{{ bos_token }}[INST] {% if loop.first and sys %}<<SYS>>\n{{ sys }}\n<</SYS>>\n\n{% endif %}"
        "{{ m.content.strip() }} [/INST]{% else %} {{ m.content.strip() }} {{ eos_token }}{% endif %}{% endfor %}",
        [],
        "</s>",
        eos="</s>",
        bos="<s>",
    ),
    "llama 3": Template(LLAMA3, LLAMA3_SPECIAL, "<|eot_id|>", bos="<|begin_of_text|>", eos="<|end_of_text|>"),
    "llama 3 with tools": Template(
        "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\nTools: {{ tools | tojson }}<|eot_id|>"
        "{% endif %}{% for m in messages %}{% set role = 'ipython' if m.role == 'tool' else m.role %}"
        "<|start_header_id|>{{ role }}<|end_header_id|>\n\n{% if m.tool_calls %}"
        '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{ m.tool_calls[0].function.arguments | tojson }}}'
        "<|eom_id|>{% elif m.role == 'tool' %}{{ m.content | tojson }}<|eot_id|>{% else %}{{ m.content | trim }}<|eot_id|>"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        LLAMA3_SPECIAL,
        "<|eot_id|>",
        bos="<|begin_of_text|>",
        eos="<|end_of_text|>",
        tools=True,
    ),
    "mistral": Template(
        "{{ bos_token }}{% for m in messages %}" + ROLES_ALTERNATE + "{% if m.role == 'user' %}"
        "[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        [],
        "</s>",
        eos="</s>",
        bos="<s>",
        system=False,
    ),
    "mistral, tools before the last question": Template(
        "{{ bos_token }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{% for m in messages %}{% if m.role == 'user' %}{% if tools and m == users[-1] %}"
        "[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}[INST]{{ m.content }}[/INST]"
        "{% elif m.role == 'tool' %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]"
        "{% elif m.tool_calls %}[TOOL_CALLS]{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}{{ eos_token }}"
        "{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        [
            "[INST]",
            "[/INST]",
            "[AVAILABLE_TOOLS]",
            "[/AVAILABLE_TOOLS]",
            "[TOOL_CALLS]",
            "[TOOL_RESULTS]",
            "[/TOOL_RESULTS]",
        ],
        "</s>",
        eos="</s>",
        bos="<s>",
        system=False,
        tools=True,
    ),
    "mistral with a system prompt": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]"
        "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}",
        ["[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"],
        "</s>",
        eos="</s>",
        bos="<s>",
    ),
    "gemma": Template(
        "{{ bos_token }}{% for m in messages %}" + ROLES_ALTERNATE + "<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
        system=False,
    ),
    "gemma, system in the first question": Template(
        "{{ bos_token }}{% set sys = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
        "{% for m in messages if m.role != 'system' %}<start_of_turn>{{ 'model' if m.role == 'assistant' else 'user' }}\n"
        "{{ sys if loop.first }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<start_of_turn>", "<end_of_turn>"],
        "<end_of_turn>",
        eos="<eos>",
        bos="<bos>",
    ),
    "phi 3": Template(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "<|end|>",
        eos="<|endoftext|>",
    ),
    "phi 4": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}",
        [*IM, "<|im_sep|>"],
        "<|im_end|>",
        eos="<|endoftext|>",
    ),
    "zephyr": Template(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        [],
        "</s>",
        eos="</s>",
    ),
    "qwen 2.5": Template(
        TOOLS
        + "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n{{ m.content }}"
        + CALLS
        + "<|im_end|>\n{% endfor %}"
        + CHATML_PROMPT,
        IM,
        "<|im_end|>",
        eos="<|endoftext|>",
        tools=True,
        added=["<tool_call>", "</tool_call>"],
    ),
    "qwen 3": Template(
        QWEN3 + CHATML_PROMPT,
        IM,
        "<|im_end|>",
        eos="<|endoftext|>",
        keeps_history=False,
        lead="<think>\n\n</think>\n\n",
        reasoning=True,
        tools=True,
        added=["<think>", "</think>", "<tool_call>", "</tool_call>"],
    ),
    "qwen 3, always thinking": Template(
        QWEN3 + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        IM,
        "<|im_end|>",
        keeps_history=False,
        lead="\n</think>\n\n",
        reasoning=True,
        added=["<think>", "</think>"],
    ),
    "thinking closed in the prompt": Template(
        CHATML + "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
        IM,
        "<|im_end|>",
        keeps_history=False,
        added=["<think>", "</think>"],
    ),
    "deepseek": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        + DEEPSEEK_USER
        + "{% else %}<｜Assistant｜>{{ m.content }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<｜Assistant｜>{% endif %}",
        ["<｜User｜>", "<｜Assistant｜>"],
        "<｜end▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
    ),
    "deepseek, reasoning": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}"
        + DEEPSEEK_USER
        + "{% else %}<｜Assistant｜>{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}",
        ["<｜User｜>", "<｜Assistant｜>"],
        "<｜end▁of▁sentence｜>",
        eos="<｜end▁of▁sentence｜>",
        bos="<｜begin▁of▁sentence｜>",
        keeps_history=False,
        lead="\n</think>\n\n",
        reasoning=True,
        added=["<think>", "</think>"],
    ),
    "command r": Template(
        "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
        "{% if m.role == 'system' %}<|SYSTEM_TOKEN|>{% elif m.role == 'user' %}<|USER_TOKEN|>{% else %}<|CHATBOT_TOKEN|>{% endif %}"
        "{{ m.content.strip() }}<|END_OF_TURN_TOKEN|>{% endfor %}"
        "{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}",
        ["<|START_OF_TURN_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|END_OF_TURN_TOKEN|>"],
        "<|END_OF_TURN_TOKEN|>",
        eos="<eos>",
        bos="<BOS_TOKEN>",
    ),
    "vicuna": Template(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }} {% elif m.role == 'user' %}"
        "USER: {{ m.content }} {% else %}ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}ASSISTANT:{% endif %}",
        [],
        "</s>",
        eos="</s>",
        bos="<s>",
    ),
    "alpaca": Template(
        "{% for m in messages %}{% if m.role == 'assistant' %}### Response:\n{{ m.content }}\n\n{% else %}"
        "### {{ 'Instruction' if m.role == 'user' else 'System' }}:\n{{ m.content }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}",
        [],
        "",
        eos="</s>",
        keeps_history=False,
    ),
    "falcon": Template(
        "{% for m in messages %}{{ '\n\n' if not loop.first }}{{ m.role | capitalize }}: {{ m.content.strip() }}{% endfor %}"
        "{{ '\n\nAssistant:' if add_generation_prompt }}",
        [],
        "",
        eos="<|endoftext|>",
        keeps_history=False,
    ),
    "granite": Template(
        "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}<|end_of_text|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}",
        ["<|start_of_role|>", "<|end_of_role|>"],
        "<|end_of_text|>",
        eos="<|end_of_text|>",
    ),
    "harmony": Template(
        "{% for m in messages %}{% if m.role == 'assistant' %}{% if loop.last and m.thinking %}"
        "<|start|>assistant<|channel|>analysis<|message|>{{ m.thinking }}<|end|>{% endif %}"
        "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
        "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>"],
        "<|return|>",
        eos="<|return|>",
        keeps_history=False,
        lead="<|channel|>final<|message|>",
        reasoning=True,
    ),
    "glm": Template(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"],
        "",
        eos="<|endoftext|>",
        keeps_history=False,
    ),
    "openchat": Template(
        "{{ bos_token }}{% for m in messages %}GPT4 Correct {{ m.role.title() }}: {{ m.content }}<|end_of_turn|>{% endfor %}"
        "{% if add_generation_prompt %}GPT4 Correct Assistant:{% endif %}",
        ["<|end_of_turn|>"],
        "<|end_of_turn|>",
        eos="<|end_of_turn|>",
        bos="<s>",
    ),
    "no generation prompt": Template(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        IM,
        "<|im_end|>",
        lead="<|im_start|>assistant\n",
    ),
}
