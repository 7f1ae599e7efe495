"""Tokenizers: the `tokenizer.json` of a Hugging Face directory, with its special tokens and chat template.

Loaded files are kept as they are and written back byte for byte, so a student's tokenizer is its teacher's. A trained
one is byte-level BPE (Sennrich et al. 2016 on UTF-8 bytes): every text survives encoding and decoding unchanged. It
splits text as Qwen2 does (single digits, words with their leading space, runs of line ends), a scheme that GGUF
readers know by name.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

from halflap.data import chat
from halflap.data.token_bytes import longest_token
from halflap.errors import HalflapError
from halflap.files import atomic_write, write_json
from halflap.progress import track

PAD, BOS, EOS = SPECIAL_TOKENS = ("<pad>", "<bos>", "<eos>")  # ids 0, 1, 2 of a trained tokenizer
SMALLEST_VOCABULARY = len(SPECIAL_TOKENS) + 256  # every byte is a token of its own
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))  # bytes that a byte-level alphabet leaves
OTHERS = (byte for byte in range(256) if byte not in PRINTABLE)
BYTES = {chr(byte): byte for byte in PRINTABLE} | {chr(256 + place): byte for place, byte in enumerate(OTHERS)}
BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how vocabularies of SentencePiece spell one


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in text)


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A tokenizer as data: the text of `tokenizer.json`, `tokenizer_config.json` as a dict, and the chat template."""

    content: str = field(repr=False)
    config: dict[str, Any]
    special_tokens: dict[str, Any]
    chat_template: str | None = field(default=None, repr=False)

    @staticmethod
    def load(directory: str | Path) -> Tokenizer:
        """Read the tokenizer files of a directory, of a run directory those of its checkpoint.

        Raises HalflapError when there are none or they are broken.
        """
        places = (Path(directory), Path(directory) / "checkpoint")
        folder = next((place for place in places if (place / "tokenizer.json").is_file()), places[0])
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise HalflapError(
                f"{str(folder)!r} holds no tokenizer.json; give a directory with a fast Hugging Face tokenizer "
                "(older formats are converted by saving them once with transformers)"
            )
        config, special = _read_json(folder / "tokenizer_config.json"), _read_json(folder / "special_tokens_map.json")
        tokenizer = Tokenizer(_read_text(file), config, special, _read_template(folder, config))
        tokenizer._parsing  # noqa: B018 - a broken file is reported here, not at first use
        return tokenizer

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer files so that `Tokenizer.load` and transformers' AutoTokenizer open them."""
        folder = Path(directory)
        with atomic_write(folder / "tokenizer.json", "w") as file:
            file.write(self.content)
        config = dict(self.config)
        if "tokenizer_class" not in config or "auto_map" in config:  # never make a reader run code from the directory
            config["tokenizer_class"] = "PreTrainedTokenizerFast"
            config.pop("auto_map", None)
        write_json(folder / "tokenizer_config.json", config)
        if self.special_tokens:
            write_json(folder / "special_tokens_map.json", self.special_tokens)
        if self.chat_template is not None:
            with atomic_write(folder / "chat_template.jinja", "w") as file:
                file.write(self.chat_template)

    def with_chat_template(self, template: str) -> Tokenizer:
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        return dataclasses.replace(self, config=config, chat_template=template)

    # ---- text and ids

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text, nothing added; with `parse_special`, `<eos>` in the text becomes the end token."""
        return self.encode_batch([text], parse_special=parse_special)[0]

    def encode_batch(self, texts: Sequence[str], *, parse_special: bool = True) -> list[list[int]]:
        """`encode` of many texts on all cores. Text of unknown origin is encoded with `parse_special=False`."""
        backend = self._parsing if parse_special else self._literal
        try:
            return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        except TypeError:  # from half a surrogate pair, which is what Python makes of bytes that are no UTF-8
            wrong = next((text for text in texts if not _is_unicode(text)), None)
            if wrong is None:
                raise
            raise HalflapError(f"the text {wrong[:40]!r} is not valid UTF-8: correct it") from None

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = False) -> str:
        """The text of token ids; bytes that are no UTF-8 become U+FFFD, ids past the vocabulary are skipped."""
        return self._parsing.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token(self, identity: int) -> str | None:
        """A token as the vocabulary spells it, or None past the vocabulary."""
        return self._parsing.id_to_token(identity)

    def token_bytes(self, identity: int) -> bytes:
        """What a token stands for in UTF-8, a part of a character too; nothing past the vocabulary.

        By its spelling: byte-level alphabets, `▁` for a space, `<0x0A>`; added tokens are spelt as they read.
        """
        token = self.token(identity) or ""
        if identity in self._added:
            return token.encode()
        if self._is_byte_level and all(letter in BYTES for letter in token):
            return bytes(BYTES[letter] for letter in token)
        if found := BYTE.fullmatch(token):
            return bytes.fromhex(found[1])
        return token.encode() if self._is_byte_level else token.replace("▁", " ").encode()

    @functools.cached_property
    def _is_byte_level(self) -> bool:
        return '"ByteLevel"' in json.dumps(json.loads(self.content).get("decoder"))

    @functools.cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._parsing.get_added_tokens_decoder())

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return 1 + max(self._parsing.get_vocab(with_added_tokens=True).values())

    def says_the_same(self, other: Tokenizer) -> bool:
        """Whether every id is the same piece of text, however the two files are written."""
        vocabularies = (one._parsing.get_vocab(with_added_tokens=True) for one in (self, other))
        return self.content == other.content or len({frozenset(one.items()) for one in vocabularies}) == 1

    def check_matches(self, config_vocab_size: int) -> None:
        """Raise HalflapError unless a model of this vocabulary has a row for every token (it may have more)."""
        if self.vocab_size > config_vocab_size:
            raise HalflapError(
                f"the tokenizer has {self.vocab_size} tokens and the model's vocab_size is {config_vocab_size}; "
                "it must be at least as large: use the model's own tokenizer or a larger vocab_size"
            )

    @functools.cached_property
    def longest_token(self) -> int | None:
        """Bytes of a text that one token stands for at most, or None where there is no bound."""
        return longest_token(self.content)

    # ---- special tokens

    @functools.cached_property
    def bos_id(self) -> int | None:
        return self._special_id("bos_token")

    @functools.cached_property
    def eos_id(self) -> int | None:
        return self._special_id("eos_token")

    @functools.cached_property
    def pad_id(self) -> int | None:
        return self._special_id("pad_token")

    @functools.cached_property
    def prefix_ids(self) -> tuple[int, ...]:
        """Ids that the file's own template puts before every text: often none, else the beginning token."""
        plain = self._parsing.encode("a", add_special_tokens=False).ids
        full = self._parsing.encode("a", add_special_tokens=True).ids
        return tuple(full[: full.index(plain[0])]) if plain and plain[0] in full else ()

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of `tokenizer.json`, 64 hexadecimal digits."""
        return hashlib.sha256(self.content.encode()).hexdigest()

    def render_chat(
        self,
        messages: Sequence[chat.Message],
        *,
        add_generation_prompt: bool = True,
        render: Callable[..., str] = chat.render,
        **variables: object,
    ) -> str:
        """The text of a conversation under the chat template, for people; `encode_chat` is for models.

        `render` is where templates run: `chat.render` here, a `TemplateWorker.render` where nobody vouches for them.
        """
        if self.chat_template is None:
            raise HalflapError(
                "this tokenizer has no chat template; use a chat model or put chat_template.jinja beside tokenizer.json"
            )
        names = ("bos_token", "eos_token", "pad_token", "unk_token")
        special = {name: text for name in names if (text := self._special_text(name)) is not None}
        options = {**special, "add_generation_prompt": add_generation_prompt, **variables}
        return render(self.chat_template, messages, **options)

    def encode_chat(self, messages: Sequence[chat.Message], **options: Any) -> list[int]:
        """Token ids of `render_chat`, where special tokens that a user or a tool wrote stay text."""
        guard = chat.Guard(self._special_texts)
        text = self.render_chat(guard.hide(messages), **options)
        pieces = guard.pieces(text)
        return [i for piece, literal in pieces for i in self.encode(piece, parse_special=not literal)]

    @functools.cached_property
    def _special_texts(self) -> tuple[str, ...]:
        return tuple(token.content for token in self._parsing.get_added_tokens_decoder().values() if token.special)

    def _special_text(self, name: str) -> str | None:
        value = self.config.get(name) or self.special_tokens.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _special_id(self, name: str) -> int | None:
        text = self._special_text(name)
        return None if text is None else self._parsing.token_to_id(text)

    # ---- backends: two, because the switch between them is a property of the library's object, and threads share it

    @functools.cached_property
    def _parsing(self) -> tokenizers.Tokenizer:
        return self._backend()

    @functools.cached_property
    def _literal(self) -> tokenizers.Tokenizer:
        backend = self._backend()
        backend.encode_special_tokens = True
        return backend

    def _backend(self) -> tokenizers.Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_str(self.content)
        except Exception as error:  # the library raises bare Exception
            raise HalflapError(f"tokenizer.json cannot be read ({error}); write or copy it again") from error
        backend.no_truncation()  # some published files carry the settings of a training script
        backend.no_padding()
        return backend


def train_tokenizer(documents: Iterable[str], vocab_size: int, *, progress: bool = True) -> Tokenizer:
    """Train byte-level BPE with `<pad>` 0, `<bos>` 1, `<eos>` 2; short texts give fewer tokens than `vocab_size`.

    Raises HalflapError when `vocab_size` has no room for the special tokens and the 256 bytes.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise HalflapError(
            f"vocab_size is {vocab_size}; 256 bytes and {len(SPECIAL_TOKENS)} special tokens need at least "
            f"{SMALLEST_VOCABULARY}: choose a larger one (--vocab-size)"
        )
    backend = tokenizers.Tokenizer(models.BPE(ignore_merges=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(
        track(documents, "read for tokenizer", unit="documents") if progress else documents, trainer
    )
    special = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD}
    config = {**special, "tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    return Tokenizer(backend.to_str(), config, special)


def _read_text(path: Path) -> str:
    """The file's text with its own line ends, so that it can be written back byte for byte."""
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise HalflapError(f"{str(path)!r} is not UTF-8 text ({error}); write or copy it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return json.loads(_read_text(path))
    except ValueError as error:
        raise HalflapError(f"{str(path)!r} is not valid JSON ({error}); correct or copy it again") from error


def _read_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return _read_text(file)
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates: the one called default is meant
        named = {entry["name"]: entry["template"] for entry in template}
        return named.get("default")
    return template
