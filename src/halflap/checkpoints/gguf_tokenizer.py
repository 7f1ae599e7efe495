"""The tokenizer inside a GGUF file, rebuilt as Hugging Face tokenizer files.

Byte-level BPE (`tokenizer.ggml.model` is "gpt2") only. GGUF names how text is split before merging
(`tokenizer.ggml.pre`) and the reader must know the rule; the table below has the rules of llama.cpp's `llama-vocab.cpp`
for the families read here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from halflap.errors import HalflapError

CONTROL, USER_DEFINED = 3, 4
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
QWEN2 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Rule(NamedTuple):
    """How text is cut: an expression (None: GPT-2's own), digits one by one; whether whole words need no merges."""

    split: str | None = None
    single_digits: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


GPT2, DIGITS = Rule(), Rule(single_digits=True)
RULES: dict[str, Rule] = {
    **dict.fromkeys(("default", "gpt-2", "gpt2", "phi-2", "jina-es", "roberta-bpe", "olmo"), GPT2),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "pixtral"), Rule(LLAMA3, ignore_merges=True, add_bos=True)),
    "tekken": Rule(TEKKEN, ignore_merges=True, add_bos=True),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), Rule(QWEN2)),
}


def tokenizer_files(fields: Mapping[str, Any]) -> dict[str, str]:
    """File name to content: tokenizer.json, its config, generation_config.json, chat_template.jinja if there is one.

    fields: the GGUF metadata. Raises HalflapError for a tokenizer that is not byte-level BPE or splits text in an
    unknown way; give `tokenizer_from` to the import then.
    """
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    ids = {name: fields.get(f"tokenizer.ggml.{key}_token_id") for name, key in SPECIAL.items()}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": _adds_bos(fields),
        "add_eos_token": bool(fields.get("tokenizer.ggml.add_eos_token", False)),
        **{name: tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)},
    }
    if context := fields.get(f"{fields['general.architecture']}.context_length"):
        settings["model_max_length"] = context
    generation = {name + "_id": i for name, i in ids.items() if i is not None and name != "unk_token"}
    files = {
        "tokenizer.json": build_tokenizer(fields).to_str(pretty=True),
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    if template := fields.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
        settings["chat_template"] = template
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return files


SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}


def _rule(fields: Mapping[str, Any]) -> Rule:
    name = fields.get("tokenizer.ggml.pre", "default")
    if name not in RULES:
        raise HalflapError(
            f"the GGUF's tokenizer splits text as {name!r}, which halflap does not know; known are {', '.join(RULES)}: "
            "give the model's own tokenizer directory (tokenizer_from)"
        )
    return RULES[name]


def _adds_bos(fields: Mapping[str, Any]) -> bool:
    return bool(fields.get("tokenizer.ggml.add_bos_token", _rule(fields).add_bos))


def build_tokenizer(fields: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer itself, token numbers as in the file."""
    kind = fields.get("tokenizer.ggml.model")
    if kind != "gpt2" or "tokenizer.ggml.merges" not in fields:
        raise HalflapError(
            f"the GGUF's tokenizer is of kind {kind!r}; only byte-level BPE ('gpt2') with its merges can be rebuilt: "
            "give the model's own tokenizer directory (tokenizer_from)"
        )
    rule = _rule(fields)
    tokens: list[str] = fields["tokenizer.ggml.tokens"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields["tokenizer.ggml.merges"])]
    if len(vocabulary) != len(tokens):
        raise HalflapError(
            f"the GGUF's tokenizer spells two of its {len(tokens)} tokens alike, which a Hugging Face one cannot: "
            "give the model's own tokenizer directory (tokenizer_from)"
        )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.ignore_merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
    types = fields.get("tokenizer.ggml.token_type") or []
    marked = [(token, kind) for token, kind in zip(tokens, types) if kind in (CONTROL, USER_DEFINED)]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t, k in marked if k == CONTROL])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t, k in marked if k == USER_DEFINED])
    bos = fields.get("tokenizer.ggml.bos_token_id")
    if _adds_bos(fields) and bos is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{tokens[bos]} $A", pair=f"{tokens[bos]} $A {tokens[bos]} $B", special_tokens=[(tokens[bos], bos)]
        )
    else:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    return tokenizer


def _pre_tokenizer(rule: Rule) -> PreTokenizer:
    if rule.split is not None:
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(rule.split), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return (
        pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain]) if rule.single_digits else plain
    )
