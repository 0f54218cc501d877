import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmoe.checkpoint.tree import join_tree, merge_trees, select_paths, split_tree, tensor_names, tensor_paths

TEXT = st.text(st.characters(codec="utf-8", exclude_characters="."), max_size=5).filter(lambda s: not s.startswith("$"))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.integers(0, 3).map(lambda n: torch.arange(n))
)
STATES = st.dictionaries(
    TEXT.filter(bool),
    st.recursive(
        LEAVES,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(TEXT, inner, max_size=3)
            | st.dictionaries(st.integers(), inner, max_size=3)
        ),
        max_leaves=12,
    ),
    max_size=4,
)


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@settings(max_examples=150, deadline=None)
@given(STATES)
def test_join_undoes_split_through_json(state: dict) -> None:
    document, tensors = split_tree(state)
    document = json.loads(json.dumps(document))
    assert tensor_paths(document) == {name: name for name in tensors} and tensor_names(document) == set(tensors)
    assert same(join_tree(document, tensors), state)


def test_names_are_dotted_paths() -> None:
    x = torch.zeros(1)
    _, tensors = split_tree({"model": {"layer.0.weight": x}, "optimizer": {"state": {3: {"step": x}}, "list": [x]}})
    assert set(tensors) == {"model.layer.0.weight", "optimizer.state.3.step", "optimizer.list.0"}


def test_parts_of_a_state_merge_into_all_of_its_tensors_and_the_first_of_everything_else() -> None:
    x = torch.zeros(1)
    first, _ = split_tree({"model": {"a.b": x}, "optimizer": {"a.b": {"step": x}}, "trainer": {"step": 3, "list": [1]}})
    other, _ = split_tree(
        {"model": {"a.b": x, "c": x}, "optimizer": {"c": {"step": x}}, "trainer": {"step": 4, "own": 5}}
    )
    whole, _ = split_tree(
        {
            "model": {"a.b": x, "c": x},
            "optimizer": {"a.b": {"step": x}, "c": {"step": x}},
            "trainer": {"step": 3, "list": [1]},
        }
    )
    assert (
        merge_trees(first, other) == whole
        and merge_trees(other, first)["trainer"] == other["trainer"] != whole["trainer"]
    )


def test_a_pruned_document_keeps_what_is_not_a_tensor() -> None:
    x = torch.zeros(1)
    state = {"model": {"a": x, "b": {"c": x, "d": 1}}, "trainer": {"step": 3, "empty": {}}, "pairs": {1: (x, 2)}}
    document, tensors = split_tree(state)
    assert select_paths(document, {"model.a"}) == split_tree({"model": {"a": x}, "trainer": state["trainer"]})[0]
    kept = join_tree(select_paths(document, {"model.b.c", "pairs.1.0"}), tensors)
    assert kept == {"model": {"b": {"c": x, "d": 1}}, "trainer": state["trainer"], "pairs": {1: (x, 2)}}


@pytest.mark.parametrize(
    ("state", "sentence"),
    [
        ({"callbacks": {"seen": [np.int64(3)]}}, r"callbacks.seen.0 is a int64"),
        ({"a": {"b": {1, 2}}}, "a.b is a set"),
        ({"a": {"$tensor": 1}}, "a: a dict of a state has keys"),
        ({"a": {1: 0, "x": 0}}, "a: a dict of a state has keys"),
        ({"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, "a.b names two tensors"),
    ],
)
def test_what_does_not_fit_is_named(state: dict, sentence: str) -> None:
    with pytest.raises(TypeError, match=sentence):
        split_tree(state)
