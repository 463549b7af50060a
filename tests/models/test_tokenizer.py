"""Tokenizer and chat templates, against transformers where it has an answer."""

import json
import subprocess
import sys

import pytest
import transformers
from checkpoints import BOS, CHAT_TEMPLATE, EOS, small_bpe_tokenizer, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import KINDS, TEXTS

from pdengine.models.chat_template import ChatTemplateError
from pdengine.models.checkpoint import CheckpointError
from pdengine.models.tokenizer import Tokenizer

MESSAGES = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "the cat & <b>the dog</b>\n\nnaïve 東京"},
]
ADDED_TOKENS = [
    f"special {EOS} inside",
    "<tool> 東京都",
    "a  <left>  b  <right>  c<|user|> \n d",
    "the spaced out  spaced out a b",
    "whole wholesome unwhole whole.",
]
TEMPLATES = {
    "llama-3": CHAT_TEMPLATE,
    "defined": "{{ tools is defined }}{{ tools }}{{ documents }}{% if not tools %}none{% endif %}",
    "blocks": "{% for m in messages %}\n  {% if loop.first %}\n  {{ m.role }}\n  {% endif %}\n{% endfor %}\n",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{{ messages[0] | tojson(indent=2, sort_keys=true) }}",
    "methods": "{{ messages[0]['content'].strip().upper() }}{{ messages[1].content.split('the')[-1] }}",
    "namespace": "{% set a = namespace(n=0) %}{% for m in messages %}{% set a.n = 5 %}{% endfor %}{{ a.n }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ pad_token }}|",
    "prompt": "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "date": "{{ strftime_now('%Y') }}",
    "dict": "{{ dict(a=1) | tojson }}",
}


@pytest.fixture
def directory(tmp_path):
    write_tokenizer(tmp_path, small_bpe_tokenizer())
    return tmp_path


def write_template(directory, template):
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_render_as_in_transformers(directory, template):
    write_template(directory, template)
    reference = transformers.AutoTokenizer.from_pretrained(directory)
    expected = reference.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert Tokenizer.load(directory).encode_chat(MESSAGES) == expected


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """Tokenizers of every kind, ours and transformers'."""
    pairs = {}
    for kind, make in KINDS.items():
        directory = tmp_path_factory.mktemp(kind)
        write_tokenizer(directory, make())
        pairs[kind] = Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory)
    return pairs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [*TEXTS, *ADDED_TOKENS])
def test_encode_and_decode_as_in_transformers(loaded, kind, text):
    ours, reference = loaded[kind]
    ids = ours.encode(text)
    assert ids == reference(text).input_ids
    assert ours.decode(ids) == reference.decode(ids, skip_special_tokens=True)
    assert ours.decode(ids, skip_special_tokens=False) == reference.decode(ids, skip_special_tokens=False)
    assert ours.vocab_size == len(reference)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_byte_level_text_survives(text):
    tokenizer = Tokenizer(small_bpe_tokenizer(), {}, "small")
    assert tokenizer.decode(tokenizer.encode(text)[1:], skip_special_tokens=False) == text


@pytest.mark.parametrize("kind", ["byte-level", "metaspace", "gemma"])
@pytest.mark.parametrize("text", [*TEXTS, "<tool> 東京都"])
def test_the_bytes_of_tokens_are_those_of_their_text(loaded, kind, text):
    tokenizer, _ = loaded[kind]
    ids = [i for i in tokenizer.encode(text) if tokenizer.visible_token(i) is not None]
    content = b"".join(tokenizer.token_bytes(i) for i in ids).decode()
    assert content in (tokenizer.decode(ids), " " + tokenizer.decode(ids))  # a leading space may be dropped


def test_the_bytes_of_special_tokens_and_of_none(directory):
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.token_bytes(tokenizer.encode("the")[0]) == BOS.encode()
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""


def test_chat_has_one_bos(directory):
    tokenizer = Tokenizer.load(directory)
    bos = small_bpe_tokenizer().token_to_id(BOS)
    assert tokenizer.encode("the")[0] == bos
    assert tokenizer.encode_chat(MESSAGES).count(bos) == 1


