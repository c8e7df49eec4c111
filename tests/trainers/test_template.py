"""Chat templates in their child process: what they render, what they must not do, and what a skeleton promises."""

from __future__ import annotations

import functools
import os
import pickle
import resource
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers import template as module
from trainers.errors import TemplateError
from trainers.template import Ask, Blank, Slot, Template, builtin, builtin_names, fill, load_template

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CHAT = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Hello"}]
PLAIN = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"


def render(source: str, messages: list[dict[str, Any]] = CHAT, tools: list[Any] | None = None) -> str | TemplateError:
    return Template(source, SPECIAL).render([Ask(messages, tools, False)])[0]


def refused(source: str, messages: list[dict[str, Any]] = CHAT) -> str:
    """Why the template gives no text."""
    try:
        answer = render(source, messages)
    except TemplateError as error:
        answer = error
    assert isinstance(answer, TemplateError), answer
    assert answer.remedy
    return answer.message


# -- rendering -------------------------------------------------------------------------------------------------------


def test_renders_as_transformers_does(smollm: Path) -> None:
    from transformers import AutoTokenizer

    reference = AutoTokenizer.from_pretrained(smollm)
    sources = [
        PLAIN,
        "{%- for m in messages %}\n    {%- if loop.first %}{% continue %}{% endif %}\n  {{ m | tojson }}\n{% break %}{% endfor %}\nend\n",
        "{{ tools | tojson(indent=2) }} {{ messages[0] | tojson(separators=(',', ':'), sort_keys=true) }} <&> \u2028",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ bos_token }}{{ eos_token }}",
        "{%- set ns = namespace(n=0) %}{% for m in messages[::-1] %}{% set ns.n = ns.n + m.content | length %}{% endfor %}{{ ns.n }}",
        "{% macro f(m) %}{{ m.role.upper() }}:{{ m.content | trim }}{% endmacro %}{% for m in messages %}{{ f(m) }}{% endfor %}{{ tools }}",
        "{{ messages[0].reasoning_content }}{{ messages[1].tool_calls is defined }}{{ documents is none }}",
    ]
    messages = [{"role": "user", "content": " <b>Grüße 👋🏽 ' \" {{ x }}\n"}, {"role": "assistant", "content": ""}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"ä": [1, 2.50, None, True, 10**30]}}}]
    for source in sources:
        for given_tools in (None, tools):
            wanted = reference.apply_chat_template(messages, tools=given_tools, chat_template=source, tokenize=False)
            special = {k: v for k, v in reference.special_tokens_map.items() if isinstance(v, str)}
            assert Template(source, special).render([Ask(messages, given_tools, False)]) == [wanted]


def test_what_the_date_and_chance_would_change_is_not_there() -> None:
    assert render("{{ strftime_now is defined }}") == "False"
    assert "lipsum" in refused("{{ lipsum() }}")
    assert "random" in refused("{{ messages | random }}")


def test_the_template_s_own_refusal_is_told() -> None:
    assert refused("{{ raise_exception('roles must alternate') }}") == (
        "The chat template does not render the conversation: roles must alternate."
    )
    assert "not valid Jinja" in refused("{% for m in messages %}{{ m")
    assert "deep" not in refused("{{ raise_exception('x' * 100000) }}") and len(refused("{{ raise_exception('x' * 100000) }}")) < 1000


def test_one_failure_in_a_batch_spares_the_others() -> None:
    template = Template("{% if messages[0].content == 'bad' %}{{ raise_exception('bad') }}{% endif %}" + PLAIN, SPECIAL)
    asks = [Ask([{"role": "user", "content": "bad" if i % 7 == 3 else f"{i}"}], None, True) for i in range(1000)]
    for i, answer in enumerate(template.render(asks)):
        assert isinstance(answer, TemplateError) if i % 7 == 3 else answer == f"[user] {i}\n[assistant] "


def test_many_and_long_conversations_do_not_jam_the_pipe() -> None:
    template = Template(PLAIN, SPECIAL)
    contents = ["x" * (i * 1000) for i in range(300)] + ["é" * 4_000_000]
    answers = template.render([Ask([{"role": "user", "content": c}], None, False) for c in contents])
    assert answers == [f"[user] {c}\n" for c in contents]
    assert template.render([]) == []


