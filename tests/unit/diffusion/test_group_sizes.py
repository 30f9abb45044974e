"""How many pictures a step takes."""

from services.diffusion.group_sizes import PROVEN_STEPS, GroupSizes
from services.diffusion.shapes import Shape

ONE, OTHER = (Shape(height=64, width=side, text_tokens=32) for side in (64, 128))


def test_no_shape_is_bounded_before_a_step_of_it_fails() -> None:
    sizes = GroupSizes()
    sizes.note_success(ONE, 4)
    sizes.note_failure(OTHER, 4)
    assert (sizes.most(ONE), sizes.most(OTHER)) == (None, 2)


def test_half_of_what_failed_may_fit_and_at_least_one() -> None:
    sizes = GroupSizes()
    sizes.note_failure(ONE, 5)
    assert sizes.most(ONE) == 2
    sizes.note_failure(ONE, 2)
    assert sizes.most(ONE) == 1


def test_one_more_is_tried_after_many_steps_of_as_many_as_fit() -> None:
    sizes = GroupSizes()
    sizes.note_failure(ONE, 4)
    for _ in range(PROVEN_STEPS - 1):
        sizes.note_success(ONE, 2)
        sizes.note_success(ONE, 1)  # says nothing of more
    assert sizes.most(ONE) == 2
    sizes.note_success(ONE, 2)
    assert sizes.most(ONE) == 3
    sizes.note_failure(ONE, 3)
    assert sizes.most(ONE) == 1


def test_what_is_forgotten_is_not_bounded() -> None:
    sizes = GroupSizes()
    sizes.note_failure(ONE, 4)
    sizes.forget()
    sizes.note_success(ONE, 2)
    assert sizes.most(ONE) is None
