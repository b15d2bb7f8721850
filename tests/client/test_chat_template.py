"""Our rendering against Transformers' own."""

from __future__ import annotations

import json

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from flightline.client import ChatTemplate, ChatTemplateError, Client
from flightline.client.chat_template import deployed_model_dir

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_LIKE = """{{- bos_token }}
{%- set options = {'a': '<é>', 'b': [1, 2]} %}
{%- if not tools is none %}
    TOOLS
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'skip' %}
        {%- continue %}
    {%- endif %}
    {{- '[' ~ message.role ~ '] ' ~ message.content | trim ~ eos_token }}
    {% generation %}x{% endgeneration %}
{%- endfor %}
  {{ options | tojson }} {{ options | tojson(indent=2) }}
{%- if add_generation_prompt %}
    {{- '[assistant]' }}
{%- endif %}
"""
REFUSING = "{% if messages[0].role != 'user' %}{{ raise_exception('the user speaks first') }}{% endif %}ok"

CONVERSATIONS = [
    [{"role": "user", "content": "Hello <b>you</b> & 'them' \u00e9\u4f60\U0001f600"}],
    [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "  1 < 2?  "},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "Why?"},
    ],
]


def save_model(folder, template, in_file: bool):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1}, unk_token="<s>")),
        bos_token="<s>",
        eos_token="</s>",
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if not in_file:  # the older place
        path = folder / "tokenizer_config.json"
        config = json.loads(path.read_text())
        (folder / "chat_template.jinja").unlink(missing_ok=True)
        path.write_text(json.dumps({**config, "chat_template": template}))
    return tokenizer


@pytest.mark.parametrize("template", [CHATML, LLAMA_LIKE], ids=["chatml", "llama"])
@pytest.mark.parametrize("messages", CONVERSATIONS, ids=["one", "four"])
@pytest.mark.parametrize("in_file", [True, False])
def test_equals_transformers(tmp_path, template, messages, in_file):
    tokenizer = save_model(tmp_path, template, in_file)
    ours = ChatTemplate.from_dir(tmp_path)
    for prompt in (True, False):
        theirs = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert ours.render(messages, add_generation_prompt=prompt) == theirs


def test_the_templates_own_refusal_is_told(tmp_path):
    save_model(tmp_path, REFUSING, True)
    with pytest.raises(ChatTemplateError, match="the user speaks first"):
        ChatTemplate.from_dir(tmp_path).render([{"role": "system", "content": "x"}])


def test_templates_run_in_a_sandbox(tmp_path):
    template = ChatTemplate("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(ChatTemplateError):
        template.render(CONVERSATIONS[0])


def test_named_templates_use_the_default(tmp_path):
    named = [
        {"name": "tool_use", "template": "no"},
        {"name": "default", "template": "{{ messages[0].content }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert ChatTemplate.from_dir(tmp_path).render([{"role": "user", "content": "yes"}]) == "yes"


def test_no_template_and_no_deployment_are_told(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ChatTemplateError, match="no chat template"):
        ChatTemplate.from_dir(tmp_path)
    with pytest.raises(ChatTemplateError, match="make build-engines"):
        deployed_model_dir(tmp_path)


def test_chat_sends_the_rendered_prompt(server, tmp_path):
    tokenizer = save_model(tmp_path, CHATML, True)
    with Client(server.url, model_dir=tmp_path) as llm:
        llm.chat(CONVERSATIONS[0], max_tokens=2)
    theirs = tokenizer.apply_chat_template(CONVERSATIONS[0], tokenize=False, add_generation_prompt=True)
    assert server.log[0].inputs["text_input"] == theirs
