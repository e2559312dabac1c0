"""The sampling loop: inversion, gradients through some steps, guidance, independence of the batch, replay."""

import pytest
import torch
from toy import PROCESSES, ROWS, exact_gaussian, variance_preserving

from diffalign.process import CLEAN
from diffalign.sampling import concatenate, ddim_stepper, draw, guided, sample

VP_TIMES = torch.cat([torch.linspace(951, 1, 20), torch.tensor([CLEAN])])
FLOW_TIMES = torch.linspace(1, 0, 21)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def times_of(name: str) -> torch.Tensor:
    return VP_TIMES if name == "vp" else FLOW_TIMES


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_every_parametrization_walks_the_same_path(name: str, kind: str) -> None:
    process = PROCESSES[name]
    x = draw((6,), generators(0, 1))
    paths = []
    for k in (kind, "epsilon" if name == "vp" else "flow"):
        policy = exact_gaussian(process, k, 1.0, 0.5)
        paths.append(sample(ddim_stepper(policy, process, k, {}), x, times_of(name), record=True).states)
    torch.testing.assert_close(*paths, rtol=1e-3, atol=1e-3)


def test_inversion_returns() -> None:
    process = variance_preserving(final=1.0)
    step = ddim_stepper(exact_gaussian(process, "epsilon", 1.0, 0.5), process, "epsilon", {})
    times = torch.cat([torch.tensor([CLEAN]), torch.linspace(1, 999, 500).round()])
    # data of the law itself; at CLEAN sigma is 0 and eps unknown, so inversion starts at the first noisy time
    x0 = 1.0 + 0.5 * draw((4,), generators(0, 1, 2))
    noise = sample(step, x0, times[1:]).x
    back = sample(step, noise, times[1:].flip(0)).x
    torch.testing.assert_close(back, x0, rtol=0, atol=0.02)
    assert (noise - x0).abs().mean() > 0.3


def test_gradient_reaches_only_the_window() -> None:
    process = PROCESSES["vp"]
    scales = torch.ones(20, requires_grad=True)
    plain = exact_gaussian(process, "epsilon", 1.0, 0.5)

    def policy(x, t, condition):  # type: ignore[no-untyped-def]
        index = int(((951 - t[0]) / 50).round())
        return plain(x, t, condition) * scales[index]

    x = draw((4,), generators(0))
    sample(ddim_stepper(policy, process, "epsilon", {}), x, VP_TIMES, grad_steps=range(17, 20)).x.sum().backward()
    assert scales.grad is not None
    assert (scales.grad[:17] == 0).all() and (scales.grad[17:] != 0).all()


def test_checkpointing_changes_memory_and_not_the_gradient() -> None:
    process = PROCESSES["vp"]
    gradients = []
    for checkpoint in (False, True):
        shift = torch.zeros(4, requires_grad=True)
        plain = exact_gaussian(process, "epsilon", 1.0, 0.5)
        step = ddim_stepper(lambda x, t, c: plain(x, t, c) + shift, process, "epsilon", {}, eta=0.5)  # noqa: B023
        x = sample(step, draw((4,), generators(0)), VP_TIMES, generators=generators(5), grad_steps=range(20),
                   checkpoint=checkpoint).x  # fmt: skip
        x.square().sum().backward()
        gradients.append(shift.grad)
    assert torch.equal(*gradients)


def test_noise_to_gradient_for_noise_optimization() -> None:
    process = PROCESSES["vp"]
    x = draw((4,), generators(0)).requires_grad_()
    step = ddim_stepper(exact_gaussian(process, "epsilon", 1.0, 0.5), process, "epsilon", {})
    sample(step, x, VP_TIMES, grad_steps=range(20)).x.sum().backward()
    assert x.grad is not None and (x.grad > 0).all()


def test_no_gradient_by_default() -> None:
    process = PROCESSES["vp"]
    x = draw((4,), generators(0)).requires_grad_()
    step = ddim_stepper(exact_gaussian(process, "epsilon", 1.0, 0.5), process, "epsilon", {})
    assert not sample(step, x, VP_TIMES).x.requires_grad


def test_a_sample_does_not_depend_on_its_batch_mates() -> None:
    process = PROCESSES["vp"]
    step = ddim_stepper(exact_gaussian(process, "epsilon", 1.0, 0.5), process, "epsilon", {}, eta=1.0)
    together = sample(step, draw((4,), generators(0, 1, 2)), VP_TIMES, generators=generators(10, 11, 12)).x
    for row, seed in enumerate((0, 1, 2)):
        alone = sample(step, draw((4,), generators(seed)), VP_TIMES, generators=generators(10 + seed)).x
        assert torch.equal(alone[0], together[row])


def test_record_replays_exactly() -> None:
    """The log-probability of a stored transition under the same policy is what the rollout recorded: ratio 1."""
    process = PROCESSES["vp"]
    step = ddim_stepper(exact_gaussian(process, "epsilon", 1.0, 0.5), process, "epsilon", {}, eta=1.0)
    walk = sample(step, draw((4,), generators(0, 1)), VP_TIMES, generators=generators(5, 6), record=True)
    assert walk.states is not None and walk.log_probs is not None
    assert walk.states.shape == (2, 21, 4) and walk.log_probs.shape == (2, 20)
    assert torch.equal(walk.states[:, -1], walk.x)
    for k in range(19):
        t, s = (VP_TIMES[i].expand(2) for i in (k, k + 1))
        again = step(walk.states[:, k], t, s).log_prob(walk.states[:, k + 1])
        assert torch.equal(again, walk.log_probs[:, k])


def test_guidance_is_one_call_and_the_right_line() -> None:
    calls = []

    def policy(x, t, condition):  # type: ignore[no-untyped-def]
        calls.append(len(x))
        return condition["c"].view(-1, 1).expand_as(x)

    x, t = torch.zeros(2, 3), torch.zeros(2)
    y = guided(policy, {"c": torch.tensor([1.0, 2.0])}, 3.0)(x, t, {"c": torch.tensor([5.0, 7.0])})
    assert calls == [4]
    torch.testing.assert_close(y[:, 0], torch.tensor([13.0, 17.0]))
    assert guided(policy, {}, 1.0) is policy


def test_concatenate_keeps_names() -> None:
    joined = concatenate({"a": torch.zeros(1, 2), "b": torch.ones(1)}, {"a": torch.ones(2, 2), "b": torch.zeros(2)})
    assert joined["a"].tolist() == [[0, 0], [1, 1], [1, 1]] and joined["b"].tolist() == [1, 0, 0]


def test_bad_calls_are_refused() -> None:
    step = ddim_stepper(exact_gaussian(PROCESSES["vp"], "epsilon", 1.0, 0.5), PROCESSES["vp"], "epsilon", {})
    with pytest.raises(ValueError, match="two times"):
        sample(step, torch.zeros(1, 4), VP_TIMES[:1])
    with pytest.raises(ValueError, match="one generator per sample"):
        sample(step, torch.zeros(2, 4), VP_TIMES, generators=generators(0))
