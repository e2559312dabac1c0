"""The only training loop, and the only file that knows accelerate.

Everything random in a step follows from (seed, step, microbatch, rank), so a resumed run repeats what the killed one
would have done, bit for bit on a CPU; no generator state is saved.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from diffalign.checkpoint import until_sigterm
from diffalign.config import RunConfig
from diffalign.console import progress_bar
from diffalign.distributed import (
    announce,
    any_rank,
    clip,
    exchange,
    in_shards,
    spread,
    step_unless,
)
from diffalign.ema import Best, Ema
from diffalign.graphs import graphed
from diffalign.methods.base import Batch, Method, Noised, Run, spreads, updates_of
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.lora import without_adapters
from diffalign.recall import recalling
from diffalign.reference import evaluating
from diffalign.resuming import restore, save
from diffalign.run_folder import facts_of, save_result
from diffalign.sampling import Policy
from diffalign.schedules import learning_rate
from diffalign.seeds import mix
from diffalign.selection import Chooser
from diffalign.startup import Prepared, adamw, prepare_run
from diffalign.tracking import Averages, DisplacementAlarm, MetricsFile, Pace, RewardAlarm, SkippedSteps, peak_memory
from diffalign.validation import check_identity, held_out_metrics, logits

log = logging.getLogger("diffalign")


@dataclass(frozen=True)
class RunResult:
    """Where a run left its LoRA (or model), how far it came, and the last metrics that it logged."""

    folder: Path
    steps: int
    metrics: dict[str, float]
    interrupted: bool = False


def train(config: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> RunResult:
    """Trains as a config says: a packaged name, a path, or a mapping of its keys, with dotted `key=value` overrides.

    Raises:
        ValueError: bad config, data, model or combination, before anything is trained.
        RuntimeError: the loss stopped being finite, or the step-0 identity does not hold.
    """
    prepared = prepare_run(config, overrides)
    return Trainer(prepared).fit()


class Trainer:
    """State of one run: the network in training, its optimizer, the reference and the counters."""

    def __init__(self, prepared: Prepared) -> None:
        self.config: RunConfig = prepared.config
        self.method: Method = prepared.method
        self.draw_samples = prepared.draw_samples
        self.pipe: LatentPipeline = prepared.pipe
        self.data, self.score, self.reward_gradient = prepared.data, prepared.score, prepared.reward_gradient
        self.updates = updates_of(self.method)
        self.kept: dict[int, Any] = {}  # rollouts that several steps learn from, by microbatch
        self.folder = prepared.folder
        self.accelerator: Accelerator = prepared.accelerator
        self.reference = prepared.make_reference(self.pipe)
        self.base = without_adapters(self.pipe) if self.config.train == "lora" else None
        self.recall = recalling(self.config, self.reference, in_shards(self.accelerator))
        # DDP's hooks live in the wrapper, so the policy calls that; the reference, without gradient, calls the module
        wrapped = copy.copy(self.pipe)
        wrapped.network, self.optimizer = spread(
            self.accelerator, self.config, self.pipe.network, self.reference, partial(adamw, config=self.config)
        )
        self.wrapper, self.policy = wrapped.network, wrapped.predict
        self.trained = {name: p for name, p in self.pipe.network.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.step, self.ema = 0, Ema(self.trained, self.config.ema_decay)
        self.best = Best(self.trained, self.config.early_stopping_patience)
        self.averages, self.alarm, self.reward_alarm = Averages(), DisplacementAlarm(), RewardAlarm()
        self.skipped, self.pace = SkippedSteps(self.accelerator.device), Pace()
        self.recorded: dict[int, Callable[[Noised], dict[str, Tensor]]] = {}
        self.last: dict[str, float] = {}
        self.checkpoint = prepared.checkpoint
        if self.checkpoint:
            restore(self, self.checkpoint)
        self.metrics_file = MetricsFile(self.folder / "metrics.jsonl", self.step) if self._main else None

    def fit(self) -> RunResult:
        """Runs to max_train_steps, or to a SIGTERM, which saves and returns with interrupted=True."""
        if self.step == 0:
            self._validate()
        stopping, last = False, self.config.max_train_steps
        bar = progress_bar("training", last, done=self.step, hidden=not self._main)
        with until_sigterm() as received, bar as advance:
            while self.step < last and not stopping and not self.best.over:
                self._train_step()
                advance(1, self._shown())
                # a rollout that several steps learn from is not kept in checkpoints
                stopping = self._asked_to_stop(received) and self.step % self.updates == 0
                self._after_step(last=stopping or self.step == last)
        if self.best.over:
            log.info("stopped at step %d: no validation was better than that at step %d", self.step, self.best.step)
        self._save_result()
        self.accelerator.end_training()
        return RunResult(self.folder, self.step, self.last, interrupted=stopping)

    # -- one step ------------------------------------------------------------------------------------------------

    def _train_step(self) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * learning_rate(config, self.step)
        finite = []
        for micro in range(config.gradient_accumulation_steps):
            finite += self._backward(micro)
        norm = clip(self.accelerator, self.optimizer, self.parameters, config.max_grad_norm)
        # with fp16 gradients overflow while the scaler looks for its scale, and it skips those steps itself
        judged = finite if self.accelerator.scaler else [*finite, norm.isfinite()]
        skip = any_rank(self.accelerator, ~torch.stack(judged).all())
        step_unless(self.optimizer, self.parameters, skip)
        self.optimizer.zero_grad(set_to_none=not config.cuda_graph)  # a recording writes where it wrote before
        self.step += 1
        self.ema.update(self.step)
        if self.reference is not None:
            self.reference.after_step(self.step)
        self.skipped.update(skip)
        self.averages.add({"grad_norm": norm[None]})

    def _backward(self, micro: int) -> list[Tensor]:
        """Accumulates the gradient of one microbatch; whether each of its losses is finite, on the device.

        The backward pass runs either way: another rank would wait for this one's gradients for ever.
        """
        accelerator, config = self.accelerator, self.config
        # counted over ranks, so that n ranks draw what one process draws in n times as many microbatches
        seed = mix(config.seed, self.step, micro * accelerator.num_processes + accelerator.process_index, 0)
        torch.manual_seed(seed)  # LoRA dropout draws from the global generator
        common = torch.Generator().manual_seed(mix(config.seed, self.step, micro, 3))
        run = replace(self._run(self.policy, seed), held=partial(self._held, micro), common=common)
        finite = []
        with accelerator.autocast():
            with torch.no_grad(), evaluating(self.wrapper):
                batches = self.method.prepare(run, self._batch(micro, run))
            if self.step == micro == 0:
                check_identity(config, self.method, run, batches[0])
            for number, batch in enumerate(batches, 1):
                ends = micro + 1 == config.gradient_accumulation_steps and number == len(batches)
                announce(accelerator, self.wrapper, last=ends)
                with exchange(accelerator, self.wrapper, ends):
                    values = self._learning(run, len(batches) * config.gradient_accumulation_steps)(batch)
                time = values.pop("time")
                finite.append(values["loss"].mean().isfinite())
                self.averages.add(values, time)
        return finite

    def _learning(self, run: Run, share: int) -> Callable[[Noised], dict[str, Tensor]]:
        """The work of one microbatch that counts for 1 / share of a step: as it is, or recorded at its first call."""

        def learn(batch: Noised) -> dict[str, Tensor]:
            loss = self.method.loss(run, batch)
            self.accelerator.backward(loss.value.mean() / share)
            return {"loss": loss.value.detach(), "time": loss.time, **loss.metrics}

        if not self.config.cuda_graph:
            return learn
        if share not in self.recorded:
            self.recorded[share] = graphed(learn, self.parameters)
        return self.recorded[share]

    def _batch(self, micro: int, run: Run) -> Batch:
        config, accelerator = self.config, self.accelerator
        number, generator = self.step // self.updates * config.gradient_accumulation_steps + micro, run.common
        if not spreads(self.method):  # each rank has examples of its own
            number, generator = number * run.ranks + run.rank, run.generator
        return self.data.batch(number, generator, config.prompt_dropout, accelerator.device, self.step)

    def _run(self, policy: Policy, seed: int) -> Run:
        return Run(
            policy, self.reference, self.pipe.process, self.pipe.parametrization,
            torch.Generator().manual_seed(seed), times=self._times, score=self.score,
            reward_gradient=self.reward_gradient, gather=self.accelerator.gather, base=self.base, mean=self._mean,
            same=self.step == 0 and not self._starts_apart, step=self.step, remember=self.recall,
            ranks=self.accelerator.num_processes, rank=self.accelerator.process_index,
        )  # fmt: skip

    def _held(self, micro: int, updates: int, draw: Callable[[], Any]) -> Any:
        """What this microbatch drew at the first of so many updates on it."""
        if self.step % updates == 0 or micro not in self.kept:
            self.kept[micro] = draw()
        return self.kept[micro] if updates > 1 else self.kept.pop(micro)

    def _times(self, steps: int) -> Tensor:
        return self.pipe.times(steps).to(self.accelerator.device)

    def _mean(self, value: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(value, reduction="mean")
        return mean

    def _read(self) -> None:
        """Looks at what the device has computed since the last time, and waits for it to be done."""
        for metrics in self.averages.read():
            if "d_w" in metrics:
                self.alarm.update(metrics["d_w"].mean().item())
            if "missing" in metrics:
                missing, same = (metrics[n].mean().item() if n in metrics else 0.0 for n in ("missing", "same"))
                self.reward_alarm.update(missing, same)
        self.skipped.read(self.step, self.config.max_nonfinite_steps)

    def _after_step(self, last: bool) -> None:
        config = self.config
        logs = last or self.step % config.logging_steps == 0
        validates = last or (config.validation_steps and self.step % config.validation_steps == 0)
        saves = last or self.step % config.checkpointing_steps == 0
        if logs or saves or self._reading_is_free:
            self._read()
        if logs:
            pairs = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
            rate = self.optimizer.param_groups[0]["lr"]
            step = {"learning_rate": rate, "pairs_per_second": pairs * self.pace.steps_per_second(self.step)}
            self._log(self.averages.pop(gather_object) | step | peak_memory(self.accelerator.device))
        if self.data.chooser and self.data.chooser.due(self.step):
            self._measure_margins(self.data.chooser)
        if validates:
            self._validate()
        if saves or self.best.over:
            save(self)
        if logs or validates or saves:
            self.pace = Pace(self.step)

    # -- what is asserted, measured and written ------------------------------------------------------------------

    def _validate(self) -> None:
        """Held-out pairs with fixed noise, and pictures of fixed prompts and seeds."""
        seed = self.config.validation_seed
        batches = self.data.validation_batches(seed, self.accelerator.device)

        with evaluating(self.pipe.network), self.ema.in_place(), self.accelerator.autocast(), torch.no_grad():
            values = held_out_metrics(self.method, partial(self._probe, seed), batches, self.accelerator)
            self.best.update(self.step, values)
            self._log(values | self.draw_samples(self.pipe, self.folder / "samples" / f"step-{self.step:06d}.png"))

    def _probe(self, seed: int, number: int) -> Run:
        """A run without gradient whose noise follows from a batch's number; no gradients to exchange, so no wrapper."""
        return self._run(self.pipe.predict, mix(seed, 0, number, 0))

    def _measure_margins(self, chooser: Chooser) -> None:
        """The logits of all training examples, for a selection that goes by them."""
        seed, rows = self.config.seed, []
        with evaluating(self.pipe.network), self.accelerator.autocast(), torch.no_grad():
            for draw in range(chooser.selection.draws):
                latents = torch.Generator().manual_seed(mix(seed, draw, 0, 2))
                batches = self.data.all_batches(self.data.train, latents, self.accelerator.device)
                rows.append(logits(self.method, partial(self._probe, mix(seed, draw, 0, 1)), batches, self.accelerator))
        chooser.update(torch.stack(rows))

    def _log(self, values: dict[str, float]) -> None:
        if not values or not self._main:
            return
        self.last = {**self.last, **values}
        self.accelerator.log(values, step=self.step)
        assert self.metrics_file is not None
        self.metrics_file.write(self.step, values)

    def _save_result(self) -> None:
        """The LoRA (or the whole model) that the run is for, with averaged weights if they are kept."""
        with self.best.in_place() if self.best.values else self.ema.in_place():
            facts = facts_of(self.config, self.data, self.step)
            save_result(self.pipe, self.config, self.folder, facts, main=self._main)
        self.accelerator.wait_for_everyone()

    # -- small things --------------------------------------------------------------------------------------------

    @property
    def _main(self) -> bool:
        return self.accelerator.is_main_process

    @property
    def _starts_apart(self) -> bool:
        """Whether the run begins with a LoRA that its reference does not have."""
        return bool(self.config.init_lora) and self.config.reference_name == "adapter_off"

    @property
    def _reading_is_free(self) -> bool:
        """On a CPU nothing runs ahead of Python; on a GPU reading waits for all that is queued."""
        return self.accelerator.device.type == "cpu"

    def _asked_to_stop(self, received: Sequence[int]) -> bool:
        """Whether any rank got a SIGTERM: they stop together, or the others would wait for this one for ever."""
        if self.accelerator.num_processes == 1:
            return bool(received)
        if not self._reading_is_free and self.step % self.config.logging_steps:
            return False
        return bool(any_rank(self.accelerator, torch.tensor(bool(received), device=self.accelerator.device)))

    def _shown(self) -> str:
        """Beside the progress bar."""
        return "  ".join(f"{k} {self.last[k]:.3g}" for k in ("loss", "accuracy", "pairs_per_second") if k in self.last)
