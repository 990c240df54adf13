"""What an instruction-tuned LLM expects around a text: the turn of a user, by model family or from the tokenizer.

LLM2Vec (arXiv 2404.05961) puts a caption into the user's turn of the model's chat format. The header before the
caption is left out of the pooling, the end-of-turn token after it is part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llm2clip.errors import ModelError


@dataclass(frozen=True, slots=True)
class Template:
    """The text before and after a caption, special tokens written out, and the name it is recorded under."""

    name: str
    head: str = ""
    tail: str = ""
    markers: tuple[str, ...] = ()


NONE = Template("none")
# the order is that of `auto`: Phi-3's and ChatML's marks also occur beside others, Mistral's are plain text in places
FAMILIES = {
    template.name: template
    for template in (
        Template(
            "llama3",
            "<|start_header_id|>user<|end_header_id|>\n\n",
            "<|eot_id|>",
            ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        ),
        Template(
            "gemma",
            "<start_of_turn>user\n",
            "<end_of_turn>",
            ("<start_of_turn>", "<end_of_turn>"),
        ),
        Template("chatml", "<|im_start|>user\n", "<|im_end|>", ("<|im_start|>", "<|im_end|>")),
        Template("phi3", "<|user|>\n", "<|end|>", ("<|user|>", "<|end|>")),
        Template("mistral", "[INST] ", " [/INST]"),
    )
}
_PLACE = "llm2clip caption"
# Llama 3.1's template writes today's date, and an embedding must not depend on the day
_FIXED = {"date_string": "26 Jul 2024"}


def find_template(tokenizer: Any, name: str) -> Template:
    """The template that `name` means for a tokenizer.

    Args:
        tokenizer: a transformers tokenizer.
        name: `none`; a family of `FAMILIES`; `tokenizer`, its own chat template with one message of the user (and
            the system message that it may add); or `auto`: none for a model without chat template, else the
            family that its special tokens tell, else `tokenizer`.

    Returns:
        The template; its `name` is never `auto`.

    Raises:
        ModelError: an unknown name, a family whose special tokens the tokenizer lacks, or no chat template.
    """
    if name == "auto":
        return _guess(tokenizer)
    if name == "none":
        return NONE
    if name == "tokenizer":
        return _own(tokenizer)
    if name not in FAMILIES:
        raise ModelError(
            f"llm.template: expected none, auto, tokenizer or one of {', '.join(FAMILIES)}, got {name!r}"
        )
    template = FAMILIES[name]
    vocabulary = tokenizer.get_vocab()
    if lacking := [marker for marker in template.markers if marker not in vocabulary]:
        fitting = [other.name for other in FAMILIES.values() if _marked(other, vocabulary)]
        raise ModelError(
            f"llm.template={name} needs the special tokens {', '.join(template.markers)} and the tokenizer lacks "
            f"{', '.join(lacking)}: the model is of another family. Its tokens fit "
            f"{' and '.join(fitting) or 'none of the families'}; use that, tokenizer, auto or none."
        )
    return template


def _guess(tokenizer: Any) -> Template:
    chat: Any = getattr(tokenizer, "chat_template", None)
    if not chat:  # a base model: its special tokens were never trained
        return NONE
    vocabulary = tokenizer.get_vocab()
    for template in FAMILIES.values():
        if _marked(template, vocabulary):
            return template
    return FAMILIES["mistral"] if "[INST]" in str(chat) else _own(tokenizer)


def _marked(template: Template, vocabulary: dict[str, int]) -> bool:
    return bool(template.markers) and all(marker in vocabulary for marker in template.markers)


def _own(tokenizer: Any) -> Template:
    if not getattr(tokenizer, "chat_template", None):
        raise ModelError(
            "llm.template=tokenizer needs a chat template and this tokenizer has none; use none, or the name of the "
            "model's family"
        )
    try:
        text: str = tokenizer.apply_chat_template(
            [{"role": "user", "content": _PLACE}], tokenize=False, add_generation_prompt=False, **_FIXED
        )
    except Exception as error:  # jinja's own errors, and whatever a template raises
        raise ModelError(
            f"the tokenizer's chat template cannot be used for one message ({type(error).__name__}: {error}); name the "
            "model's family in llm.template, or none"
        ) from error
    head, found, tail = text.partition(_PLACE)
    if not found:
        raise ModelError(
            "the tokenizer's chat template changes the message, so a caption cannot be found in it again; name the "
            "model's family in llm.template, or none"
        )
    # the tokenizer itself puts its beginning-of-sequence token first where the model wants one
    head = head.removeprefix(getattr(tokenizer, "bos_token", None) or "\0")
    return Template("tokenizer", head, tail.rstrip())
