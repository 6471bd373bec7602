"""A tokenizer.json with fewer tokens, whose ids are the ranks of the kept ones."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from llmprune.data.vocabulary.segmentation import State, merges_of, token_ids

NewIds = Mapping[int, int]  # new id of each kept token, by its old one


def rewrite_state(state: State, new_ids: NewIds) -> State:
    """Return a tokenizer.json in which only the kept tokens are left, under their new ids.

    A merge stays where both of its tokens and its result stay.
    """
    result = copy.deepcopy(state)
    model, old = result["model"], token_ids(state)
    if isinstance(model["vocab"], dict):
        model["vocab"] = {token: new_ids[index] for token, index in old.items() if index in new_ids}
        pairs = (pair for pair in merges_of(state) if all(part in model["vocab"] for part in (*pair, "".join(pair))))
        model["merges"] = [list(pair) for pair in pairs]
    else:
        model["vocab"] = [piece for index, piece in enumerate(model["vocab"]) if index in new_ids]
        if model.get("unk_id") is not None:
            model["unk_id"] = new_ids[model["unk_id"]]
    for entry in result["added_tokens"]:
        entry["id"] = new_ids[entry["id"]]
    _renumber(result.get("post_processor"), new_ids)
    if result.get("padding"):
        result["padding"]["pad_id"] = new_ids[result["padding"]["pad_id"]]
    return result


def _renumber(part: Any, new_ids: NewIds) -> None:
    """Renumber the special tokens of a post-processor, in place: its ``ids``, ``sep`` and ``cls``."""
    if isinstance(part, list):
        for one in part:
            _renumber(one, new_ids)
    if not isinstance(part, dict):
        return
    for key, value in part.items():
        if key == "ids":
            part[key] = [new_ids[index] for index in value]
        elif key in ("sep", "cls") and isinstance(value, list) and len(value) == 2 and isinstance(value[1], int):
            part[key] = [value[0], new_ids[value[1]]]
        else:
            _renumber(value, new_ids)
