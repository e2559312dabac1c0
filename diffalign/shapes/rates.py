"""How often a shapes model draws what it is asked, as a user without this project has it.

    python -m diffalign.shapes.rates --model tiny-sdxl --split heldout --draws 540

The stock pipeline with its defaults except 20 steps, judged by the verifier; captions in the mix of those that ship.
"""

from __future__ import annotations

import argparse

import torch
from diffusers import DiffusionPipeline

from diffalign.pipelines import locate
from diffalign.shapes.grammar import SPLITS, sample_scenes
from diffalign.shapes.train import pass_rates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a shipped model or a folder")
    parser.add_argument("--split", choices=SPLITS, default="validation")
    parser.add_argument("--draws", type=int, default=192)
    parser.add_argument("--seed", type=int, default=1, help="of the captions")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    stock = DiffusionPipeline.from_pretrained(locate(args.model)).to(args.device)
    rates = pass_rates(stock, sample_scenes(args.split, args.draws, seed=args.seed))
    shares = "  ".join(f"{name} {100 * rate:.1f} %" for name, rate in rates.items())
    print(f"{shares}  of {args.draws} {args.split} draws")


if __name__ == "__main__":
    main()
