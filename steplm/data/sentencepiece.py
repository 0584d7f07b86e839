"""Read SentencePiece BPE models (``tokenizer.model`` of LLaMA 1 and 2, Mistral 7B) without their library.

The token IDs match those of the ``sentencepiece`` package and are tested against it. The automatic conversion
in transformers (as of 5.23) loses the space that the model expects at the start of the text.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steplm.errors import DataError

SPACE = "▁"
# Field numbers and enum values from sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_PIECE_TEXT, _PIECE_SCORE, _PIECE_TYPE = 1, 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_MODEL_TYPE, _BPE, _BYTE_FALLBACK = 3, 2, 35
_CHARSMAP, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 2, 3, 4


@dataclass(frozen=True)
class Piece:
    text: str
    score: float
    type: int


def read_sentencepiece(path: Path) -> tuple[Any, dict[str, str]]:
    """Build a ``tokenizers.Tokenizer`` from a model file; also return its special tokens by Hugging Face name.

    Raises:
        DataError: the file is not a SentencePiece model, or the model is not BPE or normalizes the text.
    """
    try:
        fields = list(_fields(path.read_bytes()))
        pieces = [_piece(value) for number, value in fields if number == _PIECES]
        trainer = dict(_fields(_last(fields, _TRAINER)))
        normalizer = dict(_fields(_last(fields, _NORMALIZER)))
    except (ValueError, IndexError, TypeError, struct.error):
        pieces, trainer, normalizer = [], {}, {}
    if not pieces:
        raise DataError(f"{path} is not a SentencePiece model.", path=str(path))
    if trainer.get(_MODEL_TYPE) != _BPE or normalizer.get(_CHARSMAP) or normalizer.get(_REMOVE_EXTRA_WHITESPACES, 1):
        raise DataError(
            f"{path} is a SentencePiece model that changes the text or is not BPE, which is not read here. "
            "Give the tokenizer.json of the same model.",
            path=str(path),
        )
    return _build(pieces, bool(trainer.get(_BYTE_FALLBACK)), bool(normalizer.get(_ADD_DUMMY_PREFIX, 1)))


def _build(pieces: list[Piece], byte_fallback: bool, dummy_prefix: bool) -> tuple[Any, dict[str, str]]:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    unknown = next((piece.text for piece in pieces if piece.type == _UNKNOWN), None)
    model = models.BPE(
        {piece.text: index for index, piece in enumerate(pieces)},
        _merges(pieces),
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=byte_fallback,
    )
    tokenizer = Tokenizer(model)
    spaces = normalizers.Replace(" ", SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if dummy_prefix else spaces
    if not any(SPACE in piece.text.lstrip(SPACE) for piece in pieces):
        # No piece has a space after a letter, so no merge crosses these splits: same IDs, only shorter words to merge.
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"), "isolated")
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if dummy_prefix else steps)
    special = [piece.text for piece in pieces if piece.type in (_UNKNOWN, _CONTROL)]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    user_defined = [piece.text for piece in pieces if piece.type == _USER_DEFINED]
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": unknown}
    return tokenizer, {name: text for name, text in names.items() if text in special}


def _merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every way to merge two pieces into one, in SentencePiece's order: highest score first."""
    ids = {piece.text: index for index, piece in enumerate(pieces) if piece.type in (_NORMAL, _USER_DEFINED)}
    ranked = []
    for text, index in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces[index].score, ids[left], ids[right], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", fields.get(_PIECE_SCORE, b"\0\0\0\0"))[0]
    return Piece(fields[_PIECE_TEXT].decode(), score, fields.get(_PIECE_TYPE, _NORMAL))


def _last(fields: list[tuple[int, Any]], number: int) -> bytes:
    return next((value for n, value in reversed(fields) if n == number), b"")


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of each field in a protobuf message: an int for varints, bytes for everything else."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, position = _varint(data, position)
            yield number, value
            continue
        if wire_type == 2:
            size, position = _varint(data, position)
        elif wire_type in (1, 5):
            size = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"wire type {wire_type}")
        if position + size > len(data):
            raise ValueError("cut off")
        yield number, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        value |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return value, position
        shift += 7
