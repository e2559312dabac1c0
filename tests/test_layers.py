"""Imports point one way, and each heavy library has one home."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("diffalign", "pipelines", "rewards")
HOMES = {  # who may import what; the trainer is start-up, loop, and what several processes need
    "accelerate": tuple(f"diffalign/{name}.py" for name in ("trainer", "startup", "validation", "distributed", "zero")),
    "deepspeed": ("diffalign/zero.py",),
    "diffusers": ("pipelines/",),
    "peft": ("pipelines/",),
    "transformers": ("pipelines/", "rewards/"),
    "open_clip": ("pipelines/", "rewards/"),
    "xformers": ("pipelines/",),
}
LEAVES = (
    "cli",
    "commands",
    "arguments",
    "doctor",
    "demo",
    "shapes/train",
    "shapes/distill",
    "shapes/tiny",
    "shapes/pairs",
    "shapes/rates",
)
RANKS = {  # an arrow goes from a higher rank to a lower one, or stays inside a rank
    "process": 0, "table": 0, "transition": 1, "losses": 1, "sampling": 2, "data": 2,
    "methods": 3, "trainer": 4, "startup": 4, "validation": 4, "refusals": 4, "distributed": 4, "zero": 4,
}  # fmt: skip


def sources() -> list[Path]:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    own = [file.relative_to(ROOT) for file in files if not any(parent.is_symlink() for parent in file.parents)]
    return [file for file in own if not str(file).startswith(tuple(f"diffalign/{leaf}" for leaf in LEAVES))]


def imported(file: Path) -> list[str]:
    nodes = list(ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))))
    plain = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    return plain + [f"{n.module}.{a.name}" for n in nodes if isinstance(n, ast.ImportFrom) for a in n.names]


@pytest.mark.parametrize("library", HOMES)
def test_each_heavy_library_has_one_home(library: str) -> None:
    users = {str(file) for file in sources() if any(name.split(".")[0] == library for name in imported(file))}
    assert {user for user in users if not user.startswith(HOMES[library])} == set()


def test_arrows_point_one_way() -> None:
    for file in sources():
        rank = RANKS.get(file.with_suffix("").parts[1]) if file.parts[0] == "diffalign" else None
        targets = [name.split(".")[1] for name in imported(file) if name.startswith("diffalign.")]
        wrong = [t for t in targets if rank is not None and (RANKS.get(t, 0) > rank or t in LEAVES)]
        assert not wrong, f"{file} imports {wrong}"


def test_methods_and_losses_know_no_model_family_and_no_reward() -> None:
    for file in sources():
        inside = file.parts[:2] in (("diffalign", "methods"), ("diffalign", "losses"))
        if inside or file.stem in ("sampling", "transition", "process"):
            assert not [n for n in imported(file) if n.startswith(("diffalign.pipelines", "diffalign.rewards"))], file


def test_the_scan_sees_the_code() -> None:
    assert {"diffalign/trainer.py", "pipelines/sd.py", "rewards/clip.py"} <= {str(file) for file in sources()}
    assert "accelerate.Accelerator" in imported(Path("diffalign/trainer.py"))
