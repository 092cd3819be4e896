import math

import pytest
import torch

from calm.functional.flow import flow_matching_loss, integrate_flow, straight_path


def test_a_constant_velocity_is_followed_exactly():
    noise, clean = torch.randn(5, 3), torch.randn(5, 3)
    for solver in ("euler", "midpoint"):
        end = integrate_flow(lambda _x, _time: clean - noise, noise, 4, solver)
        torch.testing.assert_close(end, clean)


def test_the_midpoint_solver_is_of_second_order_and_euler_of_first():
    def error(steps, solver):
        end = integrate_flow(lambda x, time: x * (1 + time), torch.ones(1, dtype=torch.float64), steps, solver)
        return abs(end.item() - math.exp(1.5))

    assert error(10, "euler") / error(20, "euler") == pytest.approx(2, abs=0.3)
    assert error(10, "midpoint") / error(20, "midpoint") == pytest.approx(4, abs=0.6)


def test_the_loss_is_zero_for_the_true_velocity():
    noise, clean, time = torch.randn(5, 3), torch.randn(5, 3), torch.rand(5)
    assert flow_matching_loss(clean - noise, noise, clean).max() == 0
    assert flow_matching_loss(clean, noise, clean).min() > 0
    torch.testing.assert_close(straight_path(noise, clean, torch.ones(5)), clean)
    torch.testing.assert_close(straight_path(noise, clean, torch.zeros(5)), noise)
    assert straight_path(noise, clean, time).shape == (5, 3)


def test_an_unknown_solver_is_refused():
    with pytest.raises(ValueError, match="solver must be one of midpoint, euler, got 'heun'"):
        integrate_flow(lambda x, _: x, torch.ones(1), 4, "heun")
