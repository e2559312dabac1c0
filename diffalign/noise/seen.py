"""What a method has looked at, and which of two looks is the better one, picture by picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.scores import Scores, joined


@dataclass(frozen=True)
class Seen:
    """Noise that was looked at.

    Attributes:
        noise: [B, C, h, w] that the walk starts from; [B, N + 1, C, h, w] with the noise of each of its N steps.
        latents: [B, C, h, w] where the walk ends, or is seen to be heading.
        pixels: [B, 3, H, W] in [0, 1] of these latents, without gradient.
        scores: of these pixels.
        ends: whether this is what the model makes of the noise, and not a look ahead on the way.
    """

    noise: Tensor
    latents: Tensor
    pixels: Tensor
    scores: Scores
    ends: bool = True

    def split(self, size: int) -> Iterator[Seen]:
        """So many rows at a time."""
        for start in range(0, len(self.noise), size):
            yield self.rows(slice(start, start + size))

    def rows(self, which: slice | Tensor) -> Seen:
        """Some of the rows."""
        terms = {name: term[which] for name, term in self.scores.terms.items()}
        scores = Scores(self.scores.total[which], terms, self.scores.weights)
        return replace(self, noise=self.noise[which], latents=self.latents[which], pixels=self.pixels[which],
                       scores=scores)  # fmt: skip


def stacked(parts: Sequence[Seen]) -> Seen:
    """One below the other."""
    noise, latents, pixels = (torch.cat([getattr(part, name) for part in parts])
                              for name in ("noise", "latents", "pixels"))  # fmt: skip
    return Seen(noise, latents, pixels, joined([part.scores for part in parts]), parts[0].ends)


def best_of(looks: Sequence[Seen]) -> Seen:
    """Of looks at the same B prompts each prompt's best; the first of equal ones, and one without a score loses."""
    totals = torch.stack([torch.nan_to_num(look.scores.total, nan=-torch.inf) for look in looks])
    count = totals.shape[1]
    return stacked(looks).rows(totals.argmax(0) * count + torch.arange(count, device=totals.device))


def improves(one: Seen, other: Seen) -> Tensor:
    """bool [B]: where the first has the larger total; one without a score has the lowest."""
    first, second = (torch.nan_to_num(seen.scores.total, nan=-torch.inf) for seen in (one, other))
    return first > second


def chosen(which: Tensor, one: Seen, other: Seen) -> Seen:
    """Row by row the first where `which` [B] says so, else the other."""
    count = len(which)
    return stacked([one, other]).rows(torch.arange(count, device=which.device) + count * ~which)
