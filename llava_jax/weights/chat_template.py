"""Our conversation templates as the Jinja that Hugging Face's processors read.

Made from the template itself, so that an exported model is spoken to in the words it was trained
on: system sentence, ends of answers, images in front. Answers stand between `generation` marks.
"""

from collections.abc import Iterable

from llava_jax.conversation import Piece, Template

# transformers' dialect: a message's content is a text, or a list of texts and images.
_CHAT = """\
{%- set system = namespace(text={SYSTEM}) -%}
{%- for message in messages if message['role'] == 'system' -%}
{%- set system.text = message['content'] if message['content'] is string else (message['content'] \
| selectattr('type', 'equalto', 'text') | map(attribute='text') | join('')) -%}
{%- endfor -%}
{%- set turns = messages | rejectattr('role', 'equalto', 'system') | list -%}
{{- BEGINS -}}
{%- for message in turns -%}
{%- set texts = [message['content']] if message['content'] is string else (message['content'] \
| selectattr('type', 'equalto', 'text') | map(attribute='text') | list) -%}
{%- set images = [] if message['content'] is string else (message['content'] \
| selectattr('type', 'equalto', 'image') | list) -%}
{%- if message['role'] == 'user' -%}
{%- if loop.first -%}{{- FIRST_HUMAN -}}{%- else -%}{{- HUMAN -}}{%- endif -%}
{%- for image in images -%}
{{- IMAGE -}}
{%- endfor -%}
{{- texts | join('') -}}
{{- HUMAN_ENDS -}}
{%- else -%}
{{- GPT -}}
{%- generation -%}{{- ANSWER_STARTS ~ texts | join('') ~ ANSWER_ENDS -}}{%- endgeneration -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- GPT -}}{%- endif -%}
"""


def jinja(template: Template, *, prefixed: bool, eos: str = "</s>", image: str = "<image>") -> str:
    """The chat template. BOS is not in it: the tokenizer adds it.

    prefixed: the tokenizer puts a ▁ in front of a text behind a special token. Where it does not
    and the text restarts behind an image, a space gives the same id.
    """
    if template.start_end_tokens:
        image = f"<im_start>{image}<im_end>"
    elif template.text_restarts and not prefixed:
        image = f"{image} "
    # What ends an answer is learned with it; between pieces only their text counts.
    words = {
        "SYSTEM": _quoted(template.system),
        "BEGINS": _filled(_spelled(template.begins, eos)),
        "FIRST_HUMAN": _filled(_spelled(template.first_human, eos)),
        "HUMAN": _filled(_spelled(template.human, eos)),
        "IMAGE": _quoted(image + "\n"),
        "HUMAN_ENDS": _quoted(_spelled(template.human_ends, eos)),
        "GPT": _quoted(_spelled(template.gpt, eos)),
        "ANSWER_STARTS": _quoted(template.answer_starts),
        "ANSWER_ENDS": _quoted(_spelled(template.answer_ends, eos)),
    }
    text = _CHAT.replace("{SYSTEM}", words.pop("SYSTEM"))
    for name in sorted(words, key=len, reverse=True):  # HUMAN_ENDS before HUMAN
        text = text.replace(name, words[name])
    return text


def _spelled(pieces: Iterable[Piece], eos: str) -> str:
    spelling = {"eos": eos, "bos": "<s>"}
    return "".join(spelling.get(piece.kind, piece.text) for piece in pieces)


def _filled(text: str) -> str:
    """A Jinja expression for words that may hold the system sentence."""
    return " ~ system.text ~ ".join(_quoted(part) for part in text.split("{system}"))


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"'{escaped}'"
