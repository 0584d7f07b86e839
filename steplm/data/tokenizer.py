"""Tokenizers: loaded from the hub, a folder or a file, or trained here.

Code that comes with a tokenizer is never run. Code that encodes text for training must set
``encode_special_tokens``, so that a literal ``</s>`` in a document does not become the EOS token.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steplm.data.sentencepiece import read_sentencepiece
from steplm.data.sources import local_path
from steplm.errors import ConfigError, DataError, HubUnavailable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
USUAL_END_TOKENS = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "[EOS]")
_NUM_BYTES = 256


def load_tokenizer(spec: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder, a file, or, if no such path exists, the hub.

    Args:
        spec: a folder written by ``save_pretrained``, one with ``tokenizer.model`` (SentencePiece BPE) or
            with ``encoder.json`` and ``vocab.bpe`` (GPT-2), one of these files, or OWNER/NAME on the hub.

    Raises:
        DataError: there is no usable tokenizer, or it has no end-of-text token.
        HubUnavailable: the hub cannot be reached.
    """
    path = local_path(spec)
    tokenizer = _from_path(path) if path.exists() else _from_hub(str(spec))
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {str(spec)!r} has no end-of-text token, which must follow each document. "
            'Name one in its tokenizer_config.json ("eos_token").',
            tokenizer=str(spec),
        )
    return tokenizer


def without_added_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """Return a copy that adds no BOS or EOS by itself, however it is loaded.

    Training adds EOS after each document and no BOS, so ``tokenizer(text)`` then gives the tokens that the
    model was trained on. EOS is also set as the BOS token, so that a text that starts with BOS looks to the
    model like a document in training.
    """
    from tokenizers import Tokenizer

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    if backend.num_special_tokens_to_add(False):
        values = json.loads(backend.to_str())
        backend = Tokenizer.from_str(json.dumps({**values, "post_processor": None}))
    # Not a model-specific tokenizer class: those build their own post-processor on loading.
    plain = _wrap(backend, {**tokenizer.special_tokens_map, "bos_token": tokenizer.eos_token})
    plain.chat_template = tokenizer.chat_template
    return plain


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer, which is lossless for any text.

    Args:
        vocab_size: maximum number of entries, including the 256 bytes and the end-of-text token.

    Raises:
        ConfigError: the vocabulary is too small for all 256 bytes and the end-of-text token.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    smallest = _NUM_BYTES + 1
    if vocab_size < smallest:
        raise ConfigError(
            f"model.vocab_size={vocab_size} is too small to train a tokenizer: 256 bytes and {END_OF_TEXT} "
            f"take {smallest}. Raise it, or name a tokenizer in data.tokenizer.",
            vocab_size=vocab_size,
            smallest=smallest,
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer, {"eos_token": END_OF_TEXT, "bos_token": END_OF_TEXT, "pad_token": END_OF_TEXT})


def tokenizer_files(spec: str | Path) -> list[Path]:
    """The local files that ``load_tokenizer`` would read; none for a name on the hub."""
    path = local_path(spec)
    files = list(_locate(path)[0]) if path.exists() else []
    config = files[0].with_name("tokenizer_config.json") if files else path
    if files and files[0].name in ("tokenizer.json", "tokenizer.model") and config.is_file():
        files.append(config)
    return files


def _from_path(path: Path) -> PreTrainedTokenizerFast:
    files, read = _locate(path)
    try:
        tokenizer = read(*files)
        tokenizer.decode(tokenizer("a").input_ids)  # a setting of the wrong type fails only in use
        return tokenizer
    except (DataError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # on a broken file the tokenizers library raises a bare Exception or panics
        raise DataError(f"cannot read the tokenizer {path}: {_first_line(error)}", path=str(path)) from None


def _locate(path: Path) -> tuple[tuple[Path, ...], Callable[..., PreTrainedTokenizerFast]]:
    folder = path if path.is_dir() else path.parent
    for names, read in FORMATS.items():
        files = tuple(folder / name for name in names)
        if (path.is_dir() or path in files) and all(file.is_file() for file in files):
            return files, read
    for names, read in FORMATS.items():  # a single file with another name, such as mistral.model
        if path.is_file() and len(names) == 1 and path.suffix == Path(names[0]).suffix:
            return (path,), read
    wanted = "; ".join(" and ".join(names) for names in FORMATS)
    raise DataError(f"no tokenizer at {path}. It needs one of: {wanted}.", path=str(path))


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except Exception as error:
        if name.startswith((".", "/", "~")) or name.count("/") > 1 or Path(name).suffix in (".json", ".model"):
            raise DataError(f"no tokenizer at {name}: there is no such file or folder.", tokenizer=name) from None
        raise HubUnavailable(
            f"there is no folder {name!r}, and the hub gives no tokenizer of this name: "
            f"{_first_line(error)}\n"
            "Name a folder or file in data.tokenizer, or 'train' to train one here.",
            tokenizer=name,
        ) from None
    if not tokenizer.is_fast:
        raise DataError(f"the tokenizer {name!r} has no fast version. Give its tokenizer.json.", tokenizer=name)
    return tokenizer


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _wrap(backend: Any, special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special_tokens)


def _read_json(file: Path) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    if file.name == "tokenizer.json":
        # AutoTokenizer may rebuild the tokenizer for the model family; this loads the file unchanged.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(file.parent))
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(file))
    if tokenizer.eos_token is None:
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        tokenizer.eos_token = next((text for text in USUAL_END_TOKENS if text in special), None)
    return tokenizer


def _read_sentencepiece(file: Path) -> PreTrainedTokenizerFast:
    """Read a SentencePiece model, with the special tokens and chat template from the files beside ``tokenizer.model``.

    BOS is added to each text unless they say otherwise, as every published model with such a file does.
    """
    from transformers import PreTrainedTokenizerFast

    backend, special = read_sentencepiece(file)
    if file.name == "tokenizer.model":
        tokenizer = PreTrainedTokenizerFast.from_pretrained(
            str(file.parent), tokenizer_object=backend, clean_up_tokenization_spaces=False
        )
    else:
        tokenizer = _wrap(backend, {})
    for name, text in special.items():
        if getattr(tokenizer, name) is None:
            setattr(tokenizer, name, text)
    tokenizer.add_bos_token = tokenizer.init_kwargs.get("add_bos_token", True)  # rebuilds the post-processor
    return tokenizer


def _read_byte_level(vocabulary: Path, merges: Path) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE.from_file(os.fspath(vocabulary), os.fspath(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    known = json.loads(vocabulary.read_text(encoding="utf-8"))
    end = next((text for text in USUAL_END_TOKENS if text in known), None)
    if end is None:
        return _wrap(backend, {})
    backend.add_special_tokens([end])
    return _wrap(backend, {"eos_token": end, "bos_token": end})


# The files of each tokenizer format and their reader, in order of preference.
FORMATS: dict[tuple[str, ...], Callable[..., PreTrainedTokenizerFast]] = {
    ("tokenizer.json",): _read_json,
    ("tokenizer.model",): _read_sentencepiece,
    ("encoder.json", "vocab.bpe"): _read_byte_level,
    ("vocab.json", "merges.txt"): _read_byte_level,
}
