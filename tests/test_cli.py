"""The command line: what goes to stdout and stderr, exit codes, and that help loads no torch."""

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from diffalign import arguments, cli, console
from diffalign.manifests import Entry
from diffalign.pipelines.attention import counted_kernels

HELPS = [[], ["demo"], ["train"], ["cache"], ["generate"], ["score"], ["evaluate"], ["data"], ["data", "check"],
         ["label"], ["compare"], ["judge"], ["export"], ["estimate"], ["rewards"], ["configs"], ["doctor"]]  # fmt: skip


@dataclass(frozen=True)
class Answer:
    code: int
    out: str
    err: str


class Run:
    """Runs the command line in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *words: object) -> Answer:
        self.capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main([str(word) for word in words])
        out, err = self.capfd.readouterr()
        code = stop.value.code
        return Answer(code if isinstance(code, int) else 0, out, err)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    monkeypatch.delenv("DIFFALIGN_DEBUG", raising=False)
    monkeypatch.chdir(tmp_path)
    return Run(capfd)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name, color in (("b.png", "blue"), ("a.png", "red"), ("c.JPG", "green")):
        Image.new("RGB", (64, 64), color).save(folder / name)
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_help_of_every_command_loads_no_torch() -> None:
    program = (
        "import sys\nfrom diffalign import cli, console\n"
        f"for words in {HELPS!r}:\n"
        "    code = None\n"
        "    try:\n        cli.main([*words, '--help'])\n    except SystemExit as stop:\n        code = stop.code\n"
        "    assert code == 0, (words, code)\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: diffalign") == len(HELPS)


def test_importing_the_package_loads_nothing_and_its_public_names_are_functions() -> None:
    program = (
        "import sys, diffalign\nassert 'torch' not in sys.modules\n"
        "import importlib\n"  # a module of the same name would take the function's place once it is imported
        "assert all(importlib.import_module(home) for home in diffalign._HOMES.values())\n"
        "assert all(callable(getattr(diffalign, name)) for name in diffalign.__all__)\n"
        "assert set(diffalign.__all__) <= set(dir(diffalign))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_dry_run_prints_the_resolved_config_and_writes_nothing(run: Run, tmp_path: Path) -> None:
    answer = run("train", "tiny-sd/dpo", "--dry-run", "--json", "learning_rate=3e-4", "lora.rank=4")
    config = json.loads(answer.out)
    assert answer.code == 0 and config["learning_rate"] == 3e-4 and config["lora"]["rank"] == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "tiny-sd/dpoo"], "did you mean 'tiny-sd/dpo'?"),
        (["train", "tiny-sd/dpo", "--dry-run", "learnin_rate=1"], "did you mean 'learning_rate'?"),
        (["train", "tiny-sd/dpo", "--dry-run", "method=ppo"], "unknown method 'ppo'"),
        (["train", "tiny-sd/dpo", "--dry-run", "method.betta=1"], "did you mean 'beta'?"),
        (["train", "tiny-sd/dpo", "--dry-run", "reference=nobody"], "unknown reference 'nobody'"),
        (["train", "tiny-sd/dpo", "--dry-run", "reference=none"], "needs a reference"),
        (["train", "tiny-sd/dpo", "--dry-run", "rewards={clap: 1}"], "did you mean 'clip'?"),
        (["train", "tiny-sd/dpo", "--dry-run", "rewards.clip={modle: x}"], "did you mean 'model'?"),
        (["generate"], "--prompt"),
        (["generate", "--prompts", "none.txt"], "none.txt"),
        (["generate", "--prompt", "x", "--num-images", "0"], "at least 1"),
        (["generate", "--prompt", "x", "--out", "full"], "choose another --out"),
        (["score", "full", "--prompt", "x", "--reward", "shapes"], "no picture or clip there"),
        (["score", "missing.png", "--prompt", "x", "--reward", "shapes"], "missing.png"),
        (["evaluate", "--prompt", "a red circle"], "at least one --reward"),
        (["evaluate", "--prompt", "a red circle", "--reward", "shaps"], "did you mean 'shapes'?"),
        (["evaluate", "--prompt", "a red circle", "--reward", "shapes=heavy"], "expected float, got 'heavy'"),
        (["evaluate", "--prompt", "a", "--reward", "shapes", "--weights", "clip=x"], "expected NAME=PATH"),
        (["evaluate", "--prompt", "a", "--reward", "shapes", "--set", "clip.model=x"], "not among the rewards"),
        (["data", "check", "nowhere"], "nowhere"),
        (["label", "full", "--out", "p.csv", "--reward", "shapes"], "ends in .jsonl or .parquet"),
        (["label", "full", "--out", "p.jsonl", "--prompt", "a"], "at least one --reward"),
        (["label", "full", "--out", "p.jsonl", "--reward", "shapes", "--prompt", "a"], "no picture or clip there"),
        (["label", "full", "--out", "p.jsonl", "--pairs", "bset-worst"], "did you mean 'best-worst'?"),
        (["label", "full", "--out", "p.jsonl", "--tie-margin", "x=-1"], "at least 0"),
        (["compare", "full", "nowhere", "--reward", "shapes", "--prompt", "a"], "no picture or clip there"),
    ],
)  # fmt: skip
def test_bad_input_is_one_sentence_and_exit_code_2(run: Run, tmp_path: Path, words: list[str], message: str) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.txt").write_text("mine")
    answer = run(*words)
    assert answer.code == 2 and answer.out == ""
    assert answer.err.splitlines()[-1].startswith("diffalign: ") and message in answer.err
    assert "Traceback" not in answer.err
    assert (tmp_path / "full" / "keep.txt").read_text() == "mine"


def test_an_unknown_option_is_exit_code_2(run: Run) -> None:
    assert run("train", "tiny-sd/dpo", "--drry-run").code == 2


def test_the_debug_variable_keeps_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_DEBUG", "1")
    with pytest.raises(ValueError, match="unknown config"):
        cli.main(["train", "no-such-config", "--dry-run"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("two\nlines"), 2),
        (FileNotFoundError(2, "No such file or directory", "here"), 2),
        (RuntimeError("the loss is not finite"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DIFFALIGN_DEBUG", raising=False)

    def fail() -> None:
        raise error

    assert console.guarded(fail) == code
    assert len(capsys.readouterr().err.splitlines()) == (0 if code == 130 else 1)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFALIGN_DEBUG", raising=False)

    def fail() -> None:
        raise KeyError("bug")

    with pytest.raises(KeyError):
        console.guarded(fail)


def test_what_is_printed_while_working_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with console.working():
        print("noise")
    console.show(console.Result({"n": float("nan"), "path": Path("x")}), as_json=True)
    out, err = capsys.readouterr()
    assert json.loads(out) == {"n": None, "path": "x"} and "noise" in err


def test_a_result_that_is_not_ok_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        console.show(console.Result({}, "not usable", ok=False), as_json=False)
    assert stop.value.code == 1 and capsys.readouterr().out == "not usable\n"


def test_data_check_of_an_empty_folder_fails(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert run("data", "check", "empty").code in (1, 2)


def test_rewards_and_configs_are_listed(run: Run) -> None:
    listed = json.loads(run("rewards", "--json").out)
    assert listed["clip"]["differentiable"] and not listed["shapes"]["differentiable"]
    assert "tiny-sd/dpo" in run("configs").out.splitlines()


def test_score_takes_a_folder_in_the_order_of_names(run: Run, pictures: Path) -> None:
    answer = run("score", pictures, "--prompt", "a red circle", "--reward", "shapes=2", "--json")
    scored = json.loads(answer.out)
    assert answer.code == 0, answer.err
    assert [Path(row["image"]).name for row in scored["images"]] == ["a.png", "b.png", "c.JPG"]
    assert scored["mean"] == {"shapes": 0.0} and scored["images"][0]["prompt"] == "a red circle"


def test_score_names_a_broken_picture(run: Run, pictures: Path) -> None:
    whole = (pictures / "b.png").read_bytes()
    (pictures / "b.png").write_bytes(whole[: len(whole) // 2])
    answer = run("score", "--images", pictures, "--prompt", "a red circle", "--reward", "shapes")
    assert answer.code == 2 and "b.png" in answer.err and answer.out == ""


def test_pictures_of_listings_files_and_globs(pictures: Path, tmp_path: Path) -> None:
    def read(place: object, prompts: list[str], file: str | None = None) -> list[tuple[Path, str]]:
        rows = arguments.read_pictures([str(place)], prompts, file)
        return [(Path(row.image), row.prompt) for row in rows if isinstance(row, Entry)]

    listing = tmp_path / "pictures" / "list.jsonl"
    listing.write_text('{"image": "a.png", "prompt": "one"}\n{"image": "b.png", "prompt": "two"}\n')
    assert read(listing, []) == [(pictures / "a.png", "one"), (pictures / "b.png", "two")]
    assert read(pictures / "*.png", ["x", "y"]) == [(pictures / "a.png", "x"), (pictures / "b.png", "y")]
    (tmp_path / "prompts.txt").write_text("p\nq\nr\n")
    assert [prompt for _, prompt in read(pictures, [], str(tmp_path / "prompts.txt"))] == ["p", "q", "r"]
    with pytest.raises(ValueError, match="one prompt for all or one for each of 3 pictures, got 2"):
        read(pictures, ["x", "y"])


def test_a_picture_without_a_prompt_is_an_error_where_nothing_is_written(run: Run, pictures: Path) -> None:
    (pictures / "a.txt").write_text("a red circle")
    answer = run("score", pictures, "--reward", "shapes")
    assert answer.code == 2 and "b.png has no prompt: give --prompt" in answer.err
    kept = run("score", pictures, "--reward", "shapes", "--out", "scores.jsonl", "--json")
    assert kept.code == 0 and json.loads(kept.out)["pictures"] == 1 and json.loads(kept.out)["broken"] == 2


def test_score_writes_a_file_names_what_it_skips_and_goes_on(run: Run, pictures: Path, tmp_path: Path) -> None:
    (pictures / "b.png").write_text("no picture")
    words = ("score", pictures, "--prompt", "a red circle", "--reward", "jpeg", "--out", "runs/scores.csv")
    answer = run(*words, "--page", "runs")
    assert answer.code == 0, answer.err
    assert "-kB" in answer.out and "skipped: " in answer.out and "b.png: expected a whole picture" in answer.out
    assert (tmp_path / "runs" / "index.html").is_file()
    assert (tmp_path / "runs" / "scores.csv").read_text().splitlines()[0] == (
        "image,prompt,score.jpeg,score.weighted,missing"
    )
    again = json.loads(run(*words, "--best-of", 1, "--json").out)
    assert (again["new"], again["pictures"], again["kept"]) == (0, 2, 1)
    assert len((tmp_path / "runs" / "scores.csv").read_text().splitlines()) == 2
    other = run(*words, "--set", "jpeg.mode=incompressibility")
    assert other.code == 2 and "holds scores of jpeg, and jpeg (mode=incompressibility) was asked for" in other.err


def test_label_and_compare_from_the_command_line(run: Run, pictures: Path, tmp_path: Path) -> None:
    words = ("label", pictures, "--prompt", "a red circle", "--reward", "jpeg", "--pairs", "adjacent")
    labeled = json.loads(run(*words, "--out", "pairs.jsonl", "--tie-margin", 1000, "--json").out)
    assert (labeled["records"], labeled["ties"], labeled["tie_margin"]) == (2, 2, 1000)
    assert run("data", "check", "pairs.jsonl").code == 1  # ties alone cannot be trained on
    again = run(*words, "--out", "pairs.jsonl")
    assert again.code == 0 and "3 pictures, 0 scored now" in again.out and "train: data=" in again.out
    words = ("compare", pictures, pictures, "--prompt", "a red circle", "--reward", "jpeg")
    same = json.loads(run(*words, "--page", "runs", "--json").out)
    assert same["rewards"]["jpeg"]["win_rate"] == 0.5 and same["rewards"]["jpeg"]["ties"] == 3
    assert same["rewards"]["jpeg"]["win_rate_ci95"] == [None, None] and (tmp_path / "runs" / "index.html").is_file()
    table = run(*words)
    assert table.code == 0 and "win rate of B" in table.out and "1 in order" in table.out


def test_weights_that_are_not_there_say_what_to_download_and_where_to_put_it(run: Run, pictures: Path) -> None:
    answer = run("score", pictures, "--prompt", "x", "--reward", "imagereward", "--out", "scores.jsonl")
    assert answer.code == 2 and "Traceback" not in answer.err
    assert "hf download" in answer.err and "--weights imagereward=FILE" in answer.err


def test_the_shipped_prompts_are_found_by_name() -> None:
    prompts = arguments.read_prompt_options(["mine"], "shapes-heldout")
    assert prompts[0].text == "mine" and len(prompts) == 601 and prompts[1].category


def test_settings_reach_the_reward() -> None:
    rewards = arguments.read_rewards(["shapes=2"], [], ["shapes.mode=score"], "cpu")
    assert rewards.weights == {"shapes": 2.0} and rewards.card.range == (0.0, 2.0)
    with pytest.raises(ValueError, match=r"shapes.mode: expected one of"):
        arguments.read_rewards(["shapes"], [], ["shapes.mode=other"], "cpu")


def test_generate_draws_what_it_lists_and_score_reads_it(run: Run, tmp_path: Path) -> None:
    words = ("--prompt", "a red circle", "--num-images", 2, "--steps", 1, "--seed", 7, "--json")
    first = run("generate", *words, "--out", "all")
    assert first.code == 0, first.err
    listed = json.loads(first.out)["images"]
    assert [row["seed"] for row in listed] == [7, 8]
    run("generate", *words, "--out", "one-by-one", "--batch-size", 1)
    for row in listed:
        together, alone = (Image.open(tmp_path / folder / row["image"]) for folder in ("all", "one-by-one"))
        extremes = [abs(a - b) for a, b in zip(together.tobytes(), alone.tobytes(), strict=True)]
        assert max(extremes) <= 1 and together.size == (64, 64)
    scored = run("score", tmp_path / "all" / "generations.jsonl", "--reward", "shapes", "--json")
    assert len(json.loads(scored.out)["images"]) == 2
    assert run("generate", *words, "--out", "all").code == 2


def test_evaluate_reports_and_keeps_its_pictures(run: Run, tmp_path: Path) -> None:
    words = (
        "--prompt",
        "a red circle",
        "--prompt",
        "a blue square",
        "--steps",
        1,
        "--reward",
        "shapes",
        "--out",
        "report",
    )
    answer = run("evaluate", *words)
    assert answer.code == 0, answer.err
    assert "shapes" in answer.out and (tmp_path / "report" / "base" / "00001.png").is_file()
    assert json.loads((tmp_path / "report" / "evaluation.json").read_text())["draws"] == 2


CLIP = f"clip={Path(__file__).parent.parent / 'assets' / 'tiny-clip'}"
ATTENDING = {
    "generate": ("generate", "--prompt", "a red circle", "--steps", 1),
    "score": ("score", "pictures", "--prompt", "a red circle", "--reward", "clip", "--weights", CLIP),
    "evaluate": ("evaluate", "--prompt", "a red circle", "--steps", 1, "--reward", "clip", "--weights", CLIP),
}


@pytest.mark.parametrize("words", ATTENDING.values(), ids=ATTENDING)
def test_the_attention_that_is_asked_for_is_the_one_that_runs(
    run: Run, pictures: Path, words: tuple[object, ...]
) -> None:
    for backend in ("math", "flash"):
        shutil.rmtree("runs", ignore_errors=True)
        with counted_kernels() as kernels:
            answer = run(*words, "--attention", backend)
        assert answer.code == 0, answer.err
        assert set(kernels) == {backend} and kernels[backend] > 2


@pytest.mark.parametrize("words", ATTENDING.values(), ids=ATTENDING)
def test_an_attention_that_is_not_there_is_refused_with_what_is(
    run: Run, pictures: Path, words: tuple[object, ...]
) -> None:
    for backend, said in (("cudnn", "what does: auto, flash, math"), ("flahs", "did you mean 'flash'?")):
        answer = run(*words, "--attention", backend)
        assert answer.code == 2 and answer.out == "" and "Traceback" not in answer.err
        assert said in answer.err.splitlines()[-1]


def test_export_writes_beside_the_lora_and_refuses_what_is_none(run: Run, tmp_path: Path):
    from diffalign.pipelines import load_pipeline
    from diffalign.pipelines.lora import attach_lora, save_lora

    pipe = load_pipeline("tiny-sd")
    attach_lora(pipe, rank=2)
    save_lora(pipe, tmp_path / "run")
    answer = run("export", tmp_path / "run", "--dtype", "fp16", "--json")
    assert answer.code == 0, answer.err
    said = json.loads(answer.out)
    assert Path(said["file"]) == tmp_path / "run" / "run-kohya-fp16.safetensors"
    assert Path(said["file"]).stat().st_size == said["bytes"]
    refused = run("export", said["file"])
    assert refused.code == 2 and "expected a LoRA in diffusers' format" in refused.err


def test_estimate_says_what_a_config_takes_and_which_setting_helps(run: Run):
    answer = run("estimate", "sd15/dpo_lora_12gb", "--card", "RTX 4090", "--json")
    said = json.loads(answer.out)
    assert answer.code == 0 and said["fits"] and said["parameters"] == 859_520_964
    big = ["gradient_checkpointing=false", "train_batch_size=32"]
    refused = run("estimate", "sd15/dpo_lora_12gb", *big, "--card", "RTX 4090")
    assert "GB more than a RTX 4090 has: set gradient_checkpointing: true" in refused.out
    assert run("estimate", "sd15/dpo_lora_12gb", "--card", "H300").err.count("did you mean 'H200'") == 1
