"""The loop needs the bundled desk; that it closes is asserted in chapter 4, on the course's own model."""

import pytest

from slmops_course.operations.loop import _right, close_loop
from slmops_course.tasks import TaskError


def test_a_task_that_the_new_product_does_not_fit_is_refused_before_anything_is_built(course):
    with pytest.raises(TaskError, match="does not fit the task tiny_desk"):
        close_loop(course)
    assert not list(course.store.root.glob("loop-*"))


def test_a_day_without_messages_of_a_kind_has_no_score():
    assert _right([]) is None
