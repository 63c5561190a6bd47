"""A run's tokenizer as files that transformers reads: the same text gives the same tokens there and here."""

import json
from typing import Any

from etils import epath

from lcx.errors import UserError

START, END = "<|start|>", "<|end|>"  # what tokens are called that have no name of their own
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"


def write_tokenizer(
    folder: epath.Path, name: str, start_token: int | None, end_token: int | None, max_length: int
) -> dict[str, int]:
    """Writes tokenizer.json and tokenizer_config.json.

    Args:
      folder: where to.
      name: "bytes", or the path of a `tokenizers` JSON file.
      start_token: what every encoding begins with, if anything.
      end_token: what stands for the end of a document, if anything; it serves as padding too.
      max_length: tokens of a training sequence.

    Returns the special tokens that there are, as config.json names them ("bos_token_id").
    """
    content = _bytes(end_token) if name == "bytes" else _file(name)
    special = {"bos": start_token, "eos": end_token, "pad": end_token}
    special = {kind: token for kind, token in special.items() if token is not None}
    names = {kind: _name(content, token, START if kind == "bos" else END) for kind, token in special.items()}
    content |= {"truncation": None, "padding": None, "post_processor": None}
    if start_token is not None:
        content["post_processor"] = _prefix(names["bos"], start_token)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "padding_side": "left",
        # Where a special token may not come from text, text that spells it is text.
        "split_special_tokens": name == "bytes" or start_token is not None,
    } | {f"{kind}_token": text for kind, text in names.items()}
    (folder / FILE).write_text(json.dumps(content, ensure_ascii=False) + "\n")
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return {f"{kind}_token_id": token for kind, token in special.items()}


def _file(name: str) -> dict[str, Any]:
    try:
        return json.loads(epath.Path(name).expanduser().read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"data.tokenizer: cannot read {name}: {error}.") from None


def _bytes(end_token: int | None) -> dict[str, Any]:
    """A tokenizer whose tokens are bytes; the byte that is the end token has that name."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    vocabulary = {_character(value): value for value in range(256) if value != end_token}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": level,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def _character(value: int) -> str:
    """The character that ByteLevel writes for a byte: printable ones stand for themselves, the rest from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    if value in printable:
        return chr(value)
    return chr(256 + sum(other not in printable for other in range(value)))


def _name(content: dict[str, Any], token: int, name: str) -> str:
    """What a token is called; one that has no name gets this one, and is a special token."""
    for added in content.get("added_tokens", []):
        if added["id"] == token:
            return added["content"]
    vocabulary = content["model"]["vocab"]
    known = vocabulary.items() if isinstance(vocabulary, dict) else ((pair[0], i) for i, pair in enumerate(vocabulary))
    found = next((text for text, number in known if number == token), None)
    if found is None:
        if not isinstance(vocabulary, dict):
            raise UserError(f"token {token} cannot be added to a tokenizer of type {content['model']['type']}.")
        vocabulary[name] = token  # so that it has this number and no other
        found = name
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": token, "content": found, "special": True} | flags)
    return found


def _prefix(name: str, token: int) -> dict[str, Any]:
    first, text = {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    pair = {"Sequence": {"id": "B", "type_id": 0}}
    special = {name: {"id": name, "ids": [token], "tokens": [name]}}
    return {
        "type": "TemplateProcessing",
        "single": [first, text],
        "pair": [first, text, pair],
        "special_tokens": special,
    }


def first_token(content: dict[str, Any]) -> int | None:
    """The special token that a tokenizer's own encodings begin with, if there is one."""
    processor = content.get("post_processor") or {}
    for each in [processor, *processor.get("processors", [])]:
        single = each.get("single") or [{}]
        name = single[0].get("SpecialToken", {}).get("id") if each.get("type") == "TemplateProcessing" else None
        if name is not None:
            return each["special_tokens"][name]["ids"][0]
    return None
