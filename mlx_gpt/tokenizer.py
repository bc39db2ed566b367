"""Turns text into token ids and back, with the `tokenizers` library."""

import contextlib
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from mlx_gpt import tokenizer_training
from mlx_gpt.errors import UserError, explain_os_error, shown
from mlx_gpt.token_bytes import BYTE_OF, byte_level_pieces, decoding_steps, pieces_of
from mlx_gpt.tokenizer_training import END_OF_TEXT, END_OF_TURN, SPECIAL_TOKENS, START_OF_TURN

CANNOT_ENCODE = "The tokenizer can't encode this text, so use another one"
CANNOT_DECODE = "The tokenizer can't decode its ids, so use another one"


class Encoded(NamedTuple):
    """A text as ids (tokens,) uint32. `places` (tokens, 2) int64 are where each begins and ends, in characters."""

    ids: np.ndarray
    places: np.ndarray


class Tokenizer:
    """A `tokenizer.json` in which `<|endoftext|>` ends a document and is never the result of encoding text.

    Attributes:
        vocab_size: one more than the highest id.
        end_of_text: the id that ends a document: the id of `<|endoftext|>`, unless a model names another.
        chat: the `chat_template` of its model and the names of special tokens that the template may use, as in
            `tokenizer_config.json`; {} if the model was not trained on conversations.
        added: the ids of tokens that the weights beside the tokenizer have not learned yet.
    """

    def __init__(self, backend: HFTokenizer, end_of_text: int | None = None) -> None:
        # A file may ask for truncation or padding, which would change the text.
        backend.no_truncation()
        backend.no_padding()
        ids = backend.get_vocab(with_added_tokens=True).values()
        if max(ids, default=0) > 2 * len(ids) + 1000:  # a table of all ids might not fit in memory
            raise ValueError(f"id {max(ids)} is too high for a tokenizer of {len(ids):,} entries")
        if end_of_text is None or end_of_text not in ids:
            backend.add_special_tokens([END_OF_TEXT])  # has no effect if the token is already there
            end_of_text = backend.get_vocab()[END_OF_TEXT]
        # A text that merely contains "<|endoftext|>" is encoded as those 13 characters. The file does not keep this.
        backend.encode_special_tokens = True
        self.backend = backend
        self.end_of_text = end_of_text
        self.chat: dict[str, str] = {}
        self.added: tuple[int, ...] = ()
        self._further_ends: frozenset[int] = frozenset()
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        pieces = self.token_bytes or []
        self.is_bytes = pieces[:256] == [bytes([byte]) for byte in range(256)] and not any(pieces[256:])

    @classmethod
    def of_bytes(cls) -> "Tokenizer":
        """Return the tokenizer of plain bytes: ids 0 to 255 are the bytes, and the special tokens follow."""
        backend = tokenizer_training.byte_level(models.BPE(vocab=BYTE_OF, merges=[]))
        backend.add_special_tokens(SPECIAL_TOKENS)
        return cls(backend)

    @classmethod
    def train(
        cls, texts: Iterable[str], vocab_size: int, read: Callable[[int], object] = lambda done: None
    ) -> "Tokenizer":
        """Train a byte-level BPE like GPT-2's; arguments as in `tokenizer_training.train`."""
        return cls(tokenizer_training.train(texts, vocab_size, read))

    @classmethod
    def load(cls, path: str | Path, end_of_text: int | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`.

        Args:
            path: the file, or a folder that has it.
            end_of_text: the id that ends a document; None is that of `<|endoftext|>`.

        Raises:
            UserError: there is no such file, it is not a tokenizer.json, or its decoder would change a token.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is not a file: name a tokenizer.json.")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(
                f"There is no {path}: a tokenizer is `bpe`, `bytes` or the path of a tokenizer.json."
            ) from None
        except OSError as error:
            raise UserError(explain_os_error(error, f"read {path}")) from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a tokenizer.json: it is not UTF-8 text.") from None
        with failing_as(f"{path} is not a tokenizer.json"):
            _check_merges(text)
            tokenizer = cls(HFTokenizer.from_str(text), end_of_text)
        if changed := tokenizer._changed_by_its_decoder():
            raise UserError(
                f"{path} cannot be used, because its decoder would turn the added token {shown(changed)!r} into other "
                "characters: make ByteLevel its only decoder."
            )
        return tokenizer

    def without_unknown(self, rows: int) -> "Tokenizer":
        """Return the tokenizer for a model that knows `rows` ids, without the special tokens that it does not know.

        The tokenizers of Gemma's models that read only text have one for images, for example. If a text begins or ends
        with such a token, or the chat template has it, the tokenizer does not belong to the model, and stays as it is.
        """
        added = self.backend.get_added_tokens_decoder().items()
        unknown = {i: token.content for i, token in added if token.special and i >= rows}
        if unknown.keys() & {*self.start, *self.ends} or any(name in str(self.chat) for name in unknown.values()):
            return self
        content = json.loads(self.to_json())
        content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] not in unknown]
        if isinstance(entries := content["model"].get("vocab"), dict):
            content["model"]["vocab"] = {name: i for name, i in entries.items() if i not in unknown}
        return Tokenizer.from_state(self.state() | {"json": json.dumps(content)})

    def converse(self, template: str) -> None:
        """Use a ChatML template, and add the two tokens of ChatML if they are missing. `added` then has their ids.

        Raises:
            UserError: the tokenizer's ids have gaps, so the library would give a new token an id that is taken.
        """
        before = self.backend.get_vocab(with_added_tokens=True)
        self.backend.add_special_tokens([START_OF_TURN, END_OF_TURN])
        ids = self.backend.get_vocab(with_added_tokens=True)
        self.added = tuple(ids[name] for name in (START_OF_TURN, END_OF_TURN) if name not in before)
        if set(before.values()) & set(self.added):
            raise UserError("The tokenizer has gaps between its ids, so no token can be added to it: use another one.")
        self.vocab_size = max(self.vocab_size, *(token + 1 for token in self.added), 0)
        bos_token = self.backend.id_to_token(self.beginning_of_text) or END_OF_TEXT
        self.chat = {"chat_template": template, "bos_token": bos_token, "eos_token": END_OF_TURN}
        for made_of_vocabulary in ("token_bytes", "_pieces", "fingerprint", "_with_special", "ends"):
            self.__dict__.pop(made_of_vocabulary, None)

    def end_at(self, ids: Iterable[int]) -> None:
        """Set the ids, besides `end_of_text`, that end the model's texts and answers."""
        self._further_ends = frozenset(ids)
        self.__dict__.pop("ends", None)

    @functools.cached_property
    def ends(self) -> frozenset[int]:
        """The ids that end a text or an answer: `end_of_text`, `<|im_end|>`, and the ids that a model names."""
        end_of_turn: int | None = self.backend.token_to_id(END_OF_TURN)
        return self._further_ends | {self.end_of_text} | (set() if end_of_turn is None else {end_of_turn})

    @functools.cached_property
    def start(self) -> list[int]:
        """The ids with which its model expects each text to begin, as Llama's and Gemma's do; usually there are none.

        They are those that the library puts before a text.
        """
        try:
            with failing_as(CANNOT_ENCODE):
                whole, plain = (self.backend.encode("a", add_special_tokens=special).ids for special in (True, False))
        except UserError:
            return []
        return whole[: -len(plain)] if plain and whole[-len(plain) :] == plain else []

    @property
    def beginning_of_text(self) -> int:
        """The id that begins a text: the last of `start`, or else `end_of_text`, which ends the text before it."""
        return [self.end_of_text, *self.start][-1]

    def state(self) -> dict[str, Any]:
        """Return everything about the tokenizer in a form that JSON can hold, for `from_state`."""
        further = {"further_ends": sorted(self._further_ends), "chat": self.chat, "added": self.added}
        return {"json": self.to_json(), "end_of_text": self.end_of_text} | further

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Tokenizer":
        """Return the tokenizer whose `state` this is."""
        tokenizer = cls(HFTokenizer.from_str(state["json"]), state["end_of_text"])
        tokenizer.end_at(state["further_ends"])
        tokenizer.chat, tokenizer.added = state["chat"], tuple(state["added"])
        return tokenizer

    def to_json(self) -> str:
        """Return the text of its `tokenizer.json`."""
        return self.backend.to_str(pretty=True)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Return the ids of one text, without the end of a document.

        Args:
            text: any text, such as a prompt.
            special: turn the names of special tokens into these tokens, which the text of a chat template needs.

        Raises:
            UserError: the text is not a str, is not valid Unicode, because it has half of a surrogate pair, or the
                tokenizer cannot encode it.
        """
        if not isinstance(text, str):
            raise UserError(f"Only text can be encoded, not {shown(repr(text))}: a prompt must be a str.")
        return self.encode_batch([text], special)[0]

    def encode_batch(self, texts: Sequence[str], special: bool = False) -> list[list[int]]:
        """Return the ids of several texts, encoded on all cores. Argument and errors as in `encode`."""
        with failing_as(CANNOT_ENCODE):
            try:
                if self.is_bytes and not special:  # the library gives the same ids, thirty times slower
                    return [list(text.encode()) for text in texts]
                backend = self._with_special if special else self.backend
                return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]
            except (UnicodeEncodeError, TypeError):  # the library raises either for a lone surrogate
                raise UserError("The text is not valid Unicode (a lone surrogate): pass it as UTF-8.") from None

    def encode_with_places(self, texts: Sequence[str]) -> list["Encoded"]:
        """Return the ids of several texts with their special tokens, and the places of all. Errors as in `encode`."""
        with failing_as(CANNOT_ENCODE):
            found = self._with_special.encode_batch(list(texts), add_special_tokens=False)
        return [Encoded(np.array(one.ids, np.uint32), np.array(one.offsets, np.int64).reshape(-1, 2)) for one in found]

    def continuation(self, prompt: Sequence[int], text: str, whole: Sequence[int]) -> list[int]:
        """Return the ids of a text that follows the ids of a prompt.

        A tokenizer may put a space before any text that it encodes. So the text is encoded after other text, and the
        ids are used only if prompt and text decode to the same text as `whole`, the ids of both encoded together.

        Raises:
            UserError: there are no such ids.
        """
        end_of_text = self.name_of(self.end_of_text)
        for before in (end_of_text, f"{end_of_text}\n"):
            [encoded] = self.encode_with_places([before + text])
            ids: list[int] = encoded.ids[encoded.places[:, 0] >= len(before)].tolist()
            if self.decode([*prompt, *ids]) == self.decode(whole):
                return ids
        raise UserError("the tokenizer joins a prompt and its answer.")

    def dividing_ids(self) -> list[int]:
        """Return the ids of the special tokens before and after which a text is encoded separately."""
        return [i for i, token in self.backend.get_added_tokens_decoder().items() if not token.normalized]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without the ends of documents.

        Raises:
            UserError: the tokenizer cannot decode them.
        """
        if self.token_bytes is None:
            with failing_as(CANNOT_DECODE):
                return self.backend.decode(ids, skip_special_tokens=True)
        return b"".join(self.token_bytes[i] for i in ids if i < self.vocab_size).decode(errors="replace")

    def bytes_of(self, token: int) -> list[int]:
        """Return the UTF-8 bytes that one id adds to a text."""
        return list(self._pieces[token])

    def name_of(self, token: int) -> str:
        r"""Return the text of one id.

        A special token has its name instead, and an incomplete character its bytes, as in `bytes:\xf0\x9f`.
        """
        known = bytes(self.bytes_of(token))
        if not known:
            return self.backend.id_to_token(token) or ""
        try:
            return known.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)

    def special_names(self) -> list[str]:
        """Return the names of the special tokens, such as the end of a document."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    def byte_lengths(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, (vocab_size,) int64; 0 for the end of a document."""
        return np.array([len(piece) for piece in self._pieces])

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash in hex of which id stands for which token. The layout of the file does not change it."""
        entries = sorted(self.backend.get_vocab(with_added_tokens=True).items())
        return blake2b(json.dumps(entries).encode(), digest_size=8).hexdigest()

    @functools.cached_property
    def unknown(self) -> int | None:
        """The id that stands for any text without a token of its own, as [UNK] does; None if there is no such id."""
        model = self._model
        unknown = model.get("unk_id")
        if isinstance(name := model.get("unk_token"), str):
            unknown = self.backend.token_to_id(name)
        return unknown if isinstance(unknown, int) and unknown != self.end_of_text else None

    @functools.cached_property
    def drops_unknown(self) -> bool:
        """Whether text without a token is left out. Of the library's models, BPE does so if it has no unknown token."""
        model = self._model
        complete = model.get("byte_fallback") or BYTE_OF.keys() <= self.backend.get_vocab().keys()
        return model["type"] == "BPE" and model.get("unk_token") is None and not complete

    def _changed_by_its_decoder(self) -> str:
        """Return an added token that the library would decode as GPT-2's characters for bytes, or "".

        With ByteLevel alone, `token_bytes` decodes, and gives each added token as it is.
        """
        if self.token_bytes is not None or "ByteLevel" not in decoding_steps(self.backend):
            return ""
        added = self.backend.get_added_tokens_decoder().values()
        names = (token.content for token in added if not token.special and not token.content.isascii())
        return next((name for name in names if BYTE_OF.keys() >= set(name)), "")

    @functools.cached_property
    def _model(self) -> dict[str, Any]:
        """The `model` of its tokenizer.json, without the vocabulary."""
        model = json.loads(self.backend.to_str())["model"]
        return {name: value for name, value in model.items() if name not in ("vocab", "merges")}

    @functools.cached_property
    def _with_special(self) -> HFTokenizer:
        """The same tokenizer, except that it encodes the name of a special token as that token."""
        backend = HFTokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        backend.post_processor = None  # it would only exclude spaces from the places of tokens
        return backend

    @functools.cached_property
    def splits_like_gpt2(self) -> bool:
        """Whether text is split into words exactly as GPT-2 does, and each word is then encoded by itself."""
        split = self.backend.pre_tokenizer
        return (
            isinstance(split, pre_tokenizers.ByteLevel)
            and split.use_regex
            and not split.add_prefix_space
            and self.backend.normalizer is None
            and all(token.special for token in self.backend.get_added_tokens_decoder().values())
            and not getattr(self.backend.model, "dropout", None)  # it would give a word other ids each time
        )

    @functools.cached_property
    def _pieces(self) -> list[bytes]:
        """The bytes that each id adds to a text, for any kind of tokenizer.

        Decoded alone, an id of a SentencePiece model may lose the space before its word, or be half of a character.
        """
        return pieces_of(self.backend) if self.token_bytes is None else self.token_bytes

    @functools.cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes of each id if every token is a run of bytes, as in GPT-2; None for other kinds of tokenizer."""
        is_byte_level = [step for step in decoding_steps(self.backend) if step != "Fuse"] == ["ByteLevel"]
        return byte_level_pieces(self.backend) if is_byte_level else None


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Turn an error of the library into a `UserError` that says `what` failed, and why.

    The library raises a plain Exception, and a panic in its Rust code raises a bare BaseException.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {shown(error, 200)}.") from None


def _check_merges(text: str) -> None:
    """Refuse a `tokenizer.json` with which the library may end the process, because that cannot be caught.

    The library removes as many bytes as the prefix has from the second half of each merge, without checking that these
    bytes are the prefix.
    """
    content = json.loads(text)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not (prefix := model.get("continuing_subword_prefix")):
        return
    for merge in model.get("merges", ()):
        second = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not second.startswith(prefix):
            raise ValueError(f"its merge {merge!r} continues a word without {prefix!r}")
