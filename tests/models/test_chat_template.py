"""Chat templates as checkpoints have them, rendered as transformers does; and templates that misbehave."""

import json
from pathlib import Path

import jinja2
import pytest
import transformers
from checkpoints import BOS, EOS, small_bpe_tokenizer, write_tokenizer

from pdengine.models import chat_template
from pdengine.models.chat_template import ChatTemplate, ChatTemplateError, load_chat_templates
from pdengine.models.checkpoint import CheckpointError
from pdengine.models.tokenizer import Tokenizer

TEMPLATES = {path.stem: path for path in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))}
USER = {"role": "user", "content": " the cat & <b>dog</b>\n\nnaïve 東京 "}
ASSISTANT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n it's 👋🏽 \n"}
SYSTEM = {"role": "system", "content": " be {{ brief }} "}
CONVERSATIONS = {
    "user": [USER],
    "system": [SYSTEM, USER],
    "turns": [USER, ASSISTANT, {"role": "user", "content": ""}],
    "all": [SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER],
    "answered": [USER, ASSISTANT],
    "tool": [USER, ASSISTANT, {"role": "tool", "content": "42"}, USER],
    "twice the user": [USER, USER],
    "late system": [USER, SYSTEM],
}
# Each would run for years; what they output stays small.
ENDLESS = {
    "loops": "\n" + "{% for a in range(99999) %}" * 6 + "{% endfor %}" * 6,
    "skipping": "\n"
    + "{% for a in range(99999) if false %}{% endfor %}".join(["{% for b in range(99999) %}"] * 3)
    + "{% endfor %}" * 3,
    "macros": "\n{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "recursive loops": "\n{% for a in [[]] recursive %}{% if loop.depth < 90 %}"
    "{{ loop([[]]) }}{{ loop([[]]) }}{% endif %}{% endfor %}",
}


@pytest.fixture
def directory(tmp_path):
    write_tokenizer(tmp_path, small_bpe_tokenizer(), chat_template=None)
    return tmp_path


def rendered(render):
    """What `render` returns, or the reason that the template itself gave for refusing."""
    try:
        return render()
    except jinja2.TemplateError as error:
        return "refused", str(error)
    except ChatTemplateError as error:
        return "refused", str(error.__cause__)


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_real_templates_render_as_in_transformers(directory, template):
    (directory / "chat_template.jinja").write_text(template.read_text())
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_chat_templates(directory)["default"]
    tokenizer = Tokenizer.load(directory)
    lengths = set()
    for messages in CONVERSATIONS.values():
        for add in (True, False):
            options = {"add_generation_prompt": add}
            expected = rendered(lambda: reference.apply_chat_template(messages, tokenize=False, **options))  # noqa: B023
            assert rendered(lambda: ours.render(messages, **options)) == expected  # noqa: B023
            lengths.add(len(expected))
            if isinstance(expected, str):
                ids = reference.apply_chat_template(messages, return_dict=False, **options)
                assert tokenizer.encode_chat(messages, **options) == ids
    assert len(lengths) > 2, "every conversation renders alike: the test compares nothing"


CALL = {"id": "c1", "type": "function", "function": {"name": "weigh", "arguments": {"animal": "cat"}}}
CALLS = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "name": "weigh", "content": "42"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weigh",
            "description": "its <weight>",
            "parameters": {"type": "object", "properties": {"animal": {"type": "string"}}},
        },
    }
]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_what_else_templates_take_they_take_as_in_transformers(directory, template):
    """Tools and calls of them, an answer to be continued, and variables of the template's own."""
    (directory / "chat_template.jinja").write_text(template.read_text())
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    ours = load_chat_templates(directory)["default"]
    open_answer = {"role": "assistant", "content": " it's\n a cat: "}
    for messages, options, variables in (
        ([USER], {"tools": TOOLS}, {}),
        (CALLS, {"tools": TOOLS}, {}),
        (CALLS, {}, {}),
        ([USER, open_answer], {"continue_final_message": True}, {}),
        ([USER, ASSISTANT], {"continue_final_message": True}, {}),
        ([USER], {"documents": [{"title": "a", "text": "b"}]}, {"enable_thinking": False, "unheard_of": 1}),
    ):
        options = {"add_generation_prompt": False, **options}
        if template.stem == "macros" and "continue_final_message" in options:
            continue  # it shows messages in capitals
        expected = rendered(
            lambda: reference.apply_chat_template(messages, tokenize=False, **options, **variables)  # noqa: B023
        )
        assert rendered(lambda: ours.render(messages, **options, variables=variables)) == expected  # noqa: B023


def test_a_final_message_that_is_not_shown_cannot_be_continued(directory):
    template = ChatTemplate("{% for m in messages %}{{ m.content | upper }}{% endfor %}", Path("t"), {})
    with pytest.raises(ChatTemplateError, match="does not show the final message as it is"):
        template.render([USER, ASSISTANT], continue_final_message=True)


