"""Texts on which tokenizers differ."""

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "  two  spaces, a\ttab, and an end \n\n",
    "\r\n mixed \n\r\t\t ends\u00a0\u2003",
    "Zahlen 1234567890, 3.14159 und 1e-5; ½ Ⅷ ٣",
    "naïve café, décomposé: e\u0301, Straße, İstanbul",
    "日本語のテキスト、中文。한국어 ไทย العربية עברית हिन्दी",
    "🙂🏽 👩‍👩‍👧‍👦 🇫🇷 \u200d\ufeff\x00\x7f",
    "def f(x):\n    return {**x, 'a': [1, 2]}  # it's\n\n\n\tfor(;;){i++;}",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "it's they're I'LL don't ''s",
    "<|im_start|>user\nhi<|im_end|>\n",
]
