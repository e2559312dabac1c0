"""The command line: names, types and help of every option. What a command does is in `diffalign.commands`.

Nothing here loads torch, so that --help is quick; each command imports what it needs when it starts.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from diffalign.cli_drawing import evaluate, generate, vary
from diffalign.cli_options import (
    Actors,
    Attention,
    Config,
    Device,
    Engine,
    FittingBatchSize,
    Guidance,
    Height,
    Images,
    Json,
    Model,
    NumFrames,
    Overrides,
    Places,
    Prompt,
    Prompts,
    Reward,
    Set,
    Weights,
    Width,
)
from diffalign.cli_preferences import compare, judge, label, label_segments
from diffalign.console import Result, guarded, show, working

app = typer.Typer(
    help="Align text-to-image and text-to-video models with what people prefer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(help="Preference data.", no_args_is_help=True)
app.add_typer(data_app, name="data")


@app.command()
def demo(
    quick: Annotated[
        bool, typer.Option("--quick", help="A few steps and pictures, to see that all of it runs.")
    ] = False,
    out: Annotated[Path, typer.Option(help="Folder of the report; a demo that was cut off goes on there.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of both trainings.")] = 0,
    as_json: Json = False,
) -> None:
    """Align the shipped tiny-sd and show held-out pictures before and after."""
    with working():
        from diffalign.commands import run_demo

        result = run_demo(out, quick, seed)
    show(result, as_json)


@app.command()
def train(
    config: Config,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check and print the resolved config; train nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train a LoRA or a whole network as a config says."""
    with working():
        from diffalign import commands

        result = (commands.dry_run if dry_run else commands.run_train)(config, overrides or [])
    show(result, as_json)


@app.command()
def cache(config: Config, overrides: Overrides = None, as_json: Json = False) -> None:
    """Compute a config's latents and text embeddings once, ahead of training."""
    with working():
        from diffalign.commands import fill_cache

        result = fill_cache(config, overrides or [])
    show(result, as_json)


app.command()(generate)
app.command()(vary)


@app.command()
def score(
    pictures: Places = None,
    images: Images = None,
    reward: Reward = None,
    weights: Weights = None,
    settings: Set = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    out: Annotated[
        Path | None, typer.Option(help="Scores as .jsonl, .csv or .parquet; a run that is killed goes on there.")
    ] = None,
    best_of: Annotated[int | None, typer.Option(help="Keep so many of each prompt, by the weighted sum.")] = None,
    minimum: Annotated[
        list[str] | None, typer.Option("--min", help="NAME=VALUE: keep what scores at least so much.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="An .html file, or a folder for one: best and worst pictures per reward.")
    ] = None,
    engine: Engine = "local",
    actors: Actors = None,
    batch_size: FittingBatchSize = None,
    device: Device = None,
    attention: Attention = "auto",
    as_json: Json = False,
) -> None:
    """Score pictures that exist with one reward or several."""
    with working():
        from diffalign.arguments import Asked
        from diffalign.scoring import command

        asked = Asked(reward or [], weights or [], settings or [], prompt or [], prompts, engine, actors, batch_size,
                      device, attention)  # fmt: skip
        rows = asked.pictures([*(pictures or []), *(images or [])])
        wanted = command.Wanted(out, best_of, minimum or [], page, asked.batch_size, asked.engine)
        result = command.score_pictures(rows, asked.job(), wanted)
    show(result, as_json)


app.command()(label)
app.command("label-segments")(label_segments)
app.command()(compare)
app.command()(evaluate)
app.command()(judge)


@app.command("optimize-noise")
def optimize_noise(
    prompt: Annotated[list[str] | None, typer.Argument(help="A prompt, or several.")] = None,
    prompts: Prompts = None,
    model: Model = "tiny-sd",
    reward: Reward = None,
    weights: Weights = None,
    settings: Set = None,
    method: Annotated[str, typer.Option(help="reno, best_of_n, zero_order, paths, fk or dno.")] = "reno",
    steps: Annotated[int | None, typer.Option(help="Looks at a picture; the method's own number if not given.")] = None,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="KEY=VALUE, a keyword of the method: lr=5; often.")
    ] = None,
    sampling_steps: Annotated[int, typer.Option(help="Steps of each picture; 1 for distilled models.")] = 1,
    timestep: Annotated[
        list[int] | None, typer.Option(help="Of these steps, as the network counts: 800 for Hyper-SDXL's one; often.")
    ] = None,
    guidance_scale: Guidance = 1.0,
    height: Height = None,
    width: Width = None,
    seed: Annotated[int, typer.Option(help="Of the first prompt; each next one has the next seed.")] = 0,
    prompts_at_once: Annotated[int, typer.Option(help="Prompts that are optimized together.")] = 1,
    memory: Annotated[str, typer.Option(help="fast, balanced or low.")] = "balanced",
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")] = "float32",
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the network: minutes first, for many prompts on a GPU.")
    ] = False,
    out: Annotated[Path, typer.Option(help="A new folder; a call that was cut off goes on there.")] = Path(
        "runs/noise"
    ),
    device: Device = None,
    attention: Attention = "auto",
    as_json: Json = False,
) -> None:
    """Look for noise of which a frozen model makes pictures that rewards like."""
    with working():
        from diffalign import arguments
        from diffalign.noise import command

        rows = arguments.read_prompt_options(prompt or [], prompts)
        keywords = command.keywords(
            option or [], method=method, steps=steps, sampling_steps=sampling_steps, timesteps=timestep or None,
            guidance_scale=guidance_scale, height=height, width=width, memory=memory, compile=compiled,
        )  # fmt: skip
        result = command.optimize_prompts(command.Wanted(
            model, [row.text for row in rows], arguments.read_sections(reward or [], weights or [], settings or []),
            keywords, seed, prompts_at_once, out, arguments.default_device(device), attention, dtype,
        ))  # fmt: skip
    show(result, as_json)


