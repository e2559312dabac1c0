"""`diffalign doctor`: what this machine has, and what is missing, with the fix beside it."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from huggingface_hub import constants
from packaging.requirements import Requirement

from diffalign.assets import asset
from diffalign.config import load_config, packaged_configs
from diffalign.console import Result
from diffalign.pipelines import SHIPPED, load_pipeline

LEAST_DISK = 5  # GB
SHIPPED_FILES = ("prompts/shapes-heldout.jsonl", "shapes-pairs.parquet", "tiny-clip", *SHIPPED)


@dataclass(frozen=True)
class Finding:
    """One line of the report; `fix` says what to do when it is not ok."""

    name: str
    ok: bool
    detail: str
    fix: str = ""


def examine() -> Result:
    """Every finding; not ok if one of them is not."""
    findings = [python(), *packages(), *devices(), disk(), hub(), configs(), *shipped()]
    failed = [finding for finding in findings if not finding.ok]
    rows = [("ok" if f.ok else "NO", f.name, f.detail + (f"; {f.fix}" if f.fix and not f.ok else "")) for f in findings]
    text = f"{len(failed)} of {len(findings)} need attention" if failed else "all is well"
    data = {"ok": not failed, "findings": [asdict(finding) for finding in findings]}
    return Result(data, text, ("", "what", "found"), rows, ok=not failed)


def python() -> Finding:
    """The interpreter."""
    return Finding("python", sys.version_info >= (3, 11), sys.version.split()[0], "install Python 3.11 or newer")


def packages() -> list[Finding]:
    """Each dependency of the installed diffalign, against the versions that it asks for."""
    try:
        wanted = metadata.requires("diffalign") or []
    except metadata.PackageNotFoundError:
        return [Finding("diffalign", False, "not installed, run from a checkout", "pip install -e .")]
    requirements = [Requirement(text) for text in wanted]
    return [package(r) for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def package(requirement: Requirement) -> Finding:
    """One dependency: there, and of a version that fits."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(requirement.name, False, "not installed", f"pip install '{requirement}'")
    fits = requirement.specifier.contains(version, prereleases=True)
    return Finding(requirement.name, fits, version, f"pip install '{requirement}'")


def devices() -> list[Finding]:
    """Threads, and each GPU with its memory. No GPU is no fault."""
    found = [Finding("cpu", True, f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if not torch.cuda.is_available():
        return [*found, Finding("gpu", True, "none; training and sampling run on the CPU")]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(Finding(f"cuda:{index}", True, f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    return found


def disk() -> Finding:
    """Free space where runs are written."""
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    return Finding("disk", free >= LEAST_DISK, f"{free:.0f} GB free in {Path.cwd()}", f"free {LEAST_DISK} GB")


def hub() -> Finding:
    """Whether models may be downloaded, and where they are kept. Offline is no fault."""
    state = (
        "offline (HF_HUB_OFFLINE is set): only local folders and what is cached"
        if constants.HF_HUB_OFFLINE
        else "online"
    )
    return Finding("hub", True, f"{state}; cache in {constants.HF_HUB_CACHE}")


def configs() -> Finding:
    """Whether every packaged config resolves."""
    names = packaged_configs()
    error = attempt(lambda: [load_config(name) for name in names])
    return Finding("configs", not error and bool(names), error or ", ".join(names) or "none", "install diffalign again")


def shipped() -> list[Finding]:
    """Whether the shipped files are there and the shipped models load."""
    found = []
    for name in SHIPPED_FILES:
        error = attempt(partial(asset, name))
        found.append(Finding(name, not error, error or "there", "install diffalign again"))
    for name in SHIPPED:
        error = attempt(partial(_load, name))
        found.append(Finding(f"load {name}", not error, error or "loads", "install diffalign again"))
    return found


def _load(name: str) -> None:
    load_pipeline(name).encode_prompts(["a red circle"])


def attempt(work: Callable[[], object]) -> str:
    """What went wrong, or nothing."""
    try:
        work()
    except (ValueError, OSError) as error:
        return " ".join(str(error).split())
    return ""
