"""Files that ship with diffalign: small trained models, prompts and preference pairs."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def asset(name: str) -> Path:
    """The path of a shipped file or folder, such as "tiny-sd" or "prompts/shapes-heldout.jsonl".

    Raises:
        ValueError: it is not there, which means that the installation is not complete.
    """
    path = FOLDER / name
    if not path.exists():
        present = ", ".join(sorted(p.name for p in FOLDER.iterdir() if not p.name.startswith("_")))
        raise ValueError(f"diffalign's own asset {name!r} is not in {FOLDER} (there: {present}); install it again")
    return path
