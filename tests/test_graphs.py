"""Recorded work: fixed buffers, one recording per shape, gradients that add up. The recorder is a stand-in on a CPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from diffalign.graphs import Graphed, cuda_graph, graphed, named_tensors, with_tensors
from diffalign.methods.base import Noised

Replay = Callable[[], None]


class Recorder:
    """Replays by running again, after a warm-up, as a CUDA graph is recorded; it must find its buffers in place."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Replay) -> Replay:
        self.recorded += 1
        for _ in range(3):
            run()

        def replay() -> None:
            self.replayed += 1
            run()

        return replay


def noised(count: int, seed: int) -> Noised:
    g = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, count, 4, generator=g)
    condition = {"prompt_embeds": torch.randn(count, 4, generator=g)}
    return Noised(x, y, torch.rand(count, generator=g), condition, torch.ones(count))


def learner(weight: Tensor) -> Callable[[Noised], dict[str, Tensor]]:
    def learn(batch: Noised) -> dict[str, Tensor]:
        said = batch.x_t * weight + batch.condition["prompt_embeds"] * batch.t[:, None]
        loss = (said - batch.y).square().mean(1)
        loss.mean().backward()
        return {"loss": loss.detach()}

    return learn


def test_tensors_of_a_batch_go_out_and_in_by_name() -> None:
    batch = noised(3, 0)
    tensors = named_tensors(batch)
    assert list(tensors) == ["x_t", "y", "t", "condition.prompt_embeds", "label"]
    other = with_tensors(batch, {name: value + 1 for name, value in tensors.items()})
    assert torch.equal(other.condition["prompt_embeds"], batch.condition["prompt_embeds"] + 1)
    assert torch.equal(other.label, batch.label + 1)


def test_replaying_gives_the_results_and_gradients_of_running() -> None:
    weight, twin = torch.ones(4, requires_grad=True), torch.ones(4, requires_grad=True)
    recorder = Recorder()
    eager, replayed = learner(twin), graphed(learner(weight), [weight], recorder)
    kept = []
    for seed, count in enumerate((2, 3, 2, 2, 3)):
        batch = noised(count, seed)
        expected = eager(batch)["loss"]
        kept.append((replayed(batch)["loss"], expected))
    for ours, expected in kept:  # results are not overwritten by the next replay
        assert torch.equal(ours, expected)
    assert torch.equal(weight.grad, twin.grad)  # five microbatches, nothing of the warm-up
    assert (recorder.recorded, recorder.replayed) == (2, 5)


def test_gradients_stay_where_the_recording_writes_them() -> None:
    weight = torch.ones(4, requires_grad=True)
    learn = graphed(learner(weight), [weight], Recorder())
    learn(noised(2, 0))
    place = weight.grad
    weight.grad.zero_()
    learn(noised(2, 1))
    assert weight.grad is place and place.abs().sum() > 0


@pytest.mark.gpu
def test_a_cuda_graph_is_the_eager_step() -> None:
    weight, twin = (torch.ones(4, device="cuda", requires_grad=True) for _ in range(2))

    def work(w: Tensor) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
        def run(given: dict[str, Tensor]) -> dict[str, Tensor]:
            loss = (given["x"] * w).square().sum(1)
            loss.mean().backward()
            return {"loss": loss.detach()}

        return run

    replayed = Graphed(work(weight), [weight], cuda_graph)
    for seed in range(3):
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed)).cuda()
        torch.testing.assert_close(replayed({"x": x})["loss"], work(twin)({"x": x})["loss"])
    torch.testing.assert_close(weight.grad, twin.grad)
