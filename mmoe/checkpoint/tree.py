"""Splits a state into two halves: its tensors by name, and everything else as JSON that says where they belong.

A state is a tree of dicts (keys: strings or integers), lists and tuples whose leaves are tensors, strings,
numbers, booleans and None. `split` and `join` are each other's inverse, types included.

Where processes hold different parts of a state (pipeline stages), its dicts may have different keys on each of
them; lists and tuples are the same on all.
"""

from collections.abc import Iterable, Set
from typing import Any

from torch import Tensor

TENSOR, TUPLE, INTEGER_KEYS = "$tensor", "$tuple", "$integer_keys"


def split_tree(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Split `state` into a document that JSON can hold and its tensors by dotted path.

    Raises TypeError naming the path of any other leaf.
    """
    tensors: dict[str, Tensor] = {}
    return _encode(state, path, tensors), tensors


def join_tree(document: Any, tensors: dict[str, Tensor]) -> Any:
    """Rebuild the state that `split` took apart into `document` and `tensors`."""
    if isinstance(document, list):
        return [join_tree(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    if TENSOR in document:
        return tensors[document[TENSOR]]
    if TUPLE in document:
        return tuple(join_tree(item, tensors) for item in document[TUPLE])
    if INTEGER_KEYS in document:
        return {int(key): join_tree(value, tensors) for key, value in document[INTEGER_KEYS].items()}
    return {key: join_tree(value, tensors) for key, value in document.items()}


def tensor_paths(document: Any, path: str = "") -> dict[str, str]:
    """Map the dotted path of every reference to a tensor in `document` to the tensor's name; equal after `split`."""
    if isinstance(document, dict):
        if TENSOR in document:
            return {path: document[TENSOR]}
        if TUPLE in document or INTEGER_KEYS in document:
            (within,) = document.values()
            return tensor_paths(within, path)
        children: Iterable[tuple[Any, Any]] = document.items()
    elif isinstance(document, list):
        children = enumerate(document)
    else:
        return {}
    nested = (tensor_paths(value, f"{path}.{key}" if path else str(key)) for key, value in children)
    return {place: name for part in nested for place, name in part.items()}


def check_document(document: Any, path: str = "") -> None:
    """Check that `document` is what `split` writes; raises ValueError naming the path of whatever is not."""
    if isinstance(document, list):
        for number, item in enumerate(document):
            check_document(item, f"{path}.{number}")
    if not isinstance(document, dict):
        return
    for mark, kind in ((TENSOR, str), (TUPLE, list), (INTEGER_KEYS, dict)):
        if mark in document and (len(document) > 1 or not isinstance(document[mark], kind)):
            raise ValueError(f"{path} has {mark!r} where none belongs")
    if TENSOR in document:
        return
    if INTEGER_KEYS in document and not all(key.removeprefix("-").isdecimal() for key in document[INTEGER_KEYS]):
        raise ValueError(f"{path} has keys that are no integers")
    for key, value in document.items():
        check_document(value, f"{path}.{key}" if path else key)


def tensor_names(document: Any) -> set[str]:
    """Return the names of all tensors that `document` refers to."""
    return set(tensor_paths(document).values())


def merge_trees(document: Any, other: Any) -> Any:
    """Return `document` with the tensors that only `other` refers to; all that is not a tensor is as in `document`."""
    if not (isinstance(document, dict) and isinstance(other, dict)):
        return document
    both = {key: merge_trees(value, other[key]) if key in other else value for key, value in document.items()}
    return both | {key: value for key, value in other.items() if key not in document and tensor_names(value)}


def select_paths(document: Any, kept: Set[str]) -> Any:
    """Return `document` without the entries of its dicts that refer to tensors, but to none of the names `kept`."""
    if not isinstance(document, dict) or TENSOR in document:
        return document
    held = {key: tensor_names(value) for key, value in document.items()}
    return {key: select_paths(value, kept) for key, value in document.items() if not held[key] or held[key] & kept}


def _encode(state: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(state, Tensor):
        if path in tensors:
            raise TypeError(f"{path} names two tensors of the state; a key with dots stands beside a nested dict")
        tensors[path] = state
        return {TENSOR: path}
    if state is None or isinstance(state, str | int | float):
        return state
    if isinstance(state, list | tuple):
        items = [_encode(item, f"{path}.{number}", tensors) for number, item in enumerate(state)]
        return items if isinstance(state, list) else {TUPLE: items}
    if isinstance(state, dict):
        kinds = {type(key) for key in state}
        if kinds <= {str} and not any(key.startswith("$") for key in state):
            return {key: _encode(value, f"{path}.{key}" if path else key, tensors) for key, value in state.items()}
        if kinds == {int}:
            return {INTEGER_KEYS: {str(key): _encode(value, f"{path}.{key}", tensors) for key, value in state.items()}}
        raise TypeError(
            f"{path}: a dict of a state has keys that are all strings (without a leading $) or all integers"
        )
    raise TypeError(f"{path} is a {type(state).__name__}; a state holds tensors, strings, numbers, booleans and None")
