"""What a network is told of the person it draws for: a second cross-attention beside each one to the prompt.

    Z = Attn(Q, K, V) + Attn(Q, u Wk, u Wv)            PPD (arXiv 2501.06655), after IP-Adapter (arXiv 2308.06721)

u [B, N, D] are a user's tokens, Q the picture's own queries; only Wk and Wv are trained. In the U-Nets of SD and SDXL
every `attn2` has such a pair, in SD3's blocks every joint attention, whose picture tokens ask and whose prompt tokens
do not. The second attention of SD3.5's dual blocks, which is the picture's alone, has none.

Wv starts at zero, so the second term is zero and the network is the base, to the bit, until the first step; Wk starts
as Gaussian noise, or neither would ever get a gradient. There is no bias and u is brought to mean 0 and variance 1 per
token without weights (a tower's unit vectors and a language model's hidden states then need no other settings), so
u = 0 is nobody: it gives the base at any time.

The output projection that follows is affine, so what it makes of the second term is added behind the stock processor,
which stays as it is. That costs the queries and the output projection a second time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.sampling import Condition

USER = "user"  # the entry of a condition: [B, N, D]


class UserProjection(nn.Module):
    """Wk and Wv of one attention, from tokens of `width` to its `inner` channels."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.key = nn.Linear(width, inner, bias=False)
        self.value = nn.Linear(width, inner, bias=False)
        self._disable_adapters = False  # peft's own word, so that one switch turns LoRAs and this off

    def forward(self, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """(keys, values), each [B, heads, N, inner / heads], of tokens [B, N, width]."""
        x = F.layer_norm(tokens.to(self.key.weight.dtype), tokens.shape[-1:])
        keys, values = (w(x).unflatten(-1, (heads, -1)).transpose(1, 2) for w in (self.key, self.value))
        return keys, values


class Decoupled:
    """A diffusers attention processor with a user's term added to what it returns for the picture."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        *args: Any,
        ip_hidden_states: Tensor | None = None,
        **options: Any,
    ) -> Any:
        # diffusers hands a processor the keywords that its signature names, and drops this one in silence elsewhere
        out = self.processor(attn, hidden_states, encoder_hidden_states, *args, **options)
        if ip_hidden_states is None or attn.user._disable_adapters:
            return out
        more = user_term(attn, hidden_states, ip_hidden_states)
        if isinstance(out, tuple):  # joint attention: the picture, then the prompt
            return (out[0] + more.to(out[0].dtype), *out[1:])
        return out + more.to(out.dtype)


def user_term(attn: Any, hidden_states: Tensor, tokens: Tensor) -> Tensor:
    """W_out Attn(Q, u Wk, u Wv) [B, L, C] of picture tokens [B, L, C] and user tokens [B, N, D]."""
    query = attn.to_q(hidden_states).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    keys, values = (x.to(query.dtype) for x in attn.user(tokens, attn.heads))
    z = F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)
    return F.linear(z, attn.to_out[0].weight.to(z.dtype))


def decoupled_attentions(network: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, attention) of every attention of a network in which a picture looks at its prompt."""
    module: Any
    for name, module in network.named_modules():
        crossing = getattr(module, "is_cross_attention", False) or getattr(module, "added_kv_proj_dim", None)
        if hasattr(module, "set_processor") and crossing:
            yield name, module


def attach_projections(network: nn.Module, width: int, generator: torch.Generator) -> list[nn.Parameter]:
    """Gives every attention to a prompt its `UserProjection`, on its device, and returns their weights; Wv is 0."""
    made: list[nn.Parameter] = []
    for _, attn in list(decoupled_attentions(network)):
        projection = UserProjection(width, attn.inner_dim)
        nn.init.normal_(projection.key.weight, std=width**-0.5, generator=generator)
        nn.init.zeros_(projection.value.weight)
        attn.user = projection.to(attn.to_q.weight.device)
        attn.processor = Decoupled(attn.processor)
        made += projection.parameters()
    return made


def detach_projections(network: nn.Module) -> None:
    """Takes all of them off again."""
    for _, attn in list(decoupled_attentions(network)):
        if isinstance(attn.processor, Decoupled):
            attn.processor = attn.processor.processor
            del attn.user


def user_options(condition: Condition, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The keywords of a network's attentions for a condition that names a user, or None."""
    return {"ip_hidden_states": condition[USER].to(dtype)} if USER in condition else None


def with_user(condition: Condition, tokens: Tensor | None) -> Condition:
    """The condition of B pictures, all for one user of tokens [N, D], or each for its own, [B, N, D]."""
    if tokens is None:
        return condition
    if tokens.ndim == 3:
        return {**condition, USER: tokens}
    first = next(iter(condition.values()))
    return {**condition, USER: tokens.to(first.device).expand(len(first), *tokens.shape)}


def for_nobody(condition: Condition, tokens: Tensor | None) -> Condition:
    """The condition of the same shape that names nobody, u = 0: what guidance moves away from."""
    return with_user(condition, None if tokens is None else torch.zeros_like(tokens))
