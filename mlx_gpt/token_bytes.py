"""The bytes that each token of a `tokenizers` tokenizer adds to a text. Special tokens add none."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer


def pieces_of(backend: Tokenizer) -> list[bytes]:
    """Return the bytes that each id adds to a text in front of which there is more text, for any kind of tokenizer."""
    steps, added = _decoders(backend), backend.get_added_tokens_decoder()
    vocabulary = backend.get_vocab(with_added_tokens=True)
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i not in added or not added[i].special:
            pieces[i] = _piece(token, steps)
    return pieces


def byte_level_pieces(backend: Tokenizer) -> list[bytes]:
    """Return the bytes of each id of a tokenizer in which every token is a run of bytes, as in GPT-2."""
    vocabulary, added = backend.get_vocab(with_added_tokens=True), backend.get_added_tokens_decoder()
    pieces = [b""] * (max(vocabulary.values()) + 1)
    for token, i in vocabulary.items():
        if i not in added and all(character in BYTE_OF for character in token):
            pieces[i] = bytes(BYTE_OF[character] for character in token)
        elif i not in added or not added[i].special:
            pieces[i] = token.encode()
    return pieces


def decoding_steps(backend: Tokenizer) -> list[str]:
    """Return the types of a tokenizer's decoders in the order in which they are applied."""
    return [step["type"] for step in _decoders(backend)]


def _decoders(backend: Tokenizer) -> list[dict[str, Any]]:
    """Return a tokenizer's decoders, as its file describes them, in the order in which they are applied."""

    def steps(decoder: dict[str, Any]) -> list[dict[str, Any]]:
        if decoder["type"] == "Sequence":
            return [step for part in decoder["decoders"] for step in steps(part)]
        return [decoder]

    return steps(json.loads(backend.decoder.__getstate__())) if backend.decoder else []


def _piece(token: str, steps: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the bytes that an entry of the vocabulary adds to a text in front of which there is more text."""
    for step in steps:
        kind = step["type"]
        if kind == "ByteFallback" and re.fullmatch("<0x[0-9A-F]{2}>", token):
            return bytes([int(token[3:5], 16)])
        if kind == "ByteLevel" and all(character in BYTE_OF for character in token):
            return bytes(BYTE_OF[character] for character in token)
        if kind == "Replace" and "String" in step["pattern"]:
            token = token.replace(step["pattern"]["String"], step["content"])
        elif kind == "Metaspace":
            token = token.replace(step["replacement"], " ")
        elif kind == "WordPiece":
            token = token.removeprefix(step["prefix"]) if token.startswith(step["prefix"]) else f" {token}"
        elif kind == "BPEDecoder":
            token = token.replace(step["suffix"], " ")
    return token.encode()


def _byte_characters() -> dict[int, str]:
    """Return the printable character for each byte in GPT-2's vocabulary: the byte's own if that is printable."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTE_OF = {character: byte for byte, character in _byte_characters().items()}
