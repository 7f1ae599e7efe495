"""The tokenizer inside a GGUF file, both ways: to Hugging Face tokenizer files, and from them.

Byte-level BPE (`tokenizer.ggml.model` is "gpt2") only. GGUF names how text is split before merging
(`tokenizer.ggml.pre`) and the reader must know the rule; the table below has the rules of llama.cpp's `llama-vocab.cpp`
for the families read here. What is written is what a reader rebuilds: a tokenizer that would come back with other ids
is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import PreTokenizer

from halflap.checkpoints.config import read_ends, read_json
from halflap.errors import HalflapError
from halflap.models.config import ModelConfig

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
WITHOUT = ("no_vocab", "none")  # kinds of a file without a tokenizer
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

    fields: the GGUF metadata; a file without a tokenizer gives none. Raises HalflapError for a tokenizer that is not
    byte-level BPE or splits text in an unknown way; give `tokenizer_from` to the import then.
    """
    if fields.get("tokenizer.ggml.model") in WITHOUT:
        return {}
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
    generation: dict[str, Any] = {name + "_id": i for name, i in ids.items() if i is not None and name != "unk_token"}
    ends = [fields[key] for key in ENDS if key in fields]
    if len(ends) > 1:
        generation["eos_token_id"] = ends
    files = {
        "tokenizer.json": build_tokenizer(fields).to_str(pretty=True),
        "generation_config.json": json.dumps(generation, indent=2) + "\n",
    }
    if template := fields.get("tokenizer.chat_template"):
        files["chat_template.jinja"] = template
        settings["chat_template"] = template
    files["tokenizer_config.json"] = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    return files


ENDS = tuple(f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))  # of a text, a turn, a message
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
    types = fields.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
    used = [(token, number) for number, token in enumerate(tokens) if types[number] != UNUSED]
    vocabulary = dict(used)
    merges = [(left, right) for left, _, right in (merge.partition(" ") for merge in fields["tokenizer.ggml.merges"])]
    if len(vocabulary) != len(used):
        raise HalflapError(
            f"the GGUF's tokenizer spells two of its {len(used)} tokens alike, which a Hugging Face one cannot: "
            "give the model's own tokenizer directory (tokenizer_from)"
        )
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=rule.ignore_merges))
    tokenizer.pre_tokenizer = _pre_tokenizer(rule)
    tokenizer.decoder = decoders.ByteLevel()
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


# ---- from Hugging Face files

WRITTEN = ("gpt-2", "smollm", "llama-bpe", "tekken", "qwen2")  # one name of every rule that llama.cpp has
PROBE = (
    "Hello HELLO hello's DON'T we'LL 1 12 123 4567 x9y, 3.14! a/b\n//c\r\n  two   three\t\tfour \n\n\n five   \n"
    "na\u00efve cafe\u0301 \u00c5ngstr\u00f6m \u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 "
    "\u0645\u0631\u062d\u0628\u0627 \U0001f389\U0001f38a \u01c5mCamelCase {[(<~^_`\"'#@$%&*+=|\\;:?>)]}\u00a0\u00bd"
)


def tokenizer_fields(directory: Path, vocab_size: int) -> dict[str, Any]:
    """Keys and values for the tokenizer files of a checkpoint directory, with a token for each of `vocab_size` rows.

    Without a tokenizer.json the file says that it has none. Raises HalflapError for a tokenizer that llama.cpp would
    read otherwise.
    """
    if not (directory / "tokenizer.json").exists():
        return {"tokenizer.ggml.model": WITHOUT[0]}
    content = (directory / "tokenizer.json").read_text("utf-8")
    try:
        tokenizer, data = Tokenizer.from_str(content), json.loads(content)
    except Exception as error:  # the package raises bare Exceptions
        raise HalflapError(f"{directory / 'tokenizer.json'} cannot be read ({error}): copy it again") from None
    tokens, types = _tokens(tokenizer, vocab_size)
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    settings = _read(directory / "special_tokens_map.json") | _read(directory / "tokenizer_config.json")
    fields: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in data["model"].get("merges", [])],
        "tokenizer.ggml.add_bos_token": full[:1] != plain[:1],
        "tokenizer.ggml.add_eos_token": full[-1:] != plain[-1:],
    }
    for name, key in SPECIAL.items():
        text = settings.get(name)
        number = tokenizer.token_to_id(text["content"] if isinstance(text, Mapping) else text) if text else None
        if number is not None:
            fields[f"tokenizer.ggml.{key}_token_id"] = number
    if template := _chat_template(directory, settings):
        fields["tokenizer.chat_template"] = template
    return fields | {"tokenizer.ggml.pre": _name_of_rule(tokenizer, data["model"], fields)}


def end_fields(directory: Path, config: ModelConfig, fields: Mapping[str, Any]) -> dict[str, int]:
    """Keys for the ids that end a text of a checkpoint directory beside those in `fields`; llama.cpp has three."""
    more = [end for end in read_ends(directory, config) if end != fields.get(ENDS[0])]
    return dict(zip([key for key in ENDS if key not in fields], more))


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[int]]:
    """Every row's token and its type; rows beyond the tokenizer get names of their own."""
    spelled = {number: token for token, number in tokenizer.get_vocab(with_added_tokens=True).items()}
    if max(spelled) >= vocab_size:
        raise HalflapError(
            f"the tokenizer has {max(spelled) + 1} tokens and the model {vocab_size} rows of embeddings; it must be at "
            "least as large: use the model's own tokenizer"
        )
    added = tokenizer.get_added_tokens_decoder()
    types = [NORMAL if number in spelled else UNUSED for number in range(vocab_size)]
    for number, token in added.items():
        types[number] = CONTROL if token.special else USER_DEFINED
    return [spelled.get(number, f"[PAD{number}]") for number in range(vocab_size)], types


def _name_of_rule(tokenizer: Tokenizer, model: Mapping[str, Any], fields: Mapping[str, Any]) -> str:
    """The rule that splits text as this tokenizer does, tried on a text with everything in it."""
    if model.get("type") == "BPE" and tokenizer.pre_tokenizer is not None:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(PROBE)
        for name in WRITTEN:
            rule = RULES[name]
            same = rule.ignore_merges == bool(model.get("ignore_merges"))
            if same and _pre_tokenizer(rule).pre_tokenize_str(PROBE) == pieces:
                again = build_tokenizer({**fields, "tokenizer.ggml.pre": name})
                ids = [t.encode(PROBE, add_special_tokens=False).ids for t in (again, tokenizer)]
                if ids[0] == ids[1]:
                    return name
    raise HalflapError(
        f"the tokenizer is not a byte-level BPE that splits text in a way llama.cpp has a name for; those written are "
        f"{', '.join(WRITTEN)}: export a model with such a tokenizer, or move tokenizer.json aside and pass token ids"
    )


def _chat_template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    file = directory / "chat_template.jinja"
    if file.exists():
        return file.read_text("utf-8")
    template = _read(directory / "chat_template.json").get("chat_template", settings.get("chat_template"))
    if isinstance(template, list):
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    return template


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.exists() else {}
