"""One batch per view, of which every method of that view has the same to learn.

Of prompt 0 what is around +1 is better than what is around -1, and of prompt 1 the other way round, so that under each
view a policy's means (`toy.Denoiser`) should move towards +1 and -1. Prompts 2 and 3 are captions of losers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from toy import PROCESSES, Denoiser, sampling_times

from diffalign.methods import METHODS
from diffalign.methods.base import Batch, Method, Run, pair_batch
from diffalign.sampling import Condition
from diffalign.scores import Scores, known, scores_of
from diffalign.table import build, split_section

PROMPTS = 5
EMPTY = 4  # the empty prompt


def sides(count: int, seed: int, shape: tuple[int, ...] = (3,)) -> tuple[Tensor, Tensor, Condition]:
    """Better and worse samples [count, *shape], and the condition."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.arange(count) % 2
    side = (1.0 - 2.0 * prompt).view(-1, *[1] * len(shape))
    noise = torch.randn(2, count, *shape, generator=g) * 0.3
    return side + noise[0], -side + noise[1], {"prompt": prompt}


def pairs(count: int, seed: int = 0, label: float = 1.0) -> Batch:
    better, worse, condition = sides(count, seed)
    condition |= {"user": torch.ones(count, 1, 2)}  # the toy is told of users, and does not listen
    batch = pair_batch(better, worse, condition, torch.full((count,), label))
    return replace(batch, negative=condition | {"prompt": torch.full((count,), EMPTY)}, shape=(3,),
                   prompts=tuple(map(str, condition["prompt"].tolist())))  # fmt: skip


def winners(count: int, seed: int = 0) -> Batch:
    batch = pairs(count, seed)
    return replace(batch, members=batch.members[:1], conditions=batch.conditions[:1])


def prompts(count: int, seed: int = 0) -> Batch:
    """For methods that draw their own pictures."""
    batch = pairs(count, seed)
    return replace(batch, members=(), conditions=batch.conditions[:1])


def lists(count: int, seed: int = 0) -> Batch:
    """Four pictures each: the last two as good as each other, so that there is a tie in every list."""
    better, worse, condition = sides(count, seed)
    members = (better, 0.5 * better, worse, worse.roll(2, 0))
    scores = torch.tensor([1.0, 2 / 3, 0.0, 0.0]).expand(count, 4)
    return Batch(members, (condition,) * 4, torch.ones(count), scores)