def test_what_a_template_is_told_by_its_server_comes_before_variables():
    template = ChatTemplate("{{ eos_token }}{{ messages[0].content }}{{ x }}", Path("t"), {"eos_token": EOS})
    variables = {"eos_token": "?", "messages": [], "_check_deadline": 1, "x": 2}
    assert template.render([{"role": "user", "content": "a"}], variables=variables) == f"{EOS}a2"


@pytest.mark.parametrize(
    ("source", "role"), [("", "system"), ("{% if m.role == 'developer' %}{% endif %}", "developer")]
)
def test_a_template_that_does_not_know_developers_is_told_system(source, role):
    source = "{% for m in messages %}" + source + "{{ m.role }}{% endfor %}"
    message = {"role": "developer", "content": "be brief"}
    assert ChatTemplate(source, Path("t"), {}).render([message]) == role


def test_templates_refuse_as_in_transformers(directory):
    mistral = ChatTemplate(TEMPLATES["mistral"].read_text(), directory, {"bos_token": BOS, "eos_token": EOS})
    with pytest.raises(
        ChatTemplateError, match="line 18: After the optional system message, conversation roles"
    ):
        mistral.render(CONVERSATIONS["twice the user"])


def write_config(directory, template):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


def names_and_texts(directory):
    return {name: template.render([USER]) for name, template in load_chat_templates(directory).items()}


def test_places_of_templates(directory):
    """Files win over the config and the config over the processor's file; the kinds of places never mix."""
    assert names_and_texts(directory) == {}
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": "processor"}))
    assert names_and_texts(directory) == {"default": "processor"}
    write_config(directory, "config")
    assert names_and_texts(directory) == {"default": "config"}
    named = [{"name": "default", "template": "d"}, {"name": "rag", "template": "r"}]
    write_config(directory, named)
    assert names_and_texts(directory) == {"default": "d", "rag": "r"}
    (directory / "chat_template.jinja").write_text("file 東京")
    assert names_and_texts(directory) == {"default": "file 東京"}
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    assert names_and_texts(directory) == {"default": "file 東京", "tool_use": "tools"}
    expected = transformers.AutoTokenizer.from_pretrained(directory).chat_template
    assert expected == {"default": "file 東京", "tool_use": "tools"}


def test_a_template_by_its_name(directory):
    write_config(directory, [{"name": "rag", "template": "r"}, {"name": "tool_use", "template": "t"}])
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode_chat([USER], template="rag")) == "r"
    with pytest.raises(
        ChatTemplateError, match="no chat template is named 'default', there are rag, tool_use"
    ):
        tokenizer.encode_chat([USER])


def test_special_tokens_from_the_older_file(directory):
    tokens = {"bos_token": {"content": "<old>"}, "pad_token": "<pad>"}
    (directory / "special_tokens_map.json").write_text(json.dumps(tokens))
    write_config(directory, "{{ bos_token }}{{ pad_token }}")
    assert names_and_texts(directory) == {"default": f"{BOS}<pad>"}


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (3, "chat_template must be a string"),
        (["x"], "chat_template must be .*list of objects"),
        ([{"name": "a"}], "chat_template must be .*list of objects"),
        ([{"template": "a"}], "chat_template must be .*list of objects"),
    ],
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "chat_template.json"])
def test_bad_fields(directory, file, template, sentence):
    (directory / file).write_text(json.dumps({"chat_template": template}))
    with pytest.raises(CheckpointError, match=rf"{file}: {sentence}"):
        load_chat_templates(directory)


def test_files_that_are_not_text(directory):
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: cannot be read"):
        load_chat_templates(directory)


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS.keys())
def test_endless_templates_are_ended(source, monkeypatch):
    monkeypatch.setattr(chat_template, "RENDER_SECONDS", 0.05)
    template = ChatTemplate(source, Path("template"), {})
    with pytest.raises(ChatTemplateError, match="template: chat template failed at line 2: it takes longer"):
        template.render([USER])


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(__class__=1) }}",
        "{% set n = namespace() %}{% set n.__class__ = 1 %}",
        "{{ ().__class__ }}{{ ().__class__.__base__ }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ messages.clear() }}",
        "{{ messages[0].update(role=1) }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
    ],
)
def test_the_sandbox_holds(source):
    with pytest.raises(ChatTemplateError, match=r"unsafe|namespace|no loader|has no attribute"):
        ChatTemplate(source, Path("template"), {}).render([USER])


def test_rendering_leaves_the_messages_alone():
    messages = [dict(USER)]
    ChatTemplate("{% set messages = [] %}{% for m in messages %}{% endfor %}", Path("t"), {}).render(messages)
    assert messages == [USER]
