"""What the log of a run says of the steps since its last line."""

import numpy as np
import pytest

from omnicodec_jax.training.step_window import StepWindow

pytestmark = pytest.mark.quick


def test_a_metric_that_not_every_step_has_is_averaged_over_those_that_have_it():
    window = StepWindow()
    window.add({"mel": np.array(1.0)})
    window.add({"mel": np.array(3.0), "usage": np.array([0.5, 1.0])})
    means, steps, _ = window.means()
    assert (means["mel"], steps) == (2.0, 2)
    np.testing.assert_array_equal(means["usage"], [0.5, 1.0])


def test_a_window_begins_anew_when_its_means_have_been_taken():
    window = StepWindow()
    window.add({"mel": np.array(1.0)})
    window.means()
    window.add({"mel": np.array(5.0)})
    assert window.means().metrics == {"mel": 5.0}


def test_time_of_validation_does_not_count_as_time_of_steps():
    window = StepWindow()
    window.leave_out(1000.0)
    assert window.means().seconds < 0
