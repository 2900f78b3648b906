"""Sentence templates for class names in zero-shot classification.

Prompts map each language code to templates, each with exactly one ``{}`` for the class name.
"""

from collections.abc import Mapping, Sequence

from mc2_hpc.errors import UserError

Prompts = Mapping[str, Sequence[str]]

PHOTO: Prompts = {
    "am": ("የ{} ፎቶ።",),
    "ar": ("صورة {}.",),
    "bn": ("{} এর একটি ছবি।",),
    "de": ("ein Foto: {}.",),
    "en": ("a photo of a {}.",),
    "es": ("una foto de {}.",),
    "fa": ("عکس {}.",),
    "fr": ("une photo de {}.",),
    "he": ("תמונה של {}.",),
    "ja": ("{}の写真。",),
    "ko": ("{} 사진.",),
    "ru": ("фото: {}.",),
    "te": ("{} ఫోటో.",),
    "th": ("ภาพถ่ายของ{}",),
    "tr": ("{} fotoğrafı.",),
    "vi": ("ảnh chụp {}.",),
}
"""One neutral template per language, for sets without their own."""


def templates_of(prompts: Prompts, lang: str) -> Sequence[str]:
    """The templates of ``lang``.

    Raises:
        UserError: the language has none, or one does not have exactly one ``{}``.
    """
    if not prompts.get(lang):
        known = ", ".join(sorted(prompts))
        raise UserError(f"no prompts for language {lang!r} (only for {known}): add templates with one {{}}")
    for template in prompts[lang]:
        if template.count("{}") != 1:
            raise UserError(f"prompt {template!r} of language {lang!r}: write exactly one {{}} for the class name")
    return prompts[lang]


def fill(templates: Sequence[str], names: Sequence[str]) -> list[str]:
    """Every name in every template, name by name: ``len(names) * len(templates)`` texts.

    Only ``{}`` is replaced; other braces, in a template or a name, stay as they are.
    """
    return [template.replace("{}", name) for name in names for template in templates]
