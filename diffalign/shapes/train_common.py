"""What the training scripts of the shapes models share: a learner, its loop, and saving in one piece."""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.common import stock_warnings_off
from diffalign.writing import replacing, replacing_folder


class _Savable(Protocol):
    def save_pretrained(self, save_directory: str) -> object: ...


class Learner:
    """Modules that learn, their average, which is what ships, and the optimizer: one `update` at a time.

    `beside` learns with them and is not averaged. Of `args` it reads lr, steps, ema and out; a file beside that
    (OUT.state.pt) continues a killed run where it stopped.
    """

    def __init__(
        self,
        modules: nn.Module,
        args: argparse.Namespace,
        *,
        beside: nn.Module | None = None,
        weight_decay: float,
        warmup: int,
    ) -> None:
        self.modules, self.beside, self.args, self.warmup = modules, beside or nn.Identity(), args, warmup
        both = (*modules.parameters(), *self.beside.parameters())
        self.parameters = [parameter for parameter in both if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=args.lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        self.done = 0
        self.restart_average()

    def restart_average(self) -> None:
        """At the weights as they are."""
        self.average = {name: value.detach().clone() for name, value in self.modules.state_dict().items()}

    def update(self, value: Tensor) -> None:
        """One optimizer step down the gradient of `value`."""
        self.optimizer.param_groups[0]["lr"] = cosine_lr(self.args.lr, self.done, self.args.steps, self.warmup)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.done += 1
        update_ema(self.average, self.modules, min(self.args.ema, (1 + self.done) / (10 + self.done)))

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules have their averaged weights inside, and are in evaluation mode."""
        live = {name: value.clone() for name, value in self.modules.state_dict().items()}
        self.modules.load_state_dict(self.average)
        self.modules.eval()
        try:
            yield
        finally:
            self.modules.load_state_dict(live)
            self.modules.train()

    def save_state(self) -> None:
        """What a killed run goes on from."""
        state = {"done": self.done, "modules": [part.state_dict() for part in self._parts()], "average": self.average}
        with replacing(state_file(self.args.out)) as partial:
            torch.save(state, partial)

    def resume(self) -> bool:
        """True when there was a state to go on from.

        Raises:
            SystemExit: it is another model's.
        """
        file = state_file(self.args.out)
        if not file.exists():
            return False
        state = torch.load(file, map_location=self.parameters[0].device, weights_only=True)
        if shapes(state["average"]) != shapes(self.average):
            raise SystemExit(f"{file} is of another model; remove it, or give another --out")
        for part, values in zip(self._parts(), state["modules"], strict=True):
            part.load_state_dict(values)
        self.done, self.average = state["done"], state["average"]
        print(f"resumed at step {self.done}", flush=True)
        return True

    def _parts(self) -> tuple[nn.Module | torch.optim.Optimizer, ...]:
        return self.modules, self.beside, self.optimizer


def shapes(weights: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """By name."""
    return {name: value.shape for name, value in weights.items()}


def state_file(out: Path) -> Path:
    """Beside the folder that a script saves."""
    return out.with_name(out.name + ".state.pt")


def learn(
    learner: Learner,
    step: Callable[[], float | list[float]],
    save: Callable[[], None],
    report: Callable[[], None] | None = None,
    stop_at: int | None = None,
) -> None:
    """Steps until `args.steps`, or `stop_at` if that is less; tells errors and pace, saves and reports on the way."""
    args, start, first, errors = learner.args, time.time(), learner.done, []
    last = min(stop_at or args.steps, args.steps)
    while learner.done < last:
        errors.append(step())
        done = learner.done
        if done % 50 == 0:
            pace, mean = (time.time() - start) / (done - first), np.nanmean(errors[-50:], 0).round(5).tolist()
            print(f"step {done} error {mean} {pace:.3f} s/step", flush=True)
        if done % args.save_every == 0 or done == last:
            save()
        if report and (done % args.eval_every == 0 or done == last):
            report()


def half_precision(args: argparse.Namespace) -> torch.autocast:
    """Products in bf16 inside where `args.bf16` says so: 2.4 times as fast for a video VAE on CPUs with AMX."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.bf16)


def cosine_lr(peak: float, step: int, steps: int, warmup: int) -> float:
    """Linear warm-up to `peak`, then a cosine to zero at `steps`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@torch.no_grad()
def update_ema(average: Mapping[str, Tensor], model: nn.Module, decay: float) -> None:
    """average <- decay * average + (1 - decay) * model, in place, buffers included; `average` is a state dict."""
    for old, new in zip(average.values(), model.state_dict().values(), strict=True):
        if old.dtype.is_floating_point:
            old.lerp_(new.to(old.dtype), 1 - decay)
        else:
            old.copy_(new)


def save_atomically(model: _Savable, folder: Path) -> None:
    """Writes the model beside `folder` and renames: a kill leaves the old folder or the new one, never half of one."""
    with replacing_folder(folder) as partial:
        model.save_pretrained(str(partial))
        for file in partial.rglob("*.json"):
            _forget_origin(file)


def _forget_origin(file: Path) -> None:
    """Removes `_name_or_path`, the folder on this machine that a part was loaded from: a shipped file must not tell."""
    text = file.read_text(encoding="utf-8")
    values = json.loads(text)
    if isinstance(values, dict) and "_name_or_path" in values:
        del values["_name_or_path"]
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


class Halved:
    """Saves a pipeline as a stock folder: network and VAE in fp16, the text encoders in fp32.

    transformers 5 loads a model in the dtype of its file while diffusers loads in fp32, so a text encoder in fp16 would
    make a mixed pipeline that fails at its first call.
    """

    def __init__(self, pipe: LatentPipeline) -> None:
        self.pipe = pipe

    def save_pretrained(self, save_directory: str) -> None:
        stock = copy.copy(self.pipe.stock)  # cast in place, tables that are in no file would lose digits for good
        with stock_warnings_off():  # that some parts are cast which diffusers loads in fp32: so it will, from fp16
            for name in (self.pipe.lora_prefix, "vae"):
                stock.register_modules(**{name: copy.deepcopy(getattr(stock, name)).to(torch.float16)})
            stock.save_pretrained(save_directory)
