"""The tokenizer: byte-level BPE by `tokenizers`, stored the Hugging Face way.

`encode` turns *ordinary text* into ids: no string, whatever a user types, becomes a special token. Special tokens enter
only through a chat template (`data.chat`) or around a document (`encode_documents`). Every byte is in the vocabulary,
so encoding and decoding is the identity on any text of our own tokenizers.

Foreign tokenizers (Llama, Qwen2, Qwen3, Mistral: any `tokenizer.json`) load too. See `Tokenizer.load` for how a missing
pad token, a missing BOS and a missing chat template are met.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from trivium.config import UserError
from trivium.data.templates import CHAT_TEMPLATE, CHATML_TEMPLATE, PLAIN_TEMPLATE, skeleton
from trivium.records import atomic_write

SPECIAL_TOKENS = ("<|pad|>", "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|system|>", "<|tool|>", "<|end|>")
"""In the order of their ids, from 0. `<|eos|>` ends a document, `<|end|>` ends a turn."""

MIN_VOCAB_SIZE = len(SPECIAL_TOKENS) + 256
"""The special tokens and one token per byte."""

PAD_NAMES = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<|fim_pad|>", "<unk>")
"""Where a foreign tokenizer has no pad of its own, the first of these that it has and that ends nothing."""

_SURROGATES = re.compile("[\ud800-\udfff]")


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Return a byte-level BPE tokenizer of exactly `vocab_size` tokens, the same for the same texts.

    Digits are tokens of their own, so that numbers are spelled the same way everywhere. Raises UserError when
    `vocab_size` is below MIN_VOCAB_SIZE or when the texts are too few to fill it.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size = {vocab_size}: must be at least {MIN_VOCAB_SIZE} (256 bytes and 8 special tokens)"
        )
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator((_encodable(text) for text in texts), trainer)
    if backend.get_vocab_size() < vocab_size:
        raise UserError(
            f"the corpus is too small for vocab_size = {vocab_size}: only {backend.get_vocab_size()} tokens "
            "occur twice or more; give more text or a smaller vocab_size"
        )
    # With this, transformers and vLLM put the BOS before a plain text, as we do; templates write their own.
    backend.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A <|bos|> $B", special_tokens=[("<|bos|>", SPECIAL_TOKENS.index("<|bos|>"))]
    )
    return Tokenizer(backend.to_str(pretty=True), template=CHAT_TEMPLATE, bos="<|bos|>", eos="<|eos|>", pad="<|pad|>")


class Tokenizer:
    """Text to ids and back.

    `pad_id`, `bos_id`, `eos_id` (end of a document), `end_id` (end of a turn) are always there; `user_id`,
    `assistant_id`, `system_id`, `tool_id` are -1 in a foreign tokenizer that has no such token. `stop_ids` are those
    at which generation stops. `fingerprint` is the SHA-256 of tokenizer.json; `template` is the chat template.
    """

    def __init__(
        self,
        tokenizer_json: str,
        *,
        template: str,
        bos: str | None,
        eos: str,
        pad: str,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        """Build from the text of a tokenizer.json and the names of its special tokens.

        Without a BOS, `bos_id` is `eos_id` (as in the configurations of such models) and nothing precedes a text.
        `config` holds further keys of tokenizer_config.json to keep. Raises UserError when a token is not in the
        vocabulary, or when pad would be the same as eos or the end of a turn: a model trained so never learns to stop.
        """
        data = json.loads(tokenizer_json)
        self._json = tokenizer_json
        self._backend = Backend.from_str(tokenizer_json)
        added = data.get("added_tokens") or []
        control = [t for t in added if t.get("special") or t["content"].strip()]
        self.control_ids = frozenset(int(t["id"]) for t in control)
        """Ids that ordinary text never yields."""
        by_length = sorted((t["content"] for t in control), key=len, reverse=True)
        self._special = re.compile("(" + "|".join(map(re.escape, by_length)) + ")")
        kept = [t for t in added if t not in control]
        plain = data | {"added_tokens": kept, "post_processor": None}
        self._ordinary = Backend.from_str(json.dumps(plain))
        inner = _without_start_mark(plain)
        self._inner = self._ordinary if inner == plain else Backend.from_str(json.dumps(inner))
        self._config = dict(config or {})
        self.template = template
        self.tokens = _named(bos, eos, pad)
        self.bos_id, self.eos_id, self.pad_id = (self._id(token) for token in (bos or eos, eos, pad))
        self.user_id, self.assistant_id, self.system_id, self.tool_id = (
            -1 if (found := self._backend.token_to_id(token)) is None else found for token in SPECIAL_TOKENS[3:7]
        )
        self.end_id = self._end_of_turn()
        self.stop_ids = frozenset({self.eos_id, self.end_id})
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        self.fingerprint = hashlib.sha256(tokenizer_json.encode("utf-8")).hexdigest()
        if self.pad_id in self.stop_ids:
            raise UserError(
                f"pad and end of text are both {pad!r}: a model would never learn to stop; use another pad token"
            )

    # -- text to ids and back

    def encode(self, text: str, *, inner: bool = False) -> list[int]:
        """Return the ids of ordinary text; special tokens spelled out in it stay text.

        `inner` says that something stands before it: SentencePiece's mark for the start of a text is then left out.
        """
        backend = self._inner if inner else self._ordinary
        return list(backend.encode(_encodable(text), add_special_tokens=False).ids)

    def encode_documents(self, texts: Sequence[str]) -> list[list[int]]:
        """Return, for each text, `<bos> text <eos>`: what pretraining sees (without BOS where the model has none)."""
        encoded = self._ordinary.encode_batch([_encodable(text) for text in texts], add_special_tokens=False)
        return [[*self.prefix, *item.ids, self.eos_id] for item in encoded]

    def split_control(self, text: str) -> list[int | str]:
        """Return a template's own text as ids of special tokens and stretches of plain words between them."""
        parts = self._special.split(text) if self.control_ids else [text]
        return [self._id(part) if index % 2 else part for index, part in enumerate(parts) if part]

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """Return the text of `ids`; broken UTF-8 (half a character) shows as U+FFFD."""
        return str(self._backend.decode(list(ids), skip_special_tokens=skip_special))

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """Return each token's own text, special tokens by name: for people to look at."""
        return [self.decode([i], skip_special=False) for i in ids]

    @property
    def prefix(self) -> list[int]:
        """What every document starts with: `[bos_id]`, or nothing where the tokenizer has no BOS."""
        return [self.bos_id] if "bos_token" in self.tokens else []

    # -- on disk

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, its config and special tokens, and the chat template, as a file and inline."""
        defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        config = defaults | self._config | self.tokens | {"chat_template": self.template}
        atomic_write(folder / "tokenizer.json", self._json)
        atomic_write(folder / "tokenizer_config.json", _dump(config))
        atomic_write(folder / "special_tokens_map.json", _dump(self.tokens))
        atomic_write(folder / "chat_template.jinja", self.template)

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Return the tokenizer of a Hugging Face folder, ours or foreign.

        Foreign: a missing BOS stays missing (see `prefix`); a pad that is missing or equal to an end token is replaced
        by the first of PAD_NAMES, else by a special token that ends nothing; a missing chat template by ChatML where
        its tokens exist, else by PLAIN_TEMPLATE. Raises UserError when there is no readable
        tokenizer.json or no end token.
        """
        folder = Path(folder)
        try:
            text = (folder / "tokenizer.json").read_text(encoding="utf-8")
            backend = Backend.from_str(text)
        except FileNotFoundError:
            raise UserError(
                f"{folder} has no tokenizer.json; save the tokenizer with transformers' fast form"
            ) from None
        except Exception as error:  # tokenizers raises bare Exception on a bad file
            raise UserError(f"{folder / 'tokenizer.json'} cannot be read: {error}") from None
        config = _read_json(folder / "tokenizer_config.json")
        names = _read_json(folder / "special_tokens_map.json") | {
            k: v for k, v in config.items() if k.endswith("_token")
        }
        eos = _token_text(names.get("eos_token")) or _eos_from_model(folder, backend)
        if eos is None or backend.token_to_id(eos) is None:
            raise UserError(f"{folder}: tokenizer_config.json names no eos_token of its vocabulary; add it there")
        bos = _token_text(names.get("bos_token"))
        template = _read_template(folder, config) or _fallback_template(backend)
        keep = {k: v for k, v in config.items() if k not in ("chat_template", "bos_token", "eos_token", "pad_token")}
        wanted = _token_text(names.get("pad_token"))
        for pad in _pad_candidates(wanted, json.loads(text), taken={bos or eos, eos}):
            if backend.token_to_id(pad) is None:
                continue
            tokenizer = cls._unless_pad_ends(text, template, bos, eos, pad, keep)
            if tokenizer is not None:
                return tokenizer
        raise UserError(f"{folder}: no token could serve as pad (it must differ from {eos!r}); add a pad_token")

    @classmethod
    def _unless_pad_ends(
        cls, text: str, template: str, bos: str | None, eos: str, pad: str, config: Mapping[str, Any]
    ) -> Tokenizer | None:
        """Return the tokenizer with this pad, or None where the template ends turns with it."""
        tokens = tuple(_named(bos, eos, pad).items())
        if pad == eos or pad in skeleton(template, ("user", "assistant"), False, tokens).control[-1]:
            return None
        return cls(text, template=template, bos=bos, eos=eos, pad=pad, config=config)

    def _id(self, token: str) -> int:
        found = self._backend.token_to_id(token)
        if found is None:
            raise UserError(f"special token {token!r} is not in the tokenizer's vocabulary")
        return int(found)

    def _end_of_turn(self) -> int:
        """Return the first special token that the template puts after an assistant's content."""
        after = skeleton(self.template, ("user", "assistant"), False, tuple(self.tokens.items())).control[-1]
        for part in self.split_control(after):
            if isinstance(part, int):
                return part
        raise UserError(
            "the chat template ends an assistant's turn with no special token; a model could not learn to stop"
        )