def test_ten_thousand_short_conversations_take_no_time() -> None:
    template = Template(PLAIN, SPECIAL)
    start = time.process_time()
    template.render([Ask(CHAT, None, False)] * 10_000)
    assert time.process_time() - start < 2


def test_values_that_are_no_json_are_refused_one_by_one() -> None:
    template = Template(PLAIN, SPECIAL)
    odd = [{"role": "user", "content": object()}]
    nested: Any = []
    for _ in range(10_000):
        nested = [nested]
    surrogate = [{"role": "user", "content": "\ud800"}]
    too_long = [{"role": "user", "content": "x" * (17 << 20)}]
    answers = template.render([Ask(m, None, False) for m in (odd, CHAT, [{"role": "user", "content": nested}], surrogate, too_long, CHAT)])
    assert [isinstance(a, TemplateError) for a in answers] == [True, False, True, True, True, False]


def test_pickled_templates_render() -> None:
    template = pickle.loads(pickle.dumps(Template(PLAIN, SPECIAL)))
    assert template.render([Ask(CHAT, None, True)]) == ["[user]  Hi \n[assistant] Hello\n[assistant] "]


def test_threads_share_the_child() -> None:
    template = Template(PLAIN, SPECIAL)
    wrong: list[Any] = []

    def work(name: str) -> None:
        for i in range(50):
            asks = [Ask([{"role": name, "content": f"{i}.{j}"}], None, False) for j in range(20)]
            if template.render(asks) != [f"[{name}] {i}.{j}\n" for j in range(20)]:
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(f"thread{n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_forked_process_has_a_child_of_its_own() -> None:
    template = Template(PLAIN, SPECIAL)
    wanted = template.render([Ask(CHAT, None, False)])
    before = module._child
    pid = os.fork()
    if pid == 0:
        same = module._child is None and template.render([Ask(CHAT, None, False)]) == wanted and module._child is not before
        module._close()
        os._exit(0 if same else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert template.render([Ask(CHAT, None, False)]) == wanted and module._child is before


def test_a_killed_child_is_replaced() -> None:
    template = Template(PLAIN, SPECIAL)
    assert module._child
    module._child.process.kill()
    module._child.process.wait()
    assert template.render([Ask(CHAT, None, False)] * 2) == ["[user]  Hi \n[assistant] Hello\n"] * 2


# -- hostile templates -----------------------------------------------------------------------------------------------

SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (SLOW, "CPU time"),
        ("{% set n = 10 ** 9 %}{{ n ** n }}", "CPU time"),  # one operation, in C: no Python handler would ever run
        ("{{ 'x' * 10 ** 9 }}", "memory"),
        ("{{ 'x' | center(10 ** 9) }}", "memory"),
        ("{{ '%0999999999d' % 1 }}", "memory"),
        ("{{ '{:999999999}'.format('x') }}", "memory"),
        ("{{ ('x' * 50000) | replace('x', 'y' * 50000) }}", "memory"),
        ("{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}", "memory"),
        ("{% set ns = namespace(s='x') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "memory"),
        ("{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", "memory"),
        ("{{ 'x' * (20 * 2 ** 20) }}", "more than 16 MiB"),
        ("{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}", "more than 16 MiB"),
        ("{{ range(10 ** 9) | list }}", "Range too big"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "not valid Jinja"),
        ("{{ messages.__class__.__mro__ }}", "is unsafe"),
        ("{{ cycler.next.__globals__ }}", "is unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "is unsafe"),
        ("{{ raise_exception.__globals__ }}", "is unsafe"),
        ("{{ '{0.__class__}'.format(messages) }}", "is unsafe"),
        ("{{ messages | attr('__class__') }}", "is unsafe"),
        ("{{ namespace(__html__=1) }}", "namespace cannot hold"),
        ("{% set ns = namespace() %}{% set ns._x = 1 %}", "namespace cannot hold"),
        ("{{ messages.append(1) }}", "is unsafe"),
        ("{% include '/etc/passwd' %}", "does not render"),
    ],
)
def test_hostile_templates_are_stopped(source: str, says: str) -> None:
    start, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert says in refused(source)
    assert time.monotonic() - start < 30  # 2 s of CPU time, on a machine that may be busy
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10  # KiB
    assert render(PLAIN) == "[user]  Hi \n[assistant] Hello\n"


def test_hostile_conversations_do_not_harm_the_others() -> None:
    """A template that is slow for some conversations: these are refused, the others rendered, and after three it is given up."""
    template = Template("{% if messages[0].content == 'slow' %}" + SLOW + "{% endif %}" + PLAIN, SPECIAL)
    asks = [Ask([{"role": "user", "content": c}], None, False) for c in ["a", "slow", "b", "slow", "c", "slow", *"d" * 100]]
    answers = [a if isinstance(a, str) else a.message for a in template.render(asks)]
    slow = "The chat template takes more than 2 s of CPU time."
    assert answers[:6] == ["[user] a\n", slow, "[user] b\n", slow, "[user] c\n", slow]
    assert all("the rest were not rendered" in a for a in answers[6:])


def test_a_child_killed_in_the_middle_is_no_conversations_fault() -> None:
    template = Template("{% for i in range(90000) %}{% endfor %}{{ messages[0].content }}", {})
    assert module._child
    killer = threading.Timer(0.02, module._child.process.kill)
    killer.start()
    assert template.render([Ask(CHAT, None, False)] * 20) == [CHAT[0]["content"]] * 20
    killer.join()


def test_the_child_can_neither_open_files_nor_sockets_nor_see_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNEYARD_TEST_SECRET", "x")
    child = module._Child()
    try:
        limits = Path(f"/proc/{child.process.pid}/limits").read_text()
        assert all(
            line.split()[3:5] == ["3", "3"] if line.startswith("Max open") else line.split()[3:5] == ["0", "0"]
            for line in limits.splitlines()
            if line.startswith(("Max open files", "Max file size"))
        )
        assert {file.name for file in Path(f"/proc/{child.process.pid}/fd").iterdir()} == {"0", "1", "2"}
        assert b"SECRET" not in Path(f"/proc/{child.process.pid}/environ").read_bytes()
    finally:
        child.stop()


def test_the_child_ends_with_its_parent() -> None:
    child = module._Child()
    child.stdin.close()
    assert child.process.wait(timeout=120) == 0
    child.stdout.close()


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xef\xbb\xbf" + PLAIN.encode())
    assert load_template(path) == PLAIN
    path.write_bytes(b"caf\xe9")
    with pytest.raises(TemplateError, match="not UTF-8: byte 3"):
        load_template(path)
    path.write_bytes(b"x" * ((1 << 20) + 1))
    with pytest.raises(TemplateError, match="longer than 1 MiB"):
        load_template(path)
    for missing in (tmp_path / "none.jinja", tmp_path):
        with pytest.raises(TemplateError, match="cannot be read"):
            load_template(missing)
    assert builtin("nothing") is None


# -- skeletons -------------------------------------------------------------------------------------------------------

QWEN_LIKE = (
    "{%- if messages[0]['role'] == 'system' %}{{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' }}{%- endif %}"
    "{%- for message in messages %}"
    "{%- if message.content is string %}{%- set content = message.content %}{%- else %}{%- set content = '' %}{%- endif %}"
    "{%- if (message.role == 'user') or (message.role == 'system' and not loop.first) or (message.role == 'assistant' and not "
    "message.tool_calls) %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}"
    "{%- elif message.role == 'tool' %}"
    "{%- if (loop.index0 == 0) or (messages[loop.index0 - 1].role != 'tool') %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\\n<tool_response>\\n' }}{{- content }}{{- '\\n</tool_response>' }}"
    "{%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}{{- '<|im_end|>\\n' }}{%- endif %}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MACROS = (
    "{% macro text(m) %}{% if m.content is string and m.content %}{{ m.content | trim | string }}{% endif %}{% endmacro %}"
    "{% set ns = namespace(all='') %}{% for m in messages %}{% set ns.all = ns.all ~ '<' ~ m['role'] ~ '>' ~ text(m) %}{% endfor %}"
    "{% set block %}{{ ns.all }}\n{% endset %}{% filter trim %}!{{ block }}!{% endfilter %}"
)
ORDER = (  # backwards, and the system message twice
    "{% for m in messages | reverse %}{% generation %}{{ m.content.strip() ~ '|' }}{% endgeneration %}{% endfor %}"
    "{% for c in messages | selectattr('role', 'equalto', 'system') | map(attribute='content') %}{{ c }}{% endfor %}"
    "{% if messages[0].content == '' or messages[0].content != none %}.{% endif %}"
)
COPYING = {"qwen-like": QWEN_LIKE, "macros": MACROS, "order": ORDER, "plain": PLAIN}
SOURCES = COPYING | {name: known.source for name in builtin_names() if (known := builtin(name))}

NASTY = [" ", "\n", "\t", "\u2003", "</think>", "<think>", "{{ x }}", "{% raw %}", "[INST]", "[/INST]", "<<SYS>>", "<|im_end|>", "</s>"]
NASTY += ["assistant", "system", "### Response:", "USER:", "'", '"', "\\", "\0", "%s", "{0}", "<tool_response>", "e\u0301", "0", "none"]
TEXTS = st.text(max_size=20) | st.lists(st.sampled_from(NASTY), max_size=6).map("".join)
CONTENTS = TEXTS.filter(lambda text: not any(0xD800 <= ord(c) < 0xE000 for c in text))  # lone surrogates are refused


@functools.cache
def compiled(name: str) -> Template:
    return Template(SOURCES[name], SPECIAL)


@functools.cache
def skeleton(name: str, slots: tuple[Slot, ...], generation_prompt: bool) -> module.Skeleton | None:
    return compiled(name).skeleton(slots, generation_prompt)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict[str, str]]:
    roles = ["system"] * draw(st.booleans()) + ["user", "assistant"] * draw(st.integers(1, 3)) + ["user"] * draw(st.booleans())
    return [{"role": role, "content": draw(CONTENTS)} for role in roles]


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=60)
@given(conversation=conversations(), generation_prompt=st.booleans())
def test_a_filled_skeleton_is_the_render(name: str, conversation: list[dict[str, str]], generation_prompt: bool) -> None:
    parts = skeleton(name, tuple(Slot(m["role"], not m["content"]) for m in conversation), generation_prompt)
    if parts is not None:
        [wanted] = compiled(name).render([Ask(conversation, None, generation_prompt)])
        assert fill(parts, [m["content"] for m in conversation]) == wanted


