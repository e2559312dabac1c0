"""The options that several commands share, each with its help."""

from __future__ import annotations

from typing import Annotated

import typer

Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document.")]
Config = Annotated[str, typer.Argument(help="A YAML file, or the name of a packaged config such as tiny-sd/dpo.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="key=value, dotted: method.beta=2000", metavar="[KEY=VALUE]...")
]
Model = Annotated[str, typer.Option(help="A diffusers folder, a hub id, or a shipped model such as tiny-sd.")]
Lora = Annotated[str | None, typer.Option(help="A LoRA file, or the folder of a training run.")]
LoraScale = Annotated[float, typer.Option("--lora-scale", help="How much of the LoRA: 1 all of it, 0 none.")]
UserAdapter = Annotated[
    str | None, typer.Option("--user-adapter", help="A user adapter, or the folder of a run with train: user.")
]
User = Annotated[
    str | None, typer.Option("--user", help="Whom to draw for: a user's embedding, or the name of one of that run.")
]
MaxSequenceLength = Annotated[
    int | None, typer.Option("--max-sequence-length", help="Tokens of T5 (SD3), 256 by default; fewer are faster.")
]
Height = Annotated[int | None, typer.Option(help="In pixels; the model's own if not given.")]
Width = Annotated[int | None, typer.Option(help="In pixels; the model's own if not given.")]
Fps = Annotated[float, typer.Option(help="Frames a second that clips are played at.")]
NumFrames = Annotated[int | None, typer.Option("--num-frames", help="Of clips; leave out for pictures.")]
Prompts = Annotated[str | None, typer.Option(help="A .txt or .jsonl file of prompts, or shapes-heldout, which ships.")]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; as often as you like.")]
Reward = Annotated[list[str] | None, typer.Option("--reward", help="NAME or NAME=WEIGHT; as often as you like.")]
Weights = Annotated[list[str] | None, typer.Option("--weights", help="NAME=PATH: a reward's weights in a local file.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="NAME.KEY=VALUE of a reward: clip.model=tiny-clip")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; CUDA by default where there is one.")]
Attention = Annotated[str, typer.Option(help="Kernel of attention: auto, flash, cudnn, efficient, math, xformers ...")]
Steps = Annotated[int, typer.Option(help="Sampling steps.")]
Guidance = Annotated[float, typer.Option(help="Classifier-free guidance; 1 or less for none.")]
BatchSize = Annotated[int, typer.Option(help="Pictures at once.")]
FittingBatchSize = Annotated[int | None, typer.Option(help="Pictures at once; if not given, what the device holds.")]
Places = Annotated[list[str] | None, typer.Argument(help="As --images.", metavar="[PICTURE]...")]
Images = Annotated[
    list[str] | None,
    typer.Option("--images", help="File, folder, 'glob', or manifest: .jsonl, .csv, .parquet, .tar shards."),
]
Engine = Annotated[str, typer.Option(help="local, or ray: a worker on every GPU or CPU of a Ray cluster.")]
Actors = Annotated[int | None, typer.Option(help="How many workers of ray.")]
