"""Text to score, as one stream of tokens."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from steplm.data.formats import is_plain_text
from steplm.data.sources import BadRecords, Source, find_sources
from steplm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LINE_DATASETS = ("wikitext",)  # hub datasets whose records are the lines of one text


@dataclass(frozen=True)
class TokenStream:
    """Tokens of all texts; the first token is only context, so that every token of the texts is predicted."""

    token_ids: npt.NDArray[np.uint32]
    num_text_bytes: int  # UTF-8, of the text that the tokens encode
    num_skipped_records: int  # empty or unusable


def token_stream(
    entries: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    *,
    text_field: str = "text",
    max_tokens: int | None = None,
    max_bytes: int | None = None,
) -> TokenStream:
    """Read, tokenize and concatenate documents, with an end-of-text token after each, as in training.

    A text file is one document (WikiText's layout); JSON and Parquet files hold one document per record. The stream
    begins with ``opening_token``.

    Args:
        entries: files, globs, folders, ``hub://…``, ``builtin://…``, as in ``data.train``.
        max_tokens: tokens to predict, up to a whole character; bytes are counted up to there.
        max_bytes: bytes of text, rounded down to a whole character, so that every tokenizer gets the same text.

    Raises:
        DataError: there is no text, or an entry cannot be read.
    """
    token_ids = array("I", [opening_token(tokenizer)])  # 4 bytes per token; a list takes 36
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    # A literal "</s>" in the text must not become EOS. Set this last: every tokenizer call resets it.
    backend.encode_special_tokens = True
    num_bytes = 0
    bad = BadRecords()
    for text in _texts(entries, text_field, bad):
        if max_bytes is not None and num_bytes + len(text.encode()) >= max_bytes:
            text = text.encode()[: max_bytes - num_bytes].decode(errors="ignore")
            token_ids.extend(backend.encode(text, add_special_tokens=False).ids)
            num_bytes += len(text.encode())
            break
        encoding = backend.encode(text, add_special_tokens=False)
        if max_tokens is not None and len(token_ids) + len(encoding.ids) > max_tokens:
            room = _whole_characters(encoding.offsets, max_tokens + 1 - len(token_ids))
            token_ids.extend(encoding.ids[:room])
            num_bytes += len(text[: encoding.offsets[room - 1][1]].encode()) if room else 0
            break
        token_ids.extend(encoding.ids)
        token_ids.append(tokenizer.eos_token_id)
        num_bytes += len(text.encode())
        if max_tokens is not None and len(token_ids) > max_tokens:
            break
    if num_bytes == 0:
        raise _no_text(entries, bad)
    return TokenStream(np.frombuffer(token_ids, np.uint32), num_bytes, bad.num_bad)


def _whole_characters(offsets: Sequence[tuple[int, int]], num_tokens: int) -> int:
    """The most tokens, at most ``num_tokens``, that do not end inside a character of several tokens."""
    while 0 < num_tokens < len(offsets) and offsets[num_tokens][0] < offsets[num_tokens - 1][1]:
        num_tokens -= 1
    return num_tokens


def require_text(entries: Sequence[str], text_field: str) -> None:
    """Raise ``DataError`` if there is no text to score, so that this fails before training rather than after."""
    bad = BadRecords()
    documents = (document for source in find_sources(entries) for document in source.documents(text_field, bad))
    if not any(document.text for document in documents):
        raise _no_text(entries, bad)


def _no_text(entries: Sequence[str], bad: BadRecords) -> DataError:
    reasons = "".join(f"\n  {record.origin}: {record.reason}" for record in bad.examples)
    return DataError(f"no text in {', '.join(entries)}.{reasons}", entries=list(entries))


def _texts(entries: Sequence[str], text_field: str, bad: BadRecords) -> Iterator[str]:
    for source in find_sources(entries):
        texts = (document.text for document in source.documents(text_field, bad))
        if _is_one_text(source):
            yield "".join(texts)
        else:
            yield from texts


def _is_one_text(source: Source) -> bool:
    if source.path is None:
        return any(name in source.name.lower() for name in LINE_DATASETS)
    return is_plain_text(source.path)


def opening_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """The token that precedes a text: BOS if the tokenizer adds it by default, else end-of-text.

    Models trained here have seen end-of-text before every document except the first, and never BOS.
    """
    bos = tokenizer.bos_token_id
    return bos if bos is not None and bos in tokenizer("").input_ids else tokenizer.eos_token_id
