"""Which tokenizer a model folder has. Nothing in the folder is ever executed."""

from __future__ import annotations

from pathlib import Path

from kimi_deploy.errors import TokenizerError
from kimi_deploy.text import byte_tokenizer, tiktoken_model, tokenizer_json
from kimi_deploy.text.byte_tokenizer import ByteTokenizer, write_byte_tokenizer
from kimi_deploy.text.files import read_json
from kimi_deploy.text.protocol import StreamDecoder, Tokenizer
from kimi_deploy.text.tiktoken_model import TiktokenTokenizer
from kimi_deploy.text.tokenizer_json import JsonTokenizer

__all__ = [
    "TOKENIZER_FILES",
    "StreamDecoder",
    "Tokenizer",
    "load_tokenizer",
    "tokenizer_if_any",
    "write_byte_tokenizer",
]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tiktoken.model",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
"""Every file of a checkpoint that says how its text is read and written, in the names the field uses."""


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of the model in `folder`, chosen by the files there.

    `tiktoken.model` (Kimi's own), `tokenizer.json` (the tokenizers library), or a `tokenizer_config.json` whose
    class is ByteTokenizer. Raises TokenizerError when there is none, more than one, or one that cannot be used.
    """
    folder = Path(folder)
    config = read_json(folder, "tokenizer_config.json") or {}
    kinds: dict[str, type[TiktokenTokenizer] | type[JsonTokenizer] | type[ByteTokenizer]] = {}
    if (folder / tiktoken_model.FILE_NAME).exists():
        kinds[tiktoken_model.FILE_NAME] = TiktokenTokenizer
    if (folder / tokenizer_json.FILE_NAME).exists():
        kinds[tokenizer_json.FILE_NAME] = JsonTokenizer
    if config.get("tokenizer_class") == byte_tokenizer.CLASS_NAME:
        kinds[f"tokenizer_config.json with class {byte_tokenizer.CLASS_NAME}"] = ByteTokenizer
    if not kinds:
        raise TokenizerError(
            "no tokenizer in the model folder",
            seen=str(folder),
            expected="tiktoken.model with tokenizer_config.json, or tokenizer.json, or a ByteTokenizer's config",
            fix="copy the tokenizer files of the checkpoint into the folder",
        )
    if len(kinds) > 1:
        raise TokenizerError(
            "more than one tokenizer in the model folder",
            seen=" and ".join(kinds),
            expected="exactly one, because they may give different ids for the same text",
            fix="keep the files that the model was trained with and move the others away",
        )
    return next(iter(kinds.values()))(folder)


def tokenizer_if_any(folder: Path) -> Tokenizer | None:
    """The tokenizer of the model in `folder`, None where no file of one is there. Raises as `load_tokenizer`."""
    names = (tiktoken_model.FILE_NAME, tokenizer_json.FILE_NAME, "tokenizer_config.json")
    return load_tokenizer(folder) if any((folder / name).is_file() for name in names) else None
