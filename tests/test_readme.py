"""Every Python snippet of the documentation runs, every command in it exists, and every link leads somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from diffalign import cli
from diffalign.config import load_config

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text(encoding="utf-8")


def snippets(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.slow
@pytest.mark.parametrize("page", [p for p in PAGES if snippets(p, "python")], ids=lambda page: str(page.name))
def test_python_snippets_run(page: Path, tmp_path: Path) -> None:
    code = "\n".join(snippets(page, "python"))
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_config_of_the_readme_is_valid() -> None:
    (text,) = snippets(ROOT / "README.md", "yaml")
    shown, packaged = load_config(yaml.safe_load(text)), load_config("tiny-sd/dpo")
    assert (shown.method, shown.learning_rate, shown.max_train_steps) == (
        packaged.method,
        packaged.learning_rate,
        packaged.max_train_steps,
    )


def test_the_commands_of_the_readme_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    known = set(re.findall(r"^  ([a-z][a-z-]*) ", capsys.readouterr().out, flags=re.MULTILINE))
    used = set(re.findall(r"^    diffalign ([a-z][a-z-]*)", README, flags=re.MULTILINE))
    listed = set(re.findall(r"`([a-z][a-z-]*)", README.partition("| command |")[2].partition("\n\n")[0]))
    assert used <= known and listed == known


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.name))
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
