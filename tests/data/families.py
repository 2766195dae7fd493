"""Chat templates written here in the style of well-known families, each with its exact trained text.

`GOLD[name]` is what must train of [user "Hi", assistant "One.", user "More?", assistant "Two."], turn by turn.
"""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from luthier.contracts.record import Chat, Source
from luthier.data.template import Template
from tiny import tiny_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role"
    " not supported') }}{% endif %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
_QWEN3 = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% set r = m.reasoning_content or '' %}{% set c = m.content %}{% if '</think>' in c %}"
    "{% set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\\n') %}{% endif %}{% if loop.index0 > ns.last %}"
    "{{ '<think>\\n' + r + '\\n</think>\\n\\n' }}{% endif %}{{ c }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
QWEN3 = _QWEN3 + "{% endif %}"
QWEN3_PROMPTED = _QWEN3 + "{{ '<think>\\n' }}{% endif %}"
GPT_OSS = (
    "<|start|>system<|message|>You are it.<|end|>{% for m in messages %}{% if m.role == 'assistant' %}"
    "<|start|>assistant<|channel|>final<|message|>{{ m.content }}{{ '<|return|>' if loop.last else '<|end|>' }}"
    "{% else %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
GLM = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content | trim }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
VICUNA = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} {% else %}"
    "ASSISTANT: {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
NO_LAST_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|im_end|>\n<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = CHATML.replace(
    "{{ m.content }}",
    "{{ m.content }}{% for c in m.tool_calls or [] %}<tool_call>{{ {'name': c.function.name,"
    " 'arguments': c.function.arguments} | tojson }}</tool_call>{% endfor %}",
)

TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "llama2": LLAMA2, "mistral": MISTRAL, "gemma": GEMMA, "phi3": PHI3,
    "qwen3": QWEN3, "qwen3_prompted": QWEN3_PROMPTED, "gpt_oss": GPT_OSS, "glm": GLM, "vicuna": VICUNA,
    "deepseek": DEEPSEEK, "no_last_end": NO_LAST_END, "marked": MARKED, "tools": TOOLS,
}  # fmt: skip
GOLD = {
    "chatml": ["One.<|im_end|>", "Two.<|im_end|>"],
    "llama3": ["One.<|eot_id|>", "Two.<|eot_id|>"],
    "llama2": [" One. <EOS>", " Two. <EOS>"],
    "mistral": ["One.<EOS>", "Two.<EOS>"],
    "gemma": ["One.<end_of_turn>", "Two.<end_of_turn>"],
    "phi3": ["One.<|end|>", "Two.<|end|>"],
    "qwen3": ["One.<|im_end|>", "<think>\n\n</think>\n\nTwo.<|im_end|>"],
    "qwen3_prompted": ["One.<|im_end|>", "\n</think>\n\nTwo.<|im_end|>"],
    "gpt_oss": ["<|channel|>final<|message|>One.<|end|>", "<|channel|>final<|message|>Two.<|return|>"],
    "glm": ["One.<|user|>", "Two.<|user|>"],
    "vicuna": [" One.<EOS>", " Two.<EOS>"],
    "deepseek": ["One.<EOS>", "Two.<EOS>"],
    "no_last_end": ["One.<|im_end|>", "Two.<|im_end|>"],
    "marked": ["One.<|im_end|>", "Two.<|im_end|>"],
    "tools": ["One.<|im_end|>", "Two.<|im_end|>"],
}  # fmt: skip
STRINGS = {"bos_token": "<BOS>", "eos_token": "<EOS>", "unk_token": "<UNK>", "pad_token": "<PAD>"}
SOURCE = Source("rows.jsonl", 7)


def template(name: str) -> Template:
    return Template(TEMPLATES[name], STRINGS, name)


def tokenizer_for(made: Template) -> PreTrainedTokenizerFast:
    """Byte-level, and every control string of the template one special token."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(dict(STRINGS))
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [AddedToken(text, special=True, normalized=False) for text in made.control_strings() if text not in known]
    )
    return tokenizer


def chat(*turns: str, **more: Any) -> Chat:
    """user, assistant, user, ... in order."""
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return Chat(messages, SOURCE, **more)


def trained(masked: Any) -> list[str]:
    """The text of each run of trained tokens, from the tokens' own characters."""
    encoded, found, previous = masked.encoded, [], False
    for i, weight in enumerate(masked.weights_T):
        if weight and not previous:
            found.append((int(encoded.start_T[i]), int(encoded.end_T[i])))
        elif weight:
            found[-1] = (found[-1][0], int(encoded.end_T[i]))
        previous = bool(weight)
    return [encoded.text[start:end] for start, end in found]