def thumbs(count: int, seed: int = 0) -> Batch:
    """Liked and disliked pictures by turns, two of each prompt after the other."""
    better, worse, condition = sides(count, seed)
    liked = (torch.arange(count) // 2 % 2 == 0).float()
    pictures = torch.where(liked[:, None] > 0, better, worse)
    return Batch((pictures,), (condition,), liked, liked[:, None])


def captioned_pairs(count: int, seed: int = 0) -> Batch:
    batch = pairs(count, seed)
    other = batch.condition | {"prompt": batch.condition["prompt"] + 2}
    return replace(batch, conditions=(batch.condition, other))


def perturbed(count: int, seed: int = 0) -> Batch:
    """One picture under its own prompt and under the other one."""
    better, _, condition = sides(count, seed)
    other = {"prompt": 1 - condition["prompt"]}
    return Batch((better, better), (condition, other), torch.ones(count), torch.ones(count, 2))


def labeled_clips(count: int, seed: int = 0) -> Batch:
    """Clips of four latent frames and two segments: the second member is better in the second one."""
    better, worse, condition = sides(count, seed, (3, 4, 1, 1))
    late = torch.arange(4).view(1, 1, 4, 1, 1) >= 2
    batch = pair_batch(torch.where(late, worse, better), torch.where(late, better, worse), condition, torch.ones(count))
    return replace(batch, signs=torch.tensor([1.0, -1.0]).expand(count, 2))


def labeled_parts(count: int, seed: int = 0) -> Batch:
    """Pictures of 4 x 4 places under a map of 2 x 2 regions: better left above, worse right above, a tie below."""
    better, worse, condition = sides(count, seed, (3, 4, 4))
    place = torch.arange(4)
    right, below = (place >= 2).view(1, 1, 1, 4), (place >= 2).view(1, 1, 4, 1)
    first = torch.where(below, torch.zeros(()), torch.where(right, worse, better))
    second = torch.where(below, torch.zeros(()), torch.where(right, better, worse))
    batch = pair_batch(first, second, condition, torch.ones(count))
    return replace(batch, signs=torch.tensor([[1.0, -1.0], [0.0, 0.0]]).expand(count, 2, 2))


BATCHES: dict[str, Callable[[int, int], Batch]] = {
    "pairs": pairs,
    "user_pairs": pairs,
    "winners": winners,
    "prompts": prompts,
    "lists": lists,
    "thumbs": thumbs,
    "captioned_pairs": captioned_pairs,
    "perturbed": perturbed,
    "labeled_parts": labeled_parts,
}


def batch_for(method: Method, count: int, seed: int = 0) -> Batch:
    """As the method's view shows the data."""
    return BATCHES[split_section(method.view, "view")[0]](count, seed)


BETA = 20.0  # of the toy: its errors are O(1), not O(1e-4)
WALKS = {"steps": 4, "guidance": 1.0, "at_once": 4096}  # of methods that draw: short ones, all at once
TOY: dict[str, dict[str, object]] = {  # what a method has here, unless a variant says otherwise
    "sft": {},
    "kto": {"beta": 10.0},  # without DPO's 1/2
    "tkto": {"beta": 10.0},
    "capo": {"beta": 2.0},  # its target is within 1
    "mapo": {"beta": 0.1},  # no reference
    "inversion_dpo": {"steps": 10, "sampled": 2},
    "seppo": {"beta": BETA, **WALKS},
    "spin": {"beta": BETA, **WALKS},
    "online_dpo": {"beta": BETA, **WALKS},
    "dro": {"steps": 4, "margin": 0.1},
    **{name: {"group": 4, **WALKS} for name in ("d3po", "prdp", "ddpo", "grpo", "pref_grpo", "nft", "dpok")},
    **dict.fromkeys(("alignprop", "draft", "draft_lv"), WALKS),
    "refl": {"late": 2, "goal": None, **WALKS},
    "drtune": {"late": 1, "trained": 2, **WALKS},
}


def toy_method(section: Mapping[str, object]) -> Method:
    """A method with hyper-parameters that suit the toy."""
    return build(METHODS, {**TOY.get(str(section["name"]), {"beta": BETA}), **section}, what="method")


def networks(process: str, kind: str) -> tuple[Denoiser, Denoiser]:
    return tuple(Denoiser(PROCESSES[process], kind, PROMPTS) for _ in range(2))  # type: ignore[return-value]


def run(policy: Denoiser, reference: Denoiser, seed: int = 0) -> Run:
    return Run(policy, reference, policy.process, policy.kind, torch.Generator().manual_seed(seed),
               times=partial(sampling_times, policy.process), score=lambda *a: known(toy_scores(*a)),
               reward_gradient=toy_gradient, base=reference)  # fmt: skip


def toy_scores(latents: torch.Tensor, prompts: Sequence[str]) -> Scores:
    """What `pairs` means by better: around +1 for prompt 0, around -1 for prompt 1."""
    side = torch.tensor([1.0 - 2.0 * int(prompt) for prompt in prompts])
    return scores_of({"toy": -(latents - side[:, None]).square().sum(1)}, {"toy": 1.0})


@torch.enable_grad()
def toy_gradient(latents: torch.Tensor, prompts: Sequence[str]) -> tuple[Scores, torch.Tensor]:
    """The same with its slope."""
    leaf = latents.detach().requires_grad_()
    scores = toy_scores(leaf, prompts)
    return scores, torch.autograd.grad(scores.total.sum(), leaf)[0]
