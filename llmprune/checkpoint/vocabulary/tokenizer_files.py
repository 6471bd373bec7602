"""Rewrite the files of a tokenizer, and every JSON file that names token ids, for a smaller vocabulary."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmprune.anatomy.vocabulary import named_ids, renumber
from llmprune.checkpoint.copied_files import CONFIG, is_tokenizer
from llmprune.checkpoint.vocabulary.sentencepiece_model import rewrite_pieces
from llmprune.common.files import apply_umask, fsync, read_json
from llmprune.data.vocabulary.rewrite import rewrite_state
from llmprune.data.vocabulary.segmentation import State, token_ids

TOKENIZER = "tokenizer.json"
_OTHER_TOKENS = "has the tokens of the whole vocabulary; tokenizer.json has those that are left"
_NO_TOKENS = ("tokenizer_config.json",)  # tokenizer files without a list of tokens, but perhaps with ids
_INDEX = ".index.json"


@dataclass(frozen=True)
class RewrittenFiles:
    """Files that name tokens. ``left_out``: those that could not be rewritten and were removed, with the reason."""

    rewritten: tuple[str, ...]
    left_out: dict[str, str]


def ids_in_files(folder: Path, tokens: int) -> set[int]:
    """Return the ids of tokens that the JSON files of a model's folder name in their fields."""
    files = (path for path in folder.glob("*.json") if not (is_tokenizer(path.name) and path.name not in _NO_TOKENS))
    return {index for path in files for index in named_ids(read_json(path), tokens)}


def rewrite_tokenizer_files(folder: Path, state: State, *, new_ids: Mapping[int, int], tokens: int) -> RewrittenFiles:
    """Rewrite the tokenizer files in a folder, in place; remove those that hold tokens in a form that is not written.

    ``state``: the tokenizer.json of the loaded tokenizer with all its tokens, which may have no such file. ``tokens``:
    their number in the model. Raises ModelError for settings of generation that are not read.
    """
    left_out, rewritten = {}, [TOKENIZER]
    kept = {token for token, index in token_ids(state).items() if index in new_ids}
    _write(folder / TOKENIZER, _tokenizer_json(folder, state, new_ids=new_ids))
    for path in sorted(folder.iterdir()):
        name = path.name
        if name in (TOKENIZER, CONFIG) or not path.is_file() or name.endswith(_INDEX):
            continue
        if is_tokenizer(name) and name not in _NO_TOKENS:
            if _rewrite_tokens(path, state, new_ids=new_ids, kept=kept):
                rewritten.append(name)
            else:
                path.unlink()
                left_out[name] = _OTHER_TOKENS
        elif path.suffix == ".json" and _rewrite_ids(path, new_ids=new_ids, tokens=tokens):
            rewritten.append(name)
    return RewrittenFiles(tuple(rewritten), left_out)


def _tokenizer_json(folder: Path, state: State, *, new_ids: Mapping[int, int]) -> State:
    """Return the new tokenizer.json: of the folder's own file where it has the loaded tokens, else of these."""
    own = read_json(folder / TOKENIZER)
    if isinstance(own, dict) and own.get("model", {}).get("type") == state["model"]["type"]:
        added = [entry["id"] for entry in own.get("added_tokens", [])]
        if token_ids(own) == token_ids(state) and all(index in new_ids for index in added):
            return rewrite_state(own, new_ids)
    return rewrite_state(state, new_ids)


def _rewrite_tokens(path: Path, state: State, *, new_ids: Mapping[int, int], kept: Collection[str]) -> bool:
    """Rewrite a file with a list of tokens or merges; False where its form is not known."""
    if path.name == "merges.txt":
        lines = path.read_text(encoding="utf-8").split("\n")
        pairs = [(line, line.split(" ")) for line in lines if not line.startswith("#version")]
        left = [line for line in lines if line.startswith("#version")]
        left += [line for line, pair in pairs if len(pair) != 2 or {*pair, "".join(pair)} <= set(kept)]
        path.write_text("\n".join(left), encoding="utf-8")
    elif path.suffix == ".model":
        return rewrite_pieces(path, state, new_ids=new_ids)
    elif path.name == "vocab.json":
        tokens = read_json(path)
        if not isinstance(tokens, dict) or not all(isinstance(index, int) for index in tokens.values()):
            return False
        _write(path, {token: new_ids[index] for token, index in tokens.items() if index in new_ids})
    else:
        return False
    return True


def _rewrite_ids(path: Path, *, new_ids: Mapping[int, int], tokens: int) -> bool:
    """Renumber the ids in a JSON file; False where it names none."""
    fields = read_json(path)
    changed = renumber(fields, new_ids, tokens=tokens)
    if path.name == "added_tokens.json" and isinstance(fields, dict):
        changed = {token: new_ids.get(index, index) for token, index in fields.items()}
    decoder = fields.get("added_tokens_decoder") if isinstance(fields, dict) else None
    if isinstance(decoder, dict):
        changed["added_tokens_decoder"] = {str(new_ids[int(index)]): entry for index, entry in decoder.items()}
    if changed == fields:
        return False
    _write(path, changed)
    return True


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    apply_umask(path)
    fsync(path)
