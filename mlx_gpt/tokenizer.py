"""Text to token ids and back, over the `tokenizers` library."""

import codecs
import contextlib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from mlx_gpt.errors import UserError, shown

END_OF_TEXT = "<|endoftext|>"
CANNOT_DECODE = "The tokenizer can't decode its ids, use another one"

# White space as Unicode has it and the library reads it; Python's own \s has four control characters more.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# GPT-2's split into words (Radford et al. 2019), with its letters, digits and signs in one class. No word reaches over
# the border of two parts, and a part alone is split into the same words, so a text's ids are those of its parts.
PARTS = re.compile(rf" ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")
REMEMBERED = 50_000_000  # characters of distinct parts, each with 100 more for what Python adds: about 100 MB


class Tokenizer:
    """A `tokenizer.json` in which `<|endoftext|>` ends a document and never comes out of text.

    Attributes:
        vocab_size: one more than the highest id.
        end_of_text: the id that ends a document; that of `<|endoftext|>` unless a model says otherwise.
    """

    def __init__(self, backend: HFTokenizer, end_of_text: int | None = None) -> None:
        # What a file brings along to shorten or pad a text would lose some of it.
        backend.no_truncation()
        backend.no_padding()
        ids = backend.get_vocab(with_added_tokens=True).values()
        if max(ids, default=0) > 2 * len(ids) + 1000:  # a table of them all would not fit into memory
            raise ValueError(f"a tokenizer of {len(ids):,} entries has none with id {max(ids)}")
        if end_of_text is None or end_of_text not in ids:
            backend.add_special_tokens([END_OF_TEXT])  # leaves it as it is when it is there
            end_of_text = backend.get_vocab()[END_OF_TEXT]
        # Not saved in tokenizer.json: a text that merely contains "<|endoftext|>" is encoded as those 13 characters.
        backend.encode_special_tokens = True
        self.backend = backend
        self.end_of_text = end_of_text
        self.vocab_size: int = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self.is_bytes = self.token_bytes == [*(bytes([byte]) for byte in range(256)), b""]

    @classmethod
    def of_bytes(cls) -> "Tokenizer":
        """Plain bytes: id 0 to 255 is the byte, 256 the end of a document."""
        backend = HFTokenizer(models.BPE(vocab=BYTE_OF, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return cls(backend)

    @classmethod
    def train(cls, documents: Iterable[str], vocab_size: int) -> "Tokenizer":
        """Byte-level BPE as GPT-2's (Sennrich et al. 2016, arXiv:1508.07909), learnt from `documents`.

        It has at most `vocab_size` entries, fewer where the text has too few pairs that occur twice.
        """
        backend = HFTokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(documents, trainer)
        return cls(backend)

    @classmethod
    def load(cls, path: str | Path, end_of_text: int | None = None) -> "Tokenizer":
        """Read a `tokenizer.json`, or the one in a folder.

        Raises:
            UserError: there is none, or it isn't one.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        try:
            if path.exists() and not path.is_file():
                raise UserError(f"{path} is no file.")
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise UserError(
                f"There is no {path}: a tokenizer is `bpe`, `bytes` or the path of a tokenizer.json."
            ) from None
        except OSError as error:
            raise UserError(f"{path} can't be read: {error.strerror}.") from None
        except UnicodeDecodeError:
            raise UserError(f"{path} is not a tokenizer.json: it is not UTF-8 text.") from None
        with failing_as(f"{path} is not a tokenizer.json"):
            _check_merges(text)
            return cls(HFTokenizer.from_str(text), end_of_text)

    def to_json(self) -> str:
        """The text of its `tokenizer.json`."""
        return self.backend.to_str(pretty=True)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """The ids of one text, without an end of document.

        Args:
            special: take the names of special tokens for these tokens, as the text of a chat template wants it.

        Raises:
            UserError: the text has a character that is no Unicode, such as half of a surrogate pair, or the tokenizer
                fails at it.
        """
        if not special:
            return self.encode_batch([text])[0]
        with failing_as("The tokenizer can't encode this text, use another one"):
            return self._with_special.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The ids of several texts, on all cores. Errors as in `encode`."""
        with failing_as("The tokenizer can't encode this text, use another one"):
            try:
                if self.is_bytes:  # the library's way to the same ids is thirty times slower
                    return [list(text.encode()) for text in texts]
                return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]
            except (UnicodeEncodeError, TypeError):  # the library says either of a lone surrogate
                raise UserError("The text is not valid Unicode (a lone surrogate): pass it as UTF-8.") from None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, ends of documents left out.

        Raises:
            UserError: the tokenizer fails at them.
        """
        if self.token_bytes is None:
            with failing_as(CANNOT_DECODE):
                return self.backend.decode(ids, skip_special_tokens=True)
        return b"".join(self.token_bytes[i] for i in ids if i < self.vocab_size).decode(errors="replace")

    def bytes_of(self, token: int) -> list[int]:
        """The UTF-8 bytes of one id."""
        return list(self.decode([token]).encode() if self.token_bytes is None else self.token_bytes[token])

    def name_of(self, token: int) -> str:
        r"""The text of one id, or what it is called: a part of a character as `bytes:\xf0\x9f`, a special token."""
        known = bytes(self.bytes_of(token))
        if not known:
            return self.backend.id_to_token(token) or ""
        try:
            return known.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)

    def special_names(self) -> list[str]:
        """What the ids are called that no text has, such as the end of a document."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values() if token.special]

    def byte_lengths(self) -> np.ndarray:
        """UTF-8 bytes that each id stands for, (vocab_size,) int64; 0 for the end of a document."""
        if self.token_bytes is None:
            return np.array([len(self.decode([i]).encode()) for i in range(self.vocab_size)])
        return np.array([len(piece) for piece in self.token_bytes])

    @functools.cached_property
    def _with_special(self) -> HFTokenizer:
        """The same, for which the name of a special token is that token."""
        backend = HFTokenizer.from_str(self.backend.to_str())
        backend.encode_special_tokens = False
        return backend

    @functools.cached_property
    def splits_like_gpt2(self) -> bool:
        """Whether text is encoded word by word, each word by itself, after GPT-2's split and nothing else."""
        split = self.backend.pre_tokenizer
        return (
            isinstance(split, pre_tokenizers.ByteLevel)
            and split.use_regex
            and not split.add_prefix_space
            and self.backend.normalizer is None
            and all(token.special for token in self.backend.get_added_tokens_decoder().values())
            and not getattr(self.backend.model, "dropout", None)  # which draws anew for each word
        )

    @functools.cached_property
    def token_bytes(self) -> list[bytes] | None:
        """The bytes of each id, where a token is a run of bytes as in GPT-2; None for other kinds of tokenizer."""
        if not isinstance(self.backend.decoder, decoders.ByteLevel):
            return None
        pieces = [b""] * self.vocab_size
        added = self.backend.get_added_tokens_decoder()
        for token, i in self.backend.get_vocab(with_added_tokens=True).items():
            if i not in added and all(character in BYTE_OF for character in token):
                pieces[i] = bytes(BYTE_OF[character] for character in token)
            elif i not in added or not added[i].special:
                pieces[i] = token.encode()
        return pieces


class CorpusEncoder:
    """Text to the bytes of its ids, the same ids as `Tokenizer.encode`, for text by the gigabyte.

    The library's regular expression takes most of its time, and a corpus repeats its words. So where a tokenizer splits
    text as GPT-2's does, each distinct part of it is encoded once, and looked up from then on.

    Args:
        tokenizer: whose ids.
        dtype: of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self._ids_of: dict[str, bytes] = {}
        self._remembered = 0

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """The ids of several texts. Errors as in `Tokenizer.encode`."""
        if self._tokenizer.is_bytes or not self._tokenizer.splits_like_gpt2:
            return self._encode(texts)
        if self._remembered > REMEMBERED:
            self._ids_of.clear()
            self._remembered = 0
        parts_of = [PARTS.findall(text) for text in texts]
        new = list(set().union(*parts_of) - self._ids_of.keys())
        self._ids_of.update(zip(new, self._encode(new), strict=True))
        self._remembered += sum(map(len, new)) + 100 * len(new)
        return [b"".join(map(self._ids_of.__getitem__, parts)) for parts in parts_of]

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        return [np.array(ids, self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]


class Detokenizer:
    """Ids to text as they come: never half a character, and all of it in the end."""

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        # Some kinds write a space or not by what stands before.
        self._stream = decoders.DecodeStream(ids=list(before), skip_special_tokens=True)
        self._ids: list[int] = []
        self._told = 0

    def add(self, token: int) -> str:
        """The text that this token completes; empty while a character is unfinished."""
        pieces = self._tokenizer.token_bytes
        if pieces is None:
            self._ids.append(token)
            with failing_as(CANNOT_DECODE):
                text = self._stream.step(self._tokenizer.backend, token) or ""
            self._told += len(text)
            return text
        return self._utf8.decode(pieces[token] if token < len(pieces) else b"")

    def finish(self) -> str:
        """What is left: U+FFFD where the last character will never be whole."""
        if self._tokenizer.token_bytes is None:
            return self._tokenizer.decode(self._ids)[self._told :]
        return self._utf8.decode(b"", final=True)


@contextlib.contextmanager
def failing_as(what: str) -> Iterator[None]:
    """Raise a `UserError` that says `what`, and why, where the library fails at a file that it did not expect.

    It raises plain Exception, and panics with what is not even that.
    """
    try:
        yield
    except (KeyboardInterrupt, SystemExit, UserError):
        raise
    except BaseException as error:
        raise UserError(f"{what}: {shown(error, 200)}.") from None


def _check_merges(text: str) -> None:
    """Refuse a `tokenizer.json` at which the library may end the process, without an exception to catch.

    Of the second half of a merge it cuts off as many bytes as the prefix has, without a look at what they are.
    """
    content = json.loads(text)
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not (prefix := model.get("continuing_subword_prefix")):
        return
    for merge in model.get("merges", ()):
        second = merge.split(" ")[-1] if isinstance(merge, str) else merge[-1]
        if not second.startswith(prefix):
            raise ValueError(f"its merge {merge!r} goes on without {prefix!r}")


def _byte_characters() -> dict[int, str]:
    """The printable character that stands for each byte in GPT-2's vocabulary: its own where it has one."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_OF = {character: byte for byte, character in _byte_characters().items()}