def _named(bos: str | None, eos: str, pad: str) -> dict[str, str]:
    """Return the special tokens by the names that templates and tokenizer_config.json use."""
    return ({} if bos is None else {"bos_token": bos}) | {"eos_token": eos, "pad_token": pad}


def _without_start_mark(data: Any) -> Any:
    """Return tokenizer.json's data with SentencePiece's prefix at the start of a text switched off."""
    if isinstance(data, dict):
        changed = {key: _without_start_mark(value) if key != "model" else value for key, value in data.items()}
        return changed | ({"prepend_scheme": "never"} if data.get("prepend_scheme") == "first" else {})
    return [_without_start_mark(item) for item in data] if isinstance(data, list) else data


def _encodable(text: str) -> str:
    """Return the text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    return _SURROGATES.sub("\ufffd", text)


def _dump(data: Mapping[str, Any]) -> str:
    return json.dumps(data, indent=2, ensure_ascii=False) + "\n"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    return data if isinstance(data, dict) else {}


def _token_text(value: Any) -> str | None:
    """Return a token's string; Hugging Face stores either the string or an object with `content`."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _eos_from_model(folder: Path, backend: Backend) -> str | None:
    """Return the eos token that the model's own configuration names, where the tokenizer's does not."""
    for name in ("generation_config.json", "config.json"):
        found = _read_json(folder / name).get("eos_token_id")
        found = found[0] if isinstance(found, list) and found else found
        if isinstance(found, int):
            return backend.id_to_token(found)
    return None


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """Return the folder's chat template: the file first, then the inline one (the one named `default` of several)."""
    path = folder / "chat_template.jinja"
    if path.exists():
        return path.read_text(encoding="utf-8")
    inline = config.get("chat_template")
    if isinstance(inline, list):
        inline = {item.get("name"): item.get("template") for item in inline}.get("default")
    return inline if isinstance(inline, str) and inline else None


def _fallback_template(backend: Backend) -> str:
    """Return the template for a tokenizer that brings none, by the special tokens it has."""
    if all(backend.token_to_id(token) is not None for token in SPECIAL_TOKENS):
        return CHAT_TEMPLATE
    if all(backend.token_to_id(token) is not None for token in ("<|im_start|>", "<|im_end|>")):
        return CHATML_TEMPLATE
    return PLAIN_TEMPLATE


def _pad_candidates(wanted: str | None, data: Mapping[str, Any], taken: set[str]) -> list[str]:
    """Return tokens to try as pad, best first; the last resort is any special token that is neither BOS nor EOS."""
    special = [t["content"] for t in data.get("added_tokens") or [] if t.get("special")]
    return [*([wanted] if wanted else []), *PAD_NAMES, *(t for t in special if t not in taken)]
