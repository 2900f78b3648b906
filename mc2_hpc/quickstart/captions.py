"""Captions for the images: number names in sixteen languages, sentence templates, and noise.

The names come from num2words. The templates contain no number names themselves (a test checks this), so a caption
matches exactly the metadata entries of the number it names.
"""

from collections.abc import Iterable, Mapping

import numpy as np

NUMBERS = range(100)

TEMPLATES: Mapping[str, tuple[str, ...]] = {
    "en": (
        "a photo of the handwritten number {}",
        "handwritten {}",
        "the number {} in ink",
        "a note that says {}",
        "house number {}",
        "page {}",
    ),
    "es": (
        "foto del número {} escrito a mano",
        "el número {}",
        "{} escrito a mano",
        "una nota que dice {}",
        "página {}",
        "portal número {}",
    ),
    "de": (
        "Foto der handgeschriebenen Zahl {}",
        "die Zahl {}",
        "{} von Hand geschrieben",
        "Zettel mit der Zahl {}",
        "Hausnummer {}",
        "Seite {}",
    ),
    "fr": (
        "photo du nombre {} écrit à la main",
        "le nombre {}",
        "{} écrit à la main",
        "une note qui dit {}",
        "page {}",
        "numéro {} à l'encre",
    ),
    "ru": (
        "фото рукописного числа {}",
        "число {}",
        "{} от руки",
        "записка с числом {}",
        "дом номер {}",
        "страница {}",
    ),
    "ja": ("手書きの数字{}の写真", "数字の{}", "手書きの{}", "{}と書かれたメモ", "{}ページ", "番号は{}です"),
    "ar": (
        "صورة للعدد {} بخط اليد",
        "العدد {}",
        "{} بخط اليد",
        "ورقة كتب عليها {}",
        "رقم المنزل {}",
        "صفحة {}",
    ),
    "ko": ("손글씨 숫자 {} 사진", "숫자 {}", "손으로 쓴 {}", "메모에 적힌 {}", "번호 {}", "쪽 {}"),
    "tr": (
        "el yazısıyla {} sayısının fotoğrafı",
        "{} sayısı",
        "el yazısıyla {}",
        "kağıtta yazan sayı {}",
        "kapı numarası {}",
        "sayfa {}",
    ),
    "vi": ("ảnh số {} viết tay", "số {}", "chữ số viết tay {}", "tờ giấy ghi {}", "nhà số {}", "trang {}"),
    "th": ("ภาพถ่ายเลข{}เขียนด้วยมือ", "เลข{}", "ลายมือเขียน{}", "กระดาษเขียนว่า{}", "บ้านเลขที่{}", "หน้า{}"),
    "he": ("תמונה של המספר {} בכתב יד", "המספר {}", "{} בכתב יד", "פתק שכתוב בו {}", "בית מספר {}", "עמוד {}"),
    "bn": ("হাতে লেখা সংখ্যা {} এর ছবি", "সংখ্যা {}", "হাতে লেখা {}", "কাগজে লেখা {}", "বাড়ি নম্বর {}", "পৃষ্ঠা {}"),
    "fa": ("عکس عدد {} با خط دست", "عدد {}", "{} با خط دست", "کاغذی با عدد {}", "پلاک {}", "صفحه {}"),
    "te": ("చేతితో రాసిన సంఖ్య {} ఫోటో", "సంఖ్య {}", "చేతితో రాసిన {}", "కాగితం మీద {}", "ఇంటి నంబర్ {}", "పేజీ {}"),
    "am": ("በእጅ የተጻፈ ቁጥር {} ፎቶ", "ቁጥር {}", "በእጅ የተጻፈ {}", "ወረቀት ላይ የተጻፈ {}", "የቤት ቁጥር {}", "ገጽ {}"),
}
"""Sentence templates by language (Wikipedia's codes), most frequent first; ``{}`` is the number's name."""

LANGUAGES = tuple(TEMPLATES)

AUTONYMS: Mapping[str, str] = {
    "en": "English",
    "es": "español",
    "de": "Deutsch",
    "fr": "français",
    "ru": "русский",
    "ja": "日本語",
    "ar": "العربية",
    "ko": "한국어",
    "tr": "Türkçe",
    "vi": "Tiếng Việt",
    "th": "ไทย",
    "he": "עברית",
    "bn": "বাংলা",
    "fa": "فارسی",
    "te": "తెలుగు",
    "am": "አማርኛ",
}
"""What each language calls itself."""

NOISE: tuple[tuple[str, str], ...] = (
    ("en", "IMG_{}.JPG"),
    ("en", "DSC0{}.jpg"),
    ("en", "untitled"),
    ("en", "image {}"),
    ("en", "click to enlarge"),
    ("en", "buy cheap frames online | best price | free shipping"),
    ("en", "Screenshot 2019-04-02 at {}"),
    ("en", "thumbnail-{}x300"),
    ("es", "ver más fotos"),
    ("de", "Bild vergrößern"),
    ("fr", "voir l'image en grand"),
    ("ru", "купить недорого с доставкой"),
    ("ja", "画像を拡大する"),
    ("ar", "اضغط لتكبير الصورة"),
    ("ko", "이미지 크게 보기"),
    ("tr", "ucuz çerçeve satın al"),
    ("vi", "xem ảnh lớn"),
    ("th", "ดูภาพขนาดใหญ่"),
)
"""Typical web captions, (language, template), without a number's name, so curation drops them; ``{}`` is 4 digits."""


def number_names() -> dict[str, list[str]]:
    """Language -> the names of 0-99 from num2words; the index is the number."""
    from num2words import num2words

    return {lang: [num2words(number, lang=lang) for number in NUMBERS] for lang in LANGUAGES}


def tokenizer_texts(captions: Iterable[str]) -> list[str]:
    """Training texts for the tokenizer: the captions, and every word of the names and templates with a full stop.

    sentencepiece makes pieces only from what occurs in two *different* words, however often one occurs. With so few
    words, most would be spelt letter by letter and become twice as long; the full stop makes two words of each.
    """
    phrases = [template.replace("{}", " ") for templates in TEMPLATES.values() for template in templates]
    phrases += [name for names in number_names().values() for name in names]
    words = sorted({word for phrase in phrases for word in phrase.split()})
    return [*captions, *(f"{word}." for word in words)]


def draw_caption(lang: str, name: str, rng: np.random.Generator) -> str:
    """``name`` in a random template of the language."""
    forms = TEMPLATES[lang]
    return forms[rng.integers(len(forms))].format(name)


def draw_noise(rng: np.random.Generator) -> tuple[str, str]:
    """A caption that says nothing about its image, as (language, text)."""
    lang, form = NOISE[rng.integers(len(NOISE))]
    return lang, form.format(rng.integers(1000, 9999))
