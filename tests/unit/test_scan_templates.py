"""Chat templates that reach for Python are found; those that real models have are not."""

from __future__ import annotations

from pathlib import Path

import pytest

import adapterhub_tools as at
from adapterhub_tools.ops.scan_template import gguf_templates, template_dangers, templates_in

HARMFUL = [
    "{{ x.__class__ }}",
    "{{ x['__class__'] }}",
    "{{ ''['__cla' + 'ss__'] }}",
    "{{ ()|attr('\\x5f\\x5fclass\\x5f\\x5f') }}",
    "{{ x['\\x5f\\x5finit\\x5f\\x5f'] }}",
    "{{ x['\\u005f\\u005finit\\u005f\\u005f'] }}",
    "{% set a = '%}' + x.__class__ %}",
    '{{ "}}" ~ x.__class__ }}',
    "{{ '\\'}}' ~ x.__class__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ lipsum }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{%- for c in [].__class__.__base__.__subclasses__() -%}{% endfor %}",
    "{{ x['_' * 2 ~ 'class' ~ '_' * 2] }}",
    "{%- set u = '_' %}{{ x[u + u + 'class' + u + u] }}",
    "{{ x[['__cl', 'ass__'] | join] }}",
    "{{ '{0.__class__}'.format(x) }}",
    "{% include 'x' %}",
    "{%- from 'x' import y %}",
    "{{ x.mro() }}",
    "{{ x.gi_frame.f_builtins }}",
    "{{ eval('1') }}",
    "{{ x.__class__",
    "{{ x\n\n.__class__ }}",
    "{# {{ #}{{ x.__class__ }}",
    "{{ '{#' }}{{ x.__class__ }}",
]

# Forms taken from the templates of widely used models.
USUAL = [
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>' + '\\n'}}{% endfor %}",
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}",
    "{{- raise_exception('Conversation roles must alternate') }}",
    "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}",
    "{%- for message in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}{%- endfor %}",
    "{%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}",
    "{{- tool_call.arguments | tojson(indent=4) }}",
    "{% macro render(x, open='<', close='>') %}{{ open ~ x ~ close }}{% endmacro %}",
    "{{ 'snake_case_name' ~ 'Environment: ipython' }}",
    "the words __class__, eval( and {{ bos_token }} outside of a block",
    "{# a remark on x.__class__ #}{{ bos_token }}",
    "{{ messages[0]['content'][loop.index0 + 1] ~ '▁' }}",
]


@pytest.mark.parametrize("template", HARMFUL)
def test_harmful(template: str) -> None:
    assert list(template_dangers(template))


@pytest.mark.parametrize("template", USUAL)
def test_usual(template: str) -> None:
    assert list(template_dangers(template)) == []


def test_each_danger_is_told_once_with_its_line() -> None:
    text = "a\n{{ x.__class__ }}\n{{ y.__class__ }}\n{% if z.__globals__ %}{% endif %}"
    assert list(template_dangers(text)) == [(2, "uses __class__"), (4, "uses __globals__")]


def test_templates_are_found_wherever_they_stand() -> None:
    value = {
        "chat_template": [{"name": "default", "template": "a"}, {"name": "tool", "template": "b"}],
        "inner": {"chat_template": {"rag": "c"}},
        "default_chat_template": "d",
        "list": [{"chat_template": "e"}],
        "other": "f",
    }
    assert {text for _, text in templates_in(value)} == {"default", "a", "tool", "b", "c", "d", "e"}


def test_templates_of_gguf_files_are_found(tmp_path: Path) -> None:
    def entry(key: bytes, text: bytes, kind: int = 8) -> bytes:
        head = len(key).to_bytes(8, "little") + key + kind.to_bytes(4, "little")
        return head + len(text).to_bytes(8, "little") + text

    head = b"GGUF" + (3).to_bytes(4, "little") + bytes(16)
    good = head + entry(b"general.name", b"x") + entry(b"tokenizer.chat_template", b"{{ bos_token }}")
    evil = good + entry(b"tokenizer.chat_template.tool_use", b"{{ x.__class__ }}") + bytes(100)
    assert list(gguf_templates(good)) == [("tokenizer.chat_template", "{{ bos_token }}")]
    (tmp_path / "a.gguf").write_bytes(good)
    assert at.scan(tmp_path).ok
    (tmp_path / "a.gguf").write_bytes(evil)
    (found,) = at.scan(tmp_path).problems
    assert found.kind == "template-code"
    assert "tool_use" in found.loc


def test_a_long_hostile_text_is_read_in_linear_time() -> None:
    for text in ("{{ '" + "\\'" * 200_000, "{{" * 200_000, "{% " + "'a" * 200_000, "{#" * 200_000):
        list(template_dangers(text))
