"""tools/same_numbers.py: what counts as a difference between two trainings."""

from typing import Any

import pytest

from tests.conftest import REPOSITORY, load_script

same_numbers = load_script(REPOSITORY / "tools" / "same_numbers.py")


def records(**changed: Any) -> list[dict[str, Any]]:
    first = {"step": 1, "loss": 2.5, "loss_ce": 1.5, "lr": 1e-3, "grad_norm": 0.25, "digest": "ab", "seconds": 1.0}
    return [first, first | {"step": 2} | changed]


def test_equal_trainings_have_no_difference_whatever_their_speed() -> None:
    found, alone, compared = same_numbers.differences(records(), records(seconds=9.0))
    assert (found, alone, compared) == ([], set(), 10)


@pytest.mark.parametrize("changed", [{"loss": 2.5000000000000004}, {"loss_ce": 1.0}, {"digest": "ac"}, {"step": 3}])
def test_the_last_bit_of_a_loss_a_digest_and_a_missing_step_are_differences(changed: dict[str, Any]) -> None:
    found, _, _ = same_numbers.differences(records(), records(**changed))
    assert len(found) == 1 and next(iter(changed)) in found[0]


def test_a_term_that_one_tree_alone_records_is_named_and_no_difference() -> None:
    found, alone, _ = same_numbers.differences(records(), records(loss_new=1.0))
    assert found == [] and alone == {"loss_new"}


def test_the_data_of_a_recipe_lies_in_the_folder_of_its_side_and_its_texts_come_from_the_old_tree(tmp_path) -> None:
    side = same_numbers.Side("new", REPOSITORY, tmp_path)
    recipe = (REPOSITORY / "configs" / "text_moe.yaml").read_text().replace("mmoe/losses/total.py", "mmoe/moved.py")
    (tmp_path / "old" / "configs").mkdir(parents=True)
    (tmp_path / "old" / "configs" / "text_moe.yaml").write_text(recipe)
    places = list(side._places(REPOSITORY / "configs" / "text_moe.yaml", "text_moe", tmp_path / "old"))
    assert f"data.sources.guide.shards={tmp_path}/text_moe/guide" in places
    assert f"data.sources.guide.input={tmp_path}/old/docs/guide.md" in places
    assert f"data.sources.losses.input={tmp_path}/old/mmoe/moved.py" in places  # where the old tree has it
    assert f"tokenizers.text.path={tmp_path}/text_moe/text.json" in places
