"""The commands that say which pictures are better: `diffalign label`, `label-segments`, `compare` and `judge`.

Registered by `diffalign.cli`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli_options import (
    Actors,
    Attention,
    Device,
    Engine,
    FittingBatchSize,
    Json,
    Prompt,
    Prompts,
    Reward,
    Set,
    Weights,
)
from diffalign.console import show, working


def label(
    pictures: Annotated[
        list[str], typer.Argument(help="Pictures or a manifest, as for score; or files that score wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Preferences as .jsonl or .parquet; a run that is killed goes on there.")],
    reward: Reward = None,
    weights: Weights = None,
    settings: Set = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    aggregate: Annotated[
        str, typer.Option(help="What ranks: total (weighted sum), rankdpo (share of wins), capo (calibrated win rate).")
    ] = "total",
    pairs: Annotated[str | None, typer.Option(help="Of each prompt best-worst, all, or adjacent ones.")] = None,
    rank: Annotated[bool, typer.Option("--rank", help="Rankings of all pictures instead of pairs.")] = False,
    tie_margin: Annotated[
        list[str] | None, typer.Option(help="VALUE of what ranks, or NAME=VALUE of a reward: within it, a tie.")
    ] = None,
    min_margin: Annotated[float, typer.Option(help="Drop what differs by less.")] = 0.0,
    engine: Engine = "local",
    actors: Actors = None,
    batch_size: FittingBatchSize = None,
    device: Device = None,
    attention: Attention = "auto",
    as_json: Json = False,
) -> None:
    """Rank the pictures of each prompt with rewards and write preferences to train on."""
    with working():
        from diffalign.arguments import Asked
        from diffalign.labeling import command

        asked = Asked(reward or [], weights or [], settings or [], prompt or [], prompts, engine, actors, batch_size,
                      device, attention)  # fmt: skip
        wanted = command.read_wanted(out, aggregate, pairs, rank, tie_margin or [], min_margin)
        result = command.label_pictures(pictures, asked, wanted)
    show(result, as_json)


def label_segments(
    pairs: Annotated[str, typer.Argument(help="Pairs of clips as .jsonl, such as vary writes.")],
    out: Annotated[Path, typer.Option(help="The labels, a .jsonl file.")],
    segments: Annotated[int, typer.Option(help="How many; the paper's last a second.")],
    reward: Reward = None,
    weights: Weights = None,
    settings: Set = None,
    preference: Annotated[
        str | None,
        typer.Option(help="Who is asked instead of rewards: '{judge: {base_url: ..., model: ...}, template: "
                          "vlm-clip-pair}'."),
    ] = None,
    tie_margin: Annotated[float, typer.Option(help="Of the weighted sum of rewards: within it, a tie.")] = 0.0,
    device: Device = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Say of each stretch of two clips which is better there, with rewards or a judge: labels for densedpo.

    A run that is killed goes on where it was.
    """
    with working():
        from diffalign import arguments
        from diffalign.data.readers import read_jsonl
        from diffalign.labeling import segments as labeling

        asked = arguments.read_preference(preference, reward or [], weights or [], settings or [], tie_margin,
                                          arguments.default_device(device))  # fmt: skip
        made_of = {"pairs": pairs, "preference": preference, "reward": reward, "weights": weights, "set": settings,
                       "tie_margin": tie_margin}  # fmt: skip
        result = labeling.label_segments(read_jsonl(pairs), asked, segments, out, made_of)
    show(result, as_json)


def compare(
    a: Annotated[str, typer.Argument(help="Pictures or a manifest, as for score; or a file that score wrote.")],
    b: Annotated[str, typer.Argument(help="The same; the win rate is that of B over A.")],
    reward: Reward = None,
    weights: Weights = None,
    settings: Set = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    page: Annotated[
        Path | None, typer.Option(help="An .html file, or a folder for one: where the two differ most, per reward.")
    ] = None,
    engine: Engine = "local",
    actors: Actors = None,
    batch_size: FittingBatchSize = None,
    device: Device = None,
    attention: Attention = "auto",
    as_json: Json = False,
) -> None:
    """Compare the pictures of two manifests prompt by prompt: win rates with intervals, and how rewards agree."""
    with working():
        from diffalign.arguments import Asked
        from diffalign.comparing import command

        asked = Asked(reward or [], weights or [], settings or [], prompt or [], prompts, engine, actors, batch_size,
                      device, attention)  # fmt: skip
        result = command.compare_pictures(a, b, asked, page)
    show(result, as_json)


def judge(
    path: Annotated[str, typer.Argument(help="A folder that generate wrote, or pictures or a manifest as for score.")],
    ask: Annotated[
        str | None, typer.Option(help="best of each prompt (the default), order of all of them, or pairs.")
    ] = None,
    judge: Annotated[str | None, typer.Option(help="Who judges; the page asks if not given.")] = None,
    db: Annotated[Path | None, typer.Option(help="Database of choices; beside the pictures if not given.")] = None,
    export: Annotated[
        Path | None, typer.Option(help="Serve nothing; write what was chosen as preferences, to a .jsonl file.")
    ] = None,
    watch: Annotated[
        bool,
        typer.Option("--watch", help="PATH is the folder of a run's reward human: judge what it draws, as it comes."),
    ] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="With --export: one record per group, the mean of its judges.")
    ] = False,
    prompt: Prompt = None,
    prompts: Prompts = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets others in the network judge as well.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 for any that is free.")] = 7860,
    seed: Annotated[int, typer.Option(help="Of the places in which pictures are shown.")] = 0,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    as_json: Json = False,
) -> None:
    """Serve a page on which people choose between the pictures of each prompt; write their choices as preferences."""
    with working():
        from diffalign.judging import command

        place = command.Place(path, prompt or [], prompts, db, ask)
        if merge and not export:
            raise ValueError("--merge goes with --export: it is how choices are written, not how they are made")
        if export:
            result = command.export_choices(place, export, judge, merge, watch)
        else:
            result = command.judge_pictures(place, command.Serving(judge, host, port, seed, browser, watch))
    show(result, as_json)