@app.command("noise-demo")
def noise_demo(
    prompt: Annotated[str, typer.Argument(help="What the page starts with.")] = "a red circle above a blue square",
    model: Model = "tiny-sd-turbo",
    reward: Reward = None,
    weights: Weights = None,
    settings: Set = None,
    method: Annotated[str, typer.Option(help="reno, best_of_n, zero_order, paths, fk or dno.")] = "reno",
    steps: Annotated[int, typer.Option(help="Looks at a picture.")] = 50,
    option: Annotated[
        list[str] | None, typer.Option("--option", help="KEY=VALUE, a keyword of the method: lr=5; often.")
    ] = None,
    sampling_steps: Annotated[int, typer.Option(help="Steps of each picture; 1 for models such as SD-Turbo.")] = 4,
    guidance_scale: Guidance = 1.0,
    seed: Annotated[int, typer.Option(help="Of the first noise.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the model: float32, bfloat16 or float16.")] = "float32",
    host: Annotated[str, typer.Option(help="0.0.0.0 lets others in the network search as well.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="The first free one from 7860 on if not given.")] = None,
    browser: Annotated[bool, typer.Option("--open", help="Open the page in this machine's browser.")] = False,
    device: Device = None,
    attention: Attention = "auto",
    as_json: Json = False,
) -> None:
    """Serve a page on which noise is looked for: a prompt, a slider for each reward, the picture as it gets better."""
    with working():
        from diffalign import arguments
        from diffalign.noise import demo

        result = demo.serve_demo(
            model, arguments.read_sections(reward or [], weights or [], settings or []),
            demo.Settings(prompt, method, steps, sampling_steps, guidance_scale, seed, option or []),
            demo.Serving(host, port, browser), arguments.default_device(device), dtype, attention,
        )  # fmt: skip
    show(result, as_json)


@app.command()
def estimate(
    config: Config,
    overrides: Overrides = None,
    card: Annotated[str, typer.Option(help="A GPU, for the time per step: H200, A100-80GB, 'RTX 4090' ...")] = "H200",
    as_json: Json = False,
) -> None:
    """Say what a config will take, before anything is downloaded."""
    with working():
        from diffalign.commands import estimate_run

        result = estimate_run(config, overrides or [], card)
    show(result, as_json)


@app.command()
def export(
    lora: Annotated[str, typer.Argument(help="A LoRA file, or the folder of a training run.")],
    form: Annotated[str, typer.Option("--format", help="kohya (ComfyUI, AUTOMATIC1111) or diffusers.")] = "kohya",
    dtype: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = "fp32",
    out: Annotated[Path | None, typer.Option(help="The file; beside the LoRA if not given.")] = None,
    as_json: Json = False,
) -> None:
    """Write a LoRA as other programs read it."""
    with working():
        from diffalign.commands import write_export

        result = write_export(lora, form, dtype, out)
    show(result, as_json)


@data_app.command("check")
def data_check(
    path: Annotated[str, typer.Argument(help="A file, a folder, or with --name pickapic a hub id.")],
    name: Annotated[str | None, typer.Option(help="The layout, if it cannot be told from the path.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="Look at no more rows.")] = None,
    num_frames: NumFrames = None,
    fps: Annotated[float | None, typer.Option(help="Frames a second that clips are to be seen at.")] = None,
    as_json: Json = False,
) -> None:
    """Read a whole preference data set and report what is in it; fails when nothing is usable."""
    with working():
        from diffalign.commands import check_data

        result = check_data(path, name, max_rows, num_frames, fps)
    show(result, as_json)


@app.command()
def rewards(as_json: Json = False) -> None:
    """List the reward models."""
    with working():
        from diffalign.catalog import list_rewards

        result = list_rewards()
    show(result, as_json)


@app.command()
def configs(as_json: Json = False) -> None:
    """List the packaged configs."""
    from diffalign.config import packaged_configs

    names = packaged_configs()
    show(Result({"configs": names}, "\n".join(names)), as_json)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Look at Python, packages, devices, disk, the hub and the shipped files; fails when something is wrong."""
    with working():
        from diffalign.doctor import examine

        result = examine()
    show(result, as_json)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `diffalign` command; exits with 0, or 2 for bad input, 1 for a failed run, 130 for Ctrl-C."""
    sys.exit(guarded(lambda: app(args=arguments, prog_name="diffalign")))


if __name__ == "__main__":
    main()
