"""How text is cut into words before byte-level BPE joins bytes within each: a rule for each name that GGUF files use.

The names and the rule of each are llama.cpp's (`llama-vocab.cpp`). Names whose rule is none of these are refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from sparsex_jax.errors import UnsupportedModelError

# Cuts are made one after another: each cuts the pieces that the one before it left. What a pattern finds is a word, and
# so is what lies between. `GPT2` is the rule of `ByteLevel` itself.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
# Mistral's `tekken`: words also begin where small letters are followed by capital ones.
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Of files that name no rule: what llama.cpp falls back on.
_FALLBACK = (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")


class Rule(NamedTuple):
    """A way to cut text.

    Attributes:
      cuts: patterns, applied one after another.
      ignore_merges: a word that is in the vocabulary is one token, even if no sequence of merges produces it.
      add_bos: prompts begin with the begin token, where the file does not say.
    """

    cuts: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_RULES = {
    Rule(_FALLBACK): ("default",),
    Rule((GPT2,)): (
        *("gpt-2", "phi-2", "olmo", "mpt", "jais", "trillion", "granite-docling", "gigachat", "a.x-4.0", "mellum"),
        *("exaone4", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "modern-bert"),
    ),
    Rule((r"\p{N}", GPT2)): (  # every digit is a word
        *("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    ),
    Rule((_LLAMA3,), ignore_merges=True, add_bos=True): (
        *("llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano"),
    ),
    Rule((_LLAMA3,)): ("smaug-bpe", "dbrx", "glm4", "chatglm-bpe"),
    Rule((_QWEN2,)): (
        *("qwen2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "stablelm2", "hunyuan", "solar-open", "grok-2"),
    ),
    Rule((_TEKKEN,), ignore_merges=True, add_bos=True): ("tekken",),
}
RULES = {name: rule for rule, names in _RULES.items() for name in names}


def rule_named(name: str) -> Rule:
    """Raises UnsupportedModelError if there is no such rule; the message lists those there are."""
    if name not in RULES:
        raise UnsupportedModelError(f"tokenizer.ggml.pre={name!r} is not supported; supported: {', '.join(RULES)}")
    return RULES[name]


def pre_tokenizer(rule: Rule) -> Any:
    """The rule as a pre-tokenizer of `tokenizers`, which also turns bytes into visible characters."""
    from tokenizers import Regex, pre_tokenizers

    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in rule.cuts]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
