"""Pictures drawn while training: the same whatever is drawn at once, and from the law that the policy stands for."""

from __future__ import annotations

import pytest
import torch
from toy import PROCESSES, ROWS, exact_gaussian

from diffalign.methods.base import Run
from diffalign.process import CLEAN, RectifiedFlow
from diffalign.rollouts import Sampler, jittered, repeated, roll_out


def times(process: str, steps: int) -> torch.Tensor:
    if isinstance(PROCESSES[process], RectifiedFlow):
        return torch.linspace(1, 0, steps + 1)
    return torch.cat([torch.linspace(999, 0, steps + 1)[:-1].round(), torch.tensor([CLEAN])])


def run(process: str, kind: str, mean: float = 0.5, seed: int = 0) -> Run:
    policy = exact_gaussian(PROCESSES[process], kind, mean, 0.5)
    return Run(policy, None, PROCESSES[process], kind, torch.Generator().manual_seed(seed),
               times=lambda steps: times(process, steps))  # fmt: skip


def condition(count: int) -> dict[str, torch.Tensor]:
    return {"prompt": torch.arange(count)}


@pytest.mark.parametrize(("process", "kind"), ROWS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_what_is_drawn_has_the_policys_law(process: str, kind: str, eta: float) -> None:
    state = run(process, kind)
    drawn = roll_out(state, state.policy, condition(4000), {}, (2,), Sampler(100, 1.0, eta, at_once=4000)).x
    assert drawn.shape == (4000, 2)
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03) and drawn.std().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_it_does_not_depend_on_how_many_are_drawn_at_once(eta: float) -> None:
    drawn = []
    for at_once in (1, 3, 8):
        state = run("vp", "epsilon")
        walk = roll_out(state, state.policy, condition(8), condition(8), (2,), Sampler(5, 3.0, eta, at_once),
                        record=True)  # fmt: skip
        assert walk.states is not None and walk.states.shape == (8, 6, 2)
        assert torch.equal(walk.states[:, -1], walk.x)
        drawn.append(walk)
    for other in drawn[1:]:
        torch.testing.assert_close(other.x, drawn[0].x)
        assert other.log_probs is not None and other.log_probs.shape == (8, 5)
        if eta:
            torch.testing.assert_close(other.log_probs, drawn[0].log_probs)


def test_a_picture_follows_from_the_runs_generator_alone() -> None:
    one, same, other = (
        roll_out(state, state.policy, condition(2), {}, (2,), Sampler(5, 1.0)).x
        for state in (run("vp", "epsilon", seed=seed) for seed in (0, 0, 1))
    )
    assert torch.equal(one, same) and not torch.equal(one, other)


@pytest.mark.parametrize("process", PROCESSES)
def test_jittered_times_fall_and_keep_their_ends(process: str) -> None:
    grid = times(process, 20)
    drawn = jittered(grid, 50, torch.Generator().manual_seed(0))
    assert drawn.shape == (21, 50)
    assert (drawn[0] == grid[0]).all() and (drawn[-1] == grid[-1]).all()
    assert (drawn[1:-1] >= grid[1:-1, None]).all() and (drawn[1:-1] < grid[:-2, None]).all()
    assert len(drawn[5].unique()) > 40


def test_a_walk_with_times_of_its_own_per_row_has_the_same_law() -> None:
    state = run("flow", "flow")
    own = jittered(times("flow", 100), 4000, state.generator)
    drawn = roll_out(state, state.policy, condition(4000), {}, (2,), Sampler(100, 1.0, at_once=1000), times=own).x
    assert drawn.mean().item() == pytest.approx(0.5, abs=0.03) and drawn.std().item() == pytest.approx(0.5, abs=0.03)


def test_rows_are_repeated_one_below_the_other() -> None:
    assert repeated(condition(2), 3)["prompt"].tolist() == [0, 0, 0, 1, 1, 1]