def test_truncation_and_padding_of_the_file_are_ignored(directory):
    stored = small_bpe_tokenizer().from_str(small_bpe_tokenizer().to_str())
    stored.enable_truncation(4)
    stored.enable_padding(length=50)
    stored.save(str(directory / "tokenizer.json"))
    assert Tokenizer.load(directory).encode(TEXTS[0]) == small_bpe_tokenizer().encode(TEXTS[0]).ids


def test_ids_beyond_the_vocabulary_have_no_text(directory):
    tokenizer = Tokenizer.load(directory)
    ids = tokenizer.encode("the cat")
    assert tokenizer.decode([*ids, tokenizer.vocab_size, 10**6]) == "the cat"


def test_lone_surrogates_are_refused(directory):
    with pytest.raises(ValueError, match="lone surrogate at character 3"):
        Tokenizer.load(directory).encode("abc\ud800")
    with pytest.raises(ValueError, match="lone surrogate"):
        Tokenizer.load(directory).encode_chat([{"role": "user", "content": "\udfff"}])


def test_places_of_the_template(directory):
    def rendered():
        tokenizer = Tokenizer.load(directory)
        return tokenizer.decode(tokenizer.encode_chat(MESSAGES))

    write_template(directory, "from config")
    assert rendered() == "from config"
    write_template(directory, [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "y"}])
    assert rendered() == "y"
    (directory / "chat_template.jinja").write_text("from file 東京")
    assert rendered() == "from file 東京"


def test_special_tokens_may_be_objects(directory):
    path = directory / "tokenizer_config.json"
    config = {
        "bos_token": {"content": BOS, "lstrip": False},
        "eos_token": None,
        "chat_template": "{{ bos_token }}!",
    }
    path.write_text(json.dumps(config))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode_chat(MESSAGES), skip_special_tokens=False) == f"{BOS}!"


def test_a_tokenizer_without_a_config_has_no_template(directory):
    (directory / "tokenizer_config.json").unlink()
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.decode(tokenizer.encode("the mat")) == "the mat"
    with pytest.raises(ChatTemplateError, match="has no chat template"):
        tokenizer.encode_chat(MESSAGES)


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("one\n{{ raise_exception('roles must alternate') }}", "line 2: roles must alternate"),
        ("\n\n{{ messages[0].nothing.deeper }}", "line 3: .*nothing"),
        ("{% for m in messages %}\n{{ m.content + 1 }}\n{% endfor %}", "line 2: .*str"),
        ("{{ 1 // 0 }}", "line 1: .*zero"),
        ("{{ messages.append(1) }}", "line 1: .*append.* unsafe"),
        ("{{ ''.__class__.__mro__ }}", "line 1: .*unsafe"),
        ("{% macro f() %}\n{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ range(10**9) | list }}", "line 1: .*[Rr]ange"),
        ("{{ 'x'.unknown() }}", "line 1: .*unknown"),
    ],
)
def test_failing_templates_say_where(directory, template, sentence):
    write_template(directory, template)
    tokenizer = Tokenizer.load(directory)
    with pytest.raises(ChatTemplateError, match=sentence) as raised:
        tokenizer.encode_chat(MESSAGES)
    assert str(directory / "tokenizer_config.json") in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "template", ["a\n{% if %}", "a\n{{ unclosed", "\n{% unknown %}", "\n{{ x | no_filter }}"]
)
def test_templates_that_do_not_compile(directory, template):
    (directory / "chat_template.jinja").write_text(template)
    with pytest.raises(ChatTemplateError, match=r"chat_template\.jinja: chat template failed at line 2: "):
        Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"chat_template": 3}, "chat_template must be a string"),
        ({"bos_token": 5}, "bos_token must be a string"),
        ({"eos_token": {"content": [1]}}, "eos_token must be a string"),
        ([], "must hold a JSON object"),
    ],
)
def test_bad_tokenizer_configs(directory, config, sentence):
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: {sentence}"):
        Tokenizer.load(directory)


def test_the_router_needs_no_torch():
    modules = "pdengine.models.config, pdengine.models.tokenizer, pdengine.models.fingerprint"
    code = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_missing_and_broken_tokenizers(directory):
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "Nonsense"}}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not a valid tokenizer"):
        Tokenizer.load(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: no such file"):
        Tokenizer.load(directory)
