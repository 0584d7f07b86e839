"""Perplexities saved in one file per model and text, and reused while model, text and settings are unchanged."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from steplm.eval.fingerprint import model_fingerprint, text_fingerprint
from steplm.eval.perplexity import PerplexityResult, default_sequence_length, evaluate_folder
from steplm.files import write_atomically
from steplm.models.folder import load_hf_config
from steplm.models.names import short_name

SCHEMA = 1
TEXTS_FOLDER = "texts"


def evaluate_or_reuse(
    folder: str | Path,
    data_entries: Sequence[str],
    output: Path,
    *,
    text_field: str = "text",
    sequence_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 8,
    max_tokens: int | None = None,
    max_bytes: int | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> tuple[PerplexityResult, bool]:
    """``evaluate_folder``, or its result saved in ``output``; also returns whether the result was reused.

    A result is reused if the weights, configuration, tokenizer, text and settings are the same. Results on hub
    datasets are saved only if a commit is pinned.
    """
    length = sequence_length or default_sequence_length(folder, load_hf_config(folder))
    text = text_fingerprint(data_entries)
    settings: dict[str, Any] = {
        "text_field": text_field,
        "sequence_length": length,
        "stride": length if stride is None else stride,
        "max_tokens": max_tokens,
        "dtype": dtype,
    }
    if max_bytes is not None:
        settings["max_bytes"] = max_bytes
    about = json.dumps([SCHEMA, model_fingerprint(str(folder)), text, settings])
    fingerprint = hashlib.sha256(about.encode()).hexdigest()
    plain = re.sub(r"[^\w.-]+", "_", short_name(str(folder)))
    file = output / TEXTS_FOLDER / f"{plain[:100]}-{fingerprint[:12]}.json"
    saved = None if text is None else _load(file, fingerprint)
    if saved is not None:
        return saved, True
    result = evaluate_folder(folder, data_entries, batch_size=batch_size, device=device, **settings)
    if text is not None:
        document = {
            "schema": SCHEMA,
            "fingerprint": fingerprint,
            "model": str(folder),
            "data": list(data_entries),
            "settings": settings,
            "result": asdict(result),
        }
        write_atomically(file, json.dumps(document, indent=1) + "\n")
    return result, False


def _load(path: Path, fingerprint: str) -> PerplexityResult | None:
    """``None`` if there is no result with this fingerprint."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["schema"] != SCHEMA or document["fingerprint"] != fingerprint:
            return None
        result = PerplexityResult(**document["result"])
        return result if result.loss >= 0 else None
    except (OSError, ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError):
        return None  # invalid: score the model again
