"""The noise processes against diffusers' schedulers, and the algebra of parametrizations."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from toy import ALPHAS, PROCESSES, ROWS, variance_preserving

from diffalign.process import (
    CLEAN,
    PARAMETRIZATIONS,
    RectifiedFlow,
    at_timesteps,
    endpoints,
    moved,
    target,
    time_weight,
)


def stock(prediction_type: str = "epsilon", **options: object) -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         prediction_type=prediction_type, **options)  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_schedule_is_stock() -> None:
    torch.testing.assert_close(ALPHAS, stock().alphas_cumprod, rtol=2e-5, atol=0)


def test_add_noise_is_stock() -> None:
    x0, eps = normal(5, 4, 8, 8), normal(5, 4, 8, 8, seed=1)
    t = torch.tensor([0, 1, 499, 500, 999])
    process = PROCESSES["vp"]
    torch.testing.assert_close(
        process.add_noise(x0, eps, t.float()), stock().add_noise(x0, eps, t), rtol=1e-5, atol=1e-5
    )


def test_velocity_target_is_stock() -> None:
    x0, eps, t = normal(3, 4, 8, 8), normal(3, 4, 8, 8, seed=1), torch.tensor([0, 500, 999])
    ours = target("v_prediction", x0, eps, *PROCESSES["vp"].coefficients(t.float()))
    torch.testing.assert_close(ours, stock().get_velocity(x0, eps, t), rtol=1e-5, atol=1e-5)


def test_flow_noise_is_stock() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x0, eps = normal(10, 4, 8, 8), normal(10, 4, 8, 8, seed=1)
    process = RectifiedFlow(shift=3.0)
    times = scheduler.sigmas[:-1]
    expected = scheduler.scale_noise(x0, scheduler.timesteps, eps)
    torch.testing.assert_close(process.add_noise(x0, eps, times), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(process.network_time(times), scheduler.timesteps, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_endpoints_invert_target(name: str, kind: str) -> None:
    process = PROCESSES[name]
    t = process.training_times(16, torch.Generator().manual_seed(0), low=0.05, high=0.95)
    x0, eps = normal(16, 4, 5, 5), normal(16, 4, 5, 5, seed=1)
    coefficients = process.coefficients(t)
    found = endpoints(kind, target(kind, x0, eps, *coefficients), process.add_noise(x0, eps, t), *coefficients)
    torch.testing.assert_close(found.x0, x0, rtol=0, atol=3e-4)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=3e-4)


def test_every_parametrization_is_solvable_on_both_processes() -> None:
    for process in PROCESSES.values():
        alpha, sigma = process.coefficients(process.training_times(50, torch.Generator().manual_seed(0), 0.1, 0.9))
        for row in PARAMETRIZATIONS.values():
            p, q = row(alpha, sigma)
            assert ((alpha * q - sigma * p).abs() > 1e-2).all()


def test_clean_is_the_final_alpha() -> None:
    alpha, sigma = variance_preserving(final=1.0).coefficients(torch.tensor([CLEAN]))
    assert (alpha.item(), sigma.item()) == (1.0, 0.0)
    alpha, _ = variance_preserving().coefficients(torch.tensor([CLEAN]))
    assert alpha.item() == pytest.approx(ALPHAS[0].sqrt().item())


@pytest.mark.parametrize("name", PROCESSES)
def test_training_times_respect_their_range_and_generator(name: str) -> None:
    process = PROCESSES[name]
    draws = [process.training_times(4000, torch.Generator().manual_seed(s), 0.25, 0.5) for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    fraction = process.fraction(draws[0])
    assert fraction.min() >= 0.249 and fraction.max() <= 0.501
    assert fraction.min() < 0.3 and fraction.max() > 0.45  # and reach its ends


def test_vp_times_are_uniform_over_all_integers() -> None:
    t = PROCESSES["vp"].training_times(200_000, torch.Generator().manual_seed(0))
    assert t.min() == 0 and t.max() == 999
    assert t.mean().item() == pytest.approx(499.5, abs=2)


def test_flow_times_are_logit_normal_and_shifted() -> None:
    t = RectifiedFlow(shift=3.0).training_times(200_000, torch.Generator().manual_seed(0))
    unshifted = t / (3 - 2 * t)
    assert torch.logit(unshifted).mean().item() == pytest.approx(0, abs=0.01)
    assert torch.logit(unshifted).std().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("name", "kind"), ROWS)
def test_time_weights_convert_errors(name: str, kind: str) -> None:
    """w(eps) |dy|^2 = |deps|^2 and w(x0) |dy|^2 = |dx0|^2 for two predictions at one x_t."""
    process = PROCESSES[name]
    t = process.training_times(8, torch.Generator().manual_seed(3), 0.1, 0.9)
    coefficients = process.coefficients(t)
    x_t, y, other = normal(8, 6), normal(8, 6, seed=1), normal(8, 6, seed=2)
    first, second = (endpoints(kind, v, x_t, *coefficients) for v in (y, other))
    for weight, end in (("eps", 1), ("x0", 0)):
        expected = (first[end] - second[end]).square().mean(1)
        found = time_weight(weight, kind, *coefficients) * (y - other).square().mean(1)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-5)


def test_flow_weights_are_the_closed_forms() -> None:
    t = torch.tensor([0.1, 0.5, 0.9])
    coefficients = PROCESSES["flow"].coefficients(t)
    torch.testing.assert_close(time_weight("eps", "flow", *coefficients), (1 - t) ** 2)
    torch.testing.assert_close(time_weight("x0", "flow", *coefficients), t**2)
    torch.testing.assert_close(time_weight("sigmoid", "flow", *coefficients), torch.sigmoid(2 * torch.log(t / (1 - t))))


def test_unknown_weight_is_named() -> None:
    with pytest.raises(ValueError, match="snr_clip.*'snr'"):
        time_weight("snr", "epsilon", *PROCESSES["vp"].coefficients(torch.tensor([5.0])))


TURBO = [249, 499, 749, 999]


def test_few_times_are_drawn_equally_often_and_no_other() -> None:
    """10,000 draws of four: 2500 each with a standard deviation of 43."""
    t = at_timesteps(PROCESSES["vp"], TURBO).training_times(10_000, torch.Generator().manual_seed(0))
    values, counts = t.unique(return_counts=True)
    assert t.dtype == torch.float32 and values.tolist() == TURBO
    assert (counts - 2500).abs().max() < 4 * 43


def test_few_times_of_a_flow_are_what_the_network_calls_them() -> None:
    process = at_timesteps(PROCESSES["flow"], [250, 1000])
    t = process.training_times(50, torch.Generator().manual_seed(0))
    assert t.unique().tolist() == [0.25, 1.0] and process.network_time(t).unique().tolist() == [250, 1000]


@pytest.mark.parametrize(("low", "high", "inside"), [(0.0, 0.5, TURBO[:2]), (0.5, 1.0, TURBO[2:]), (0.7, 0.8, [749])])
def test_the_methods_range_cuts_few_times(low: float, high: float, inside: list[int]) -> None:
    t = at_timesteps(PROCESSES["vp"], TURBO).training_times(200, torch.Generator().manual_seed(0), low, high)
    assert t.unique().tolist() == inside


def test_few_times_that_a_range_leaves_out_and_times_that_do_not_exist_are_refused() -> None:
    restricted = at_timesteps(PROCESSES["vp"], TURBO)
    with pytest.raises(ValueError, match="none of the train_timesteps lies in .* 0.0 to 0.2: .*at 0.249, 0.499"):
        restricted.training_times(1, torch.Generator(), 0.0, 0.2)
    for name, bad in (("vp", 1000), ("flow", 1001), ("vp", -1)):
        with pytest.raises(ValueError, match=f"expected times of the model, .* got {bad}"):
            at_timesteps(PROCESSES[name], [499, bad])


@pytest.mark.parametrize("name", PROCESSES)
def test_few_times_are_the_same_process_in_all_else(name: str) -> None:
    process = PROCESSES[name]
    t = process.training_times(64, torch.Generator().manual_seed(0))
    restricted = at_timesteps(process, [10, 900])
    for ours, theirs in zip(restricted.coefficients(t), process.coefficients(t), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(restricted.fraction(t), process.fraction(t))
    x0, eps = normal(64, 3), normal(64, 3, seed=1)
    assert torch.equal(restricted.add_noise(x0, eps, t), process.add_noise(x0, eps, t))
    torch.testing.assert_close(restricted.from_network_time(process.network_time(t)), t)


def test_the_refiners_range_is_the_first_fifth_of_all_times() -> None:
    t = PROCESSES["vp"].training_times(20_000, torch.Generator().manual_seed(0), high=0.2)
    assert (t.min(), t.max()) == (0, 200) and len(t.unique()) == 201


class Elsewhere:
    """A tensor that says where it lies and notes what is done to it; there is no GPU to lie on."""

    def __init__(self, device: str) -> None:
        self.device, self.done = torch.device(device), []  # type: ignore[var-annotated]

    def pin_memory(self) -> "Elsewhere":
        assert self.device.type == "cpu", "only what is on the CPU can be pinned"
        self.done.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> "Elsewhere":
        self.done.append(("to", device.type, non_blocking))
        return self


@pytest.mark.parametrize(
    ("here", "there", "done"),
    [
        ("cpu", "cuda", ["pinned", ("to", "cuda", True)]),
        ("cuda", "cuda", [("to", "cuda", False)]),
        ("cuda", "cpu", [("to", "cpu", False)]),
        ("cpu", "cpu", [("to", "cpu", False)]),
    ],
)
def test_only_what_is_on_the_cpu_is_pinned_on_its_way_to_a_gpu(here: str, there: str, done: list[object]) -> None:
    tensor = Elsewhere(here)
    moved(tensor, torch.device(there))  # type: ignore[arg-type]
    assert tensor.done == done