@pytest.mark.parametrize("name", SOURCES)
def test_templates_that_copy_have_skeletons(name: str) -> None:
    """Else the property above would hold of nothing."""
    for system in ([], ["system"]) if name not in ("gemma", "llama2") else ([],):  # Gemma has none; Llama 2 strips two texts as one
        for roles in (["user"], ["user", "assistant"], ["user", "assistant"] * 3):
            slots = tuple(Slot(role, False) for role in [*system, *roles])
            parts = skeleton(name, slots, True)
            assert parts is not None, slots
            assert {part.message for part in parts if isinstance(part, Blank)} == set(range(len(slots)))


def test_the_real_template_has_skeletons(smollm: Path) -> None:
    import json

    template = Template(json.loads((smollm / "tokenizer_config.json").read_text()).get("chat_template") or "", SPECIAL)
    if (smollm / "chat_template.jinja").exists():
        template = Template(load_template(smollm / "chat_template.jinja"), SPECIAL)
    assert template.skeleton((Slot("user", False), Slot("assistant", True)), False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n<|im_start|>user\n",
        Blank(0, False),
        "<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n",
    )


LOOKING = [
    "{{ c | length }}",
    "{{ c | upper }}",
    "{{ c | lower }}",
    "{{ c | title }}",
    "{{ c | capitalize }}",
    "{{ c | replace('a', 'b') }}",
    "{{ c | truncate(5) }}",
    "{{ c | tojson }}",
    "{{ messages | tojson }}",
    "{{ messages }}",
    "{{ messages | string | length }}",
    "{{ c | e }}",
    "{{ c | safe }}",
    "{{ c | urlencode }}",
    "{{ {'c': c} | urlencode }}",
    "{{ {'c': c} | xmlattr }}",
    "{{ c | wordcount }}",
    "{{ c | indent }}",
    "{{ c | wordwrap }}",
    "{{ c | striptags }}",
    "{{ c | center(9) }}",
    "{{ c | pprint }}",
    "{{ c | int }}{{ c }}",
    "{{ c | float }}{{ c }}",
    "{{ c | round }}{{ c }}",
    "{{ c | abs }}{{ c }}",
    "{{ c | filesizeformat }}{{ c }}",
    "{{ c | list }}",
    "{{ c | first }}",
    "{{ c | last }}",
    "{{ c | reverse }}",
    "{{ c | sort | join }}",
    "{{ c | unique | join }}",
    "{{ c | max }}",
    "{{ c | trim('x') }}",
    "{{ c.strip('x') }}",
    "{{ c.lstrip() }}",
    "{{ c.rstrip() }}",
    "{{ c.split('</think>')[-1] }}",
    "{{ c | attr('upper') }}{{ c }}",
    "{{ c['upper']() }}",
    "{{ c[0] }}",
    "{{ c[1:] }}",
    "{{ c[-1:] ~ c }}",
    "{{ c.missing is defined }}{{ c }}",
    "{{ c._parts }}{{ c }}",
    "{% for x in c %}{{ x }}{% endfor %}",
    "{{ c }}{% if '</think>' in c %}!{% endif %}",
    "{{ c }}{% if c in 'some words' %}!{% endif %}",
    "{{ c }}{% if c not in ['a', 'b'] %}!{% endif %}",
    "{{ c }}{% if c in {'a': 1} %}!{% endif %}",
    "{{ c }}{% if c == 'a' %}!{% endif %}",
    "{{ c }}{% if 'a' != c %}!{% endif %}",
    "{{ c }}{% if c < 'm' %}!{% endif %}",
    "{{ c }}{% if 'm' >= c %}!{% endif %}",
    "{{ c }}{% if c is eq 'a' %}!{% endif %}",
    "{{ c }}{% if c is in ['a'] %}!{% endif %}",
    "{{ c }}{% if c is sameas c %}!{% endif %}",
    "{{ c }}{% if c is lower %}!{% endif %}",
    "{{ c }}{% if c is escaped %}!{% endif %}",
    "{{ c }}{% if c is odd %}!{% endif %}",
    "{{ c }}{% if c is filter %}!{% endif %}",
    "{{ c }}{% if c.strip() %}!{% endif %}",
    "{{ c }}{% if not c | trim %}!{% endif %}",
    "{{ c }}{% if c.startswith('a') %}!{% endif %}",
    "{{ c }}{% if c ~ 'b' == 'ab' %}!{% endif %}",
    "{{ c }}{{ (c + c) | length }}",
    "{{ c * 2 }}",
    "{{ c }}{{ 'x' % c }}",
    "{{ '%s' % c }}",
    "{{ '%s' % (c,) }}",
    "{{ '%s' | format(c) }}",
    "{{ '{}'.format(c) }}",
    "{{ '{x}'.format_map({'x': c}) }}",
    "{{ '{!r}'.format(c) }}",
    "{{ c }}{{ 'abc'.replace('a', c) }}",
    "{{ c }}{{ 'abc'.count(c) }}",
    "{{ c }}{{ 'abc'.find(c) }}",
    "{{ c }}{{ 'abc'.startswith(c) }}",
    "{{ c }}{{ 'abc'.translate({97: c}) }}",
    "{{ ', '.join([c]) }}",
    "{{ [c] | join }}",
    "{{ [c] | join(', ') }}",
    "{{ [1, 2] | join(c) }}",
    "{{ [c] | sum(start='') }}",
    "{{ messages | sum(attribute='content') }}",
    "{{ messages | map(attribute='content') | join }}",
    "{{ messages | map(attribute='content.upper') | list }}{{ c }}",
    "{{ messages | selectattr('content', 'equalto', 'a') | list | length }}{{ c }}",
    "{{ messages | selectattr('content', 'in', 'abc') | list | length }}{{ c }}",
    "{{ messages | groupby('content') | length }}{{ c }}",
    "{{ messages | unique(attribute='content') | list | length }}{{ c }}",
    "{{ messages | sort(attribute='content') | map(attribute='role') | join }}{{ c }}",
    "{{ (messages | max(attribute='content')).role }}{{ c }}",
    "{{ messages | map(attribute='content') | map('length') | list }}{{ c }}",
    "{{ messages[0] | dictsort(by='value') | length }}{{ c }}",
    "{{ {c: 1} | length }}{{ c }}",
    "{{ {'a': 1}[c] }}{{ c }}",
    "{{ {'a': 1}.get(c) }}{{ c }}",
    "{{ ['a'][c] is defined }}{{ c }}",
    "{{ messages[0][c] is defined }}{{ c }}",
    "{{ messages | attr(c) is defined }}{{ c }}",
    "{{ messages | map(attribute=c) | list | length }}{{ c }}",
    "{{ messages | map(c) | list | length }}{{ c }}",
    "{{ messages.index({'role': 'user', 'content': 'a'}) }}{{ c }}",
    "{{ messages.count({'role': 'user', 'content': 'a'}) }}{{ c }}",
    "{{ {'role': 'user', 'content': 'a'} in messages }}{{ c }}",
    "{{ messages[0] == messages[2] }}{{ c }}",
    "{{ messages[c:] | length }}{{ c }}",
    "{{ range(c) | list }}{{ c }}",
    "{{ c }}{% for m in messages %}{{ loop.changed(m.content) }}{% endfor %}",
    "{% set x %}{{ c }}{% endset %}{{ x | length }}{{ c }}",
    "{% set x %}a{{ c }}{% endset %}{{ x == 'ab' }}{{ c }}",
    "{% filter upper %}{{ c }}{% endfilter %}",
    "{% filter replace('a', 'b') %}{{ c }}{% endfilter %}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(c) | length }}{{ c }}",
    "{% macro f(x) %}{{ x }}{% endmacro %}{{ f(c)[:1] }}{{ c }}",
    "{% macro f() %}{{ caller() | upper }}{% endmacro %}{% call f() %}{{ c }}{% endcall %}",
    "{% set x %}{% generation %}{{ c }}{% endgeneration %}{% endset %}{{ x | upper }}",
    "{% block b %}{{ c }}{% endblock %}{{ self.b() | length }}",
    "{% autoescape true %}{{ c }}{% endautoescape %}",
    "{% autoescape add_generation_prompt %}{{ c ~ '<' }}{% endautoescape %}",
    "{% autoescape true %}{% set x %}{{ c }}{% endset %}{% endautoescape %}{{ x }}",
    "{% set ns = namespace(s='') %}{% for m in messages %}{% set ns.s = ns.s + m.content %}{% endfor %}{{ ns.s | trim | length }}{{ c }}",
    "{% set ns = namespace(s=c) %}{% for i in range(30) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
    "{{ ('a ' ~ c) | trim }}",  # where the white space of one ends the other's
    "{{ (c ~ messages[2].content).strip() }}",
    "{{ c + 1 }}",
    "{{ c ~ [c] }}",
    "{{ c }}{{ dict(a=c) }}",
    "{{ c }}{{ namespace(a=c) }}",
    "{{ c }}{{ c.strip }}",
    "{{ c }}{{ -c }}",
    "{{ c }}{{ c() }}",
    "{{ c }}{% include c %}",
    "{{ c }}{% include c ignore missing %}",
    "{{ raise_exception(c) }}",
]


@pytest.mark.parametrize("body", LOOKING)
def test_a_template_that_looks_at_texts_has_no_skeleton(body: str) -> None:
    slots = tuple(Slot(role, False) for role in ("user", "assistant", "user"))
    everything = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert Template(everything, SPECIAL).skeleton(slots, False)
    assert Template("{% set c = messages[0].content %}" + body + everything, SPECIAL).skeleton(slots, False) is None


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content }}",  # leaves the others out
        "{{ messages[0].content }}{{ raise_exception('no') }}",
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0].content }}",
        "{{ 'x' * 10 ** 9 }}",
    ],
)
def test_a_shape_that_is_refused_or_left_out_has_no_skeleton(source: str) -> None:
    assert Template(source, SPECIAL).skeleton((Slot("user", False), Slot("assistant", False)), False) is None
