"""PAB against the schedule written out step by step."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from saccade.mechanisms.diffusion.pab import PAB

pytestmark = pytest.mark.quick


def run(mechanism: PAB, kind: str, timesteps: list[float]) -> tuple[list[int], list[int]]:
    """For each step the step whose computation it used, and the steps that computed."""
    computed: list[int] = []
    outputs: list[int] = []
    state = None
    for number, timestep in enumerate(timesteps):

        def compute(number: int = number) -> Tensor:
            computed.append(number)
            return torch.tensor(number)

        output, state = mechanism.step(state, timestep, kind, compute)
        outputs.append(int(output))
    return outputs, computed


def oracle(every: int, window: tuple[float, float], timesteps: list[float]) -> list[int]:
    """The step each step takes its output from."""
    source: list[int] = []
    for number, timestep in enumerate(timesteps):
        broadcast = window[0] < timestep < window[1] and number % every != 0
        source.append(source[-1] if broadcast else number)
    return source


@pytest.mark.parametrize(("steps", "window"), [(30, (100, 800)), (17, (450, 930)), (7, (0, 1001)), (9, (5, 5))])
@pytest.mark.parametrize(("kind", "every"), [("spatial", 2), ("temporal", 4), ("cross", 6)])
def test_matches_the_oracle(steps: int, window: tuple[float, float], kind: str, every: int) -> None:
    timesteps = [1000 - 1000 * i / steps for i in range(steps)]
    outputs, computed = run(PAB(window=window), kind, timesteps)
    expected = oracle(every, window, timesteps)
    assert outputs == expected
    assert computed == sorted(set(expected))


def test_by_hand() -> None:
    """Ten steps 950, 850, ... 50; inside the window are steps 2 to 8."""
    timesteps = [950.0 - 100 * i for i in range(10)]
    assert run(PAB(), "spatial", timesteps)[1] == [0, 1, 2, 4, 6, 8, 9]
    assert run(PAB(), "temporal", timesteps)[1] == [0, 1, 4, 8, 9]
    assert run(PAB(), "cross", timesteps)[1] == [0, 1, 6, 9]


def test_exact_setting_computes_every_step() -> None:
    timesteps = [950.0 - 100 * i for i in range(10)]
    for kind in ("spatial", "temporal", "cross"):
        assert run(PAB(**PAB.card.exact(10)), kind, timesteps)[1] == list(range(10))


def test_a_reused_output_is_the_same_tensor_and_a_fresh_state_starts_over() -> None:
    mechanism, outputs = PAB(), [torch.zeros(2), torch.ones(2)]
    first, state = mechanism.step(None, 500, "cross", lambda: outputs[0])
    again, later = mechanism.step(state, 490, "cross", lambda: outputs[1])
    assert again is first
    assert (state.count, later.count) == (1, 2)
    restarted, _ = mechanism.step(None, 480, "cross", lambda: outputs[1])
    assert restarted is outputs[1]
    repeated, _ = mechanism.step(state, 490, "cross", lambda: outputs[1])
    assert repeated is first


def test_bad_input() -> None:
    for name in ("spatial_range", "temporal_range", "cross_range"):
        with pytest.raises(ValueError, match=f"{name}=0: expected at least 1 step"):
            PAB(**{name: 0})
    with pytest.raises(ValueError, match=r"window=\(800, 100\): expected \(low, high\)"):
        PAB(window=(800, 100))
    with pytest.raises(ValueError, match="kind='mlp': expected one of"):
        PAB().step(None, 500, "mlp", lambda: torch.zeros(1))
