r"""What `\d` and `\w` mean in the regular expressions of grammars: ASCII, as ECMA-262 has them, and so JSON Schema.

llguidance reads the `pattern` of a schema so by itself. Other expressions it reads as Rust's crate `regex` does, for
which `\d` is a digit of any script: the year `\d{4}` could be written in Devanagari.
"""

from __future__ import annotations

import re

# A class may stand in a class there: `[\d_]` becomes `[[0-9]_]`.
_CLASSES = {r"\d": "[0-9]", r"\D": "[^0-9]", r"\w": "[0-9A-Za-z_]", r"\W": "[^0-9A-Za-z_]"}
_ESCAPE = re.compile(r"\\.", re.DOTALL)
# What llguidance's lexer takes for one token, as far as an expression, or what looks like one, may be in it. What is
# not closed reaches to the end of the text or line, so that nothing is gone through twice.
_LARK = re.compile(
    r"""
      (?:\#|//) [^\n]*                 # a comment
    | " (?:\\.|[^"\\\n])*+ "?          # a text, also one within JSON
    | < [^<>\s]+ >                     # a special token
    | (?P<regex> / (?:\\.|[^/\\])++ /? )
    """,
    re.VERBOSE | re.DOTALL,
)


def with_ascii_classes(regex: str) -> str:
    r"""The expression in Rust's syntax whose `\d` and `\w`, and their complements, are of ASCII characters."""
    return _ESCAPE.sub(lambda found: _CLASSES.get(found[0], found[0]), regex)


def lark_with_ascii_classes(grammar: str) -> str:
    """A grammar in llguidance's Lark, with all its regular expressions as `with_ascii_classes` has them."""
    return _LARK.sub(lambda found: with_ascii_classes(found[0]) if found["regex"] else found[0], grammar)
