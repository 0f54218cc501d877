"""A state as two halves: its tensors by name, and everything else as JSON that says where they belong.

A state is a tree of dicts (keys: strings or integers), lists and tuples whose leaves are tensors, strings,
numbers, booleans and None. `split` and `join` are each other's inverse, types included.
"""

from typing import Any

from torch import Tensor

TENSOR, TUPLE, INTEGER_KEYS = "$tensor", "$tuple", "$integer_keys"


def split(state: Any, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """JSON-able document and tensors by dotted path; raises TypeError naming the path of any other leaf."""
    tensors: dict[str, Tensor] = {}
    return _encode(state, path, tensors), tensors


def join(document: Any, tensors: dict[str, Tensor]) -> Any:
    """The state that `split` took apart."""
    if isinstance(document, list):
        return [join(item, tensors) for item in document]
    if not isinstance(document, dict):
        return document
    if TENSOR in document:
        return tensors[document[TENSOR]]
    if TUPLE in document:
        return tuple(join(item, tensors) for item in document[TUPLE])
    if INTEGER_KEYS in document:
        return {int(key): join(value, tensors) for key, value in document[INTEGER_KEYS].items()}
    return {key: join(value, tensors) for key, value in document.items()}


def names(document: Any) -> set[str]:
    """The names of all tensors a document refers to."""
    if isinstance(document, list):
        return set().union(*(names(item) for item in document))
    if isinstance(document, dict):
        return {document[TENSOR]} if TENSOR in document else names(list(document.values()))
    return set()


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
