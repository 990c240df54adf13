"""Chat templates: what stands around a caption, what of it is pooled, and templates that a model does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm2clip.errors import ModelError
from llm2clip.models.caption_encoder import CaptionEncoder
from llm2clip.models.templates import FAMILIES, find_template
from llm2clip.models.tokens import CaptionTokenizer
from tests.tiny_models import tiny_model, tiny_tokenizer

CHATML = (
    "{% for m in messages %}{{ bos_token }}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
)


def tokenizer_with(*special: str, chat: str | None = None, **options: Any) -> Any:
    """The tiny tokenizer with further special tokens and a chat template."""
    tokenizer = tiny_tokenizer(**options)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = chat
    return tokenizer


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_are_told_apart_and_special_tokens_are_one_token_each(name: str) -> None:
    template = FAMILIES[name]
    chat = "[INST] {{ messages[0].content }} [/INST]" if name == "mistral" else "any {{ messages }}"
    tokenizer = tokenizer_with(*template.markers, chat=chat)
    assert find_template(tokenizer, "auto") == find_template(tokenizer, name) == template
    tokens = CaptionTokenizer(tokenizer, max_length=128, prompt="do: ", template=template)(["a [x] dog"])[0]
    ids = tokenizer.convert_ids_to_tokens(tokens.ids)
    assert [token for token in ids if token in template.markers] == [
        marker for marker in template.markers if marker in template.head + template.tail
    ]
    assert tokenizer.decode(tokens.ids[: tokens.pool_start]) == template.head + "do: "
    assert tokenizer.decode(tokens.ids[tokens.pool_start :]) == "a [x] dog" + template.tail


def test_the_tokenizers_own_template() -> None:
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", chat=CHATML, bos=True)
    template = find_template(tokenizer, "tokenizer")
    # the tokenizer puts its beginning-of-sequence token itself, and a caption does not end with a line break
    assert (template.head, template.tail) == ("<|im_start|>user\n", "<|im_end|>")
    tokens = CaptionTokenizer(tokenizer, max_length=64, template=template)(["dog <|im_end|>"])[0]
    assert tokenizer.decode(tokens.ids) == "<s><|im_start|>user\ndog <|im_end|><|im_end|>"
    # what the caption says is text
    assert tokens.ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1


def test_an_unknown_family_with_a_chat_template_falls_back_to_it() -> None:
    tokenizer = tokenizer_with("<u>", "</u>", chat="<u>{{ messages[0].content }}</u>")
    template = find_template(tokenizer, "auto")
    assert (template.name, template.head, template.tail) == ("tokenizer", "<u>", "</u>")


def test_the_date_in_a_template_does_not_change() -> None:
    chat = "{% if not date_string %}{% set date_string = strftime_now('%d') %}{% endif %}{{ date_string }}: "
    tokenizer = tokenizer_with(chat=chat + "{{ messages[0].content }}")
    assert find_template(tokenizer, "tokenizer").head == "26 Jul 2024: "


def test_a_model_without_a_chat_template_gets_none() -> None:
    assert find_template(tokenizer_with("<|im_start|>", "<|im_end|>"), "auto").name == "none"


@pytest.mark.parametrize(
    ("name", "chat", "message"),
    [
        ("llama3", None, r"lacks <\|start_header_id\|>.*fit chatml;"),
        ("tokenizer", None, "this tokenizer has none"),
        ("tokenizer", "{{ messages[0].content | upper }}", "changes the message"),
        ("tokenizer", "{{ raise_exception('no') }}", "cannot be used for one message"),
        ("vicuna", None, "expected none, auto, tokenizer or one of llama3"),
    ],
)
def test_templates_that_do_not_fit(name: str, chat: str | None, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        find_template(tokenizer_with("<|im_start|>", "<|im_end|>", chat=chat), name)


def test_the_turns_end_is_the_last_token_and_takes_the_place_of_eos() -> None:
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", chat=CHATML)
    for limit, cut in ((64, False), (10, True)):
        chatml = FAMILIES["chatml"]
        (tokens,) = CaptionTokenizer(tokenizer, max_length=limit, needs_eos=True, template=chatml)(["a dog"])
        assert tokenizer.convert_ids_to_tokens(tokens.ids[-1]) == "<|im_end|>"
        assert tokenizer.eos_token_id not in tokens.ids and tokens.truncated is cut
        assert len(tokens.ids) <= limit


def test_an_encoder_records_its_template_and_its_fingerprint_depends_on_it() -> None:
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", chat=CHATML)
    plain = CaptionEncoder(tiny_model("llama"), tokenizer)
    chat = CaptionEncoder(tiny_model("llama"), tokenizer, template="auto")
    assert chat.template == "chatml" and chat.fingerprint()["template"] == "chatml"
    assert plain.template == "none" and "template" not in plain.fingerprint()
    assert not torch.allclose(plain.encode(["a dog"]), chat.encode(["a dog"]), atol=1e-3)


def test_a_templated_encoder_loads_as_it_was_saved(tmp_path: Any) -> None:
    tokenizer = tokenizer_with("<|im_start|>", "<|im_end|>", chat=CHATML)
    encoder = CaptionEncoder(tiny_model("llama"), tokenizer, template="chatml", max_length=64)
    encoder.save_pretrained(tmp_path / "model")
    for asked in (None, "auto", "chatml"):
        again = CaptionEncoder.from_pretrained(tmp_path / "model", template=asked)  # type: ignore[arg-type]
        assert again.template == "chatml"
        torch.testing.assert_close(again.encode(["a dog"]), encoder.encode(["a dog"]), rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="template='none' differs from 'chatml'"):
        CaptionEncoder.from_pretrained(tmp_path / "model", template="none")
