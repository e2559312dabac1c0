"""Wheel, sdist, links and imports: nothing is missing, and every module has one identity."""

import importlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAPPED = ("pipelines", "rewards", "configs", "assets")
LEFT_OUT = ("__pycache__", ".pyc", ".partial")


def real_files() -> dict[str, Path]:
    """Name inside the wheel -> file, of all that the package is made of."""
    roots = {"diffalign": ROOT / "diffalign", **{f"diffalign/{name}": ROOT / name for name in MAPPED}}
    return {
        f"{prefix}/{file.relative_to(root)}": file
        for prefix, root in roots.items()
        for folder, _, names in os.walk(root)  # does not follow the links
        for file in (Path(folder) / name for name in names)
        if not any(part in str(file) for part in LEFT_OUT)
    }


def modules() -> list[str]:
    names = [name for name in real_files() if name.endswith(".py")]
    return sorted(n.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for n in names)


@pytest.mark.parametrize("name", MAPPED)
def test_links_are_relative_and_lead_to_the_real_folder(name: str) -> None:
    link = ROOT / "diffalign" / name
    assert link.is_symlink() and os.readlink(link) == f"../{name}"
    assert (ROOT / name).is_dir() and not (ROOT / name).is_symlink()


def test_every_module_can_be_imported_and_has_one_identity() -> None:
    for name in modules():
        importlib.import_module(name)
    ours = [m for m in list(sys.modules.values()) if str(getattr(m, "__file__", None)).startswith(str(ROOT))]
    files = [os.path.realpath(str(m.__file__)) for m in ours if m.__name__.split(".")[0] in ("diffalign", *MAPPED)]
    assert len(files) == len(set(files)) >= len(modules())
    assert not set(MAPPED) & set(sys.modules)


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("from . import base\n\nprint(base)\n", "TID252"),
        ("import rewards\n\nprint(rewards)\n", "TID251"),
        ("from pipelines.base import LatentPipeline\n\nprint(LatentPipeline)\n", "TID251"),
    ],
)
def test_ruff_refuses_a_second_identity(code: str, rule: str) -> None:
    command = [sys.executable, "-m", "ruff", "check", "--output-format=concise", "--stdin-filename=rewards/x.py", "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 1 and rule in done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist, and the wheel made from the sdist, as an index would serve them; built from a copy of the sources."""
    sources, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("dist")
    listed = call(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT).splitlines()
    for name in listed:
        if (ROOT / name).exists():
            (sources / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, sources / name)
    call([sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(sources)])
    return {"sdist": next(out.glob("*.tar.gz")), "wheel": next(out.glob("*.whl"))}


def copy(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    else:
        target.write_bytes(source.read_bytes())


def call(command: Sequence[str | Path], cwd: Path | None = None, **environment: str) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_everything_once(built: dict[str, Path]) -> None:
    inside = set(zipfile.ZipFile(built["wheel"]).namelist())
    expected = set(real_files())
    assert expected - inside == set(), "missing in the wheel"
    assert {name for name in inside - expected if ".dist-info/" not in name} == set(), "too much in the wheel"
    assert {name.split("/")[0] for name in inside if ".dist-info" not in name} == {"diffalign"}
    assert any(name.endswith("licenses/LICENSE") for name in inside)


@pytest.mark.slow
def test_the_sdist_holds_the_real_folders(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        inside = {name.partition("/")[2] for name in archive.getnames()}
    real = {str(file.relative_to(ROOT)) for file in real_files().values()}
    assert real - inside == set()
    assert {"pyproject.toml", "README.md", "LICENSE"} <= inside


def environment(folder: Path) -> Path:
    """The interpreter of a new environment that also sees the packages of the running one, but not this checkout."""
    call([sys.executable, "-m", "venv", "--without-pip", folder])
    site = next((folder / "lib").glob("python*/site-packages"))
    packages = {str(Path(entry)) for entry in sys.path if entry.endswith("site-packages")}
    (site / "running.pth").write_text("\n".join(sorted(packages)) + "\n")
    return folder / "bin" / "python"


def install(python: Path, *what: str | Path) -> None:
    call([python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--ignore-installed", *what])


@pytest.mark.slow
def test_an_installed_wheel_works_in_an_empty_folder(built: dict[str, Path], tmp_path: Path) -> None:
    python, empty = environment(tmp_path / "venv"), tmp_path / "empty"
    empty.mkdir()
    install(python, built["wheel"])
    diffalign = python.parent / "diffalign"

    def run(*words: str) -> str:
        return call([diffalign, *words], cwd=empty, PYTHONPATH="", HF_HUB_OFFLINE="1")

    where = call([python, "-c", "import diffalign; print(diffalign.__file__)"], cwd=empty, PYTHONPATH="")
    assert str(tmp_path) in where
    assert "Usage: diffalign" in run("--help")
    assert "tiny-sd/dpo" in run("configs").splitlines()
    assert "learning_rate" in run("train", "tiny-sd/dpo", "--dry-run")
    run("generate", "--model", "tiny-sd", "--prompt", "a red circle", "--steps", "2", "--out", "drawn")
    assert (empty / "drawn" / "00000.png").stat().st_size > 0
    run("demo", "--quick", "--out", "demo")
    assert (empty / "demo" / "report.html").is_file() and (empty / "demo" / "report.json").is_file()


@pytest.mark.slow
def test_an_editable_install_works_from_elsewhere(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    for name in call(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            copy(ROOT / name, checkout / name)
    python = environment(tmp_path / "venv")
    install(python, "-e", checkout)
    program = (
        "import diffalign.rewards, diffalign.configs, diffalign.assets\n"
        "from diffalign.config import packaged_configs\n"
        "print(diffalign.rewards.__file__, *packaged_configs())\n"
    )
    out = call([python, "-c", program], cwd=tmp_path, PYTHONPATH="")
    assert str(checkout) in out and "tiny-sd/dpo" in out
