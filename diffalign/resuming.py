"""The state of a run as a checkpoint: everything that is needed to go on bit for bit."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from diffalign import checkpoint as ckpt
from diffalign.distributed import placed_like, placed_optimizer, whole
from diffalign.recall import Recall
from diffalign.tracking import Pace, SkippedSteps

if TYPE_CHECKING:
    from diffalign.trainer import Trainer

log = logging.getLogger("diffalign")


def save(run: Trainer) -> None:
    """Writes a checkpoint of the run as it is; all ranks call this, the main one writes."""
    main = run.accelerator.is_main_process
    if isinstance(run.recall, Recall):
        run.recall.flush()  # first: a run that goes on from here is to find what was there at this step
    reference = run.reference.tensors() if run.reference is not None else {}
    chooser = run.data.chooser.tensors() if run.data.chooser else {}
    trainable, ema, best, optimizer = whole(
        [run.trained, run.ema.values, run.best.values, run.optimizer.state_dict()], main
    )
    if main:
        files = {"trainable": trainable, "ema": ema, "best": best, "reference": reference, "selection": chooser}
        ckpt.save_checkpoint(
            run.folder,
            run.step,
            tensors={stem: tensors for stem, tensors in files.items() if tensors},
            optimizer=optimizer,
            counters={"nonfinite": run.skipped.row, "nonfinite_total": run.skipped.total,
                      "alarm": [run.alarm.average, run.alarm.above, run.alarm.warned], "best": run.best.counters()},
        )  # fmt: skip
        ckpt.prune(run.folder, run.config.checkpoints_total_limit)
    run.accelerator.wait_for_everyone()


def restore(run: Trainer, folder: Path) -> None:
    """Brings a fresh run to where a checkpoint was written."""
    manifest = ckpt.read_manifest(folder)
    trainable, counters = ckpt.load_tensors(folder, "trainable"), manifest["counters"]
    with torch.no_grad():
        for name, parameter in run.trained.items():
            parameter.copy_(placed_like(trainable[name], parameter))
    if run.ema.values:
        run.ema.restore(ckpt.load_tensors(folder, "ema"))
    if "best.safetensors" in manifest["files"]:
        run.best.restore(ckpt.load_tensors(folder, "best"), counters["best"])
    if run.reference is not None and "reference.safetensors" in manifest["files"]:
        run.reference.restore(ckpt.load_tensors(folder, "reference"))
    if run.data.chooser and "selection.safetensors" in manifest["files"]:
        run.data.chooser.restore(ckpt.load_tensors(folder, "selection"))
    run.optimizer.load_state_dict(placed_optimizer(ckpt.load_optimizer(folder), run.parameters))
    run.step, run.pace = manifest["step"], Pace(manifest["step"])
    run.skipped = SkippedSteps(run.accelerator.device, counters["nonfinite_total"], counters["nonfinite"])
    run.alarm.average, run.alarm.above, run.alarm.warned = counters["alarm"]
    log.info("resumed from %s at step %d", folder, run.step)
