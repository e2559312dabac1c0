"""Writes assets/prompts/shapes-heldout.jsonl: held-out captions in the fixed mix, with their category.

python -m diffalign.shapes.prompts --out assets/prompts/shapes-heldout.jsonl
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffalign.shapes.grammar import Scene, sample_scenes
from diffalign.writing import write_text


def lines(scenes: list[Scene]) -> str:
    """One JSON object per line: prompt and category."""
    return "".join(json.dumps({"prompt": str(scene), "category": scene.category}) + "\n" for scene in scenes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--split", default="heldout")
    parser.add_argument("--count", type=int, default=600)
    args = parser.parse_args()
    write_text(args.out, lines(sample_scenes(args.split, args.count, seed=0)))


if __name__ == "__main__":
    main()
