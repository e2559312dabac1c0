"""From a config to everything a run needs: checked, cached, attached. Refusals come before anything is loaded."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, broadcast_object_list, patch_environment
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recompute

from diffalign.batches import Batches
from diffalign.cache import Cache
from diffalign.config import RunConfig, load_config
from diffalign.data.examples import Examples, load_examples
from diffalign.data.options import Framing
from diffalign.data.views import view_of
from diffalign.distributed import in_shards, refuse_few_pairs, refuse_launch, with_deepspeed
from diffalign.memory import memory_budget, with_checkpointing_planned
from diffalign.methods import METHODS
from diffalign.methods.base import Method, Need, RewardGradient, no_reward, spreads
from diffalign.pipelines import load_pipeline
from diffalign.pipelines.attention import preferring
from diffalign.pipelines.base import LatentPipeline
from diffalign.pipelines.compiling import compile_blocks
from diffalign.pipelines.lora import attach_lora, check_lora, load_lora, trainable_in_fp32
from diffalign.pipelines.user_adapter import attach_user_adapter
from diffalign.process import at_timesteps
from diffalign.reference import REFERENCES, MakeReference
from diffalign.refusals import refuse, refuse_blind_stop, refuse_graph, refuse_other_pixels, refuse_uneven_groups
from diffalign.rewards import load_rewards
from diffalign.rewards.preprocess import as_shown
from diffalign.run_folder import RESUMED_CONFIG, claim_folder
from diffalign.scores import Background, Score, Scores, joined, scores_of, unscored
from diffalign.selection import SELECTIONS, Chooser
from diffalign.table import build
from diffalign.users import known_users, parse_users
from diffalign.validation import DrawSamples, sample_drawer

log = logging.getLogger("diffalign")

Result = TypeVar("Result")
REWARDED = frozenset({Need.REWARD, Need.REWARD_GRADIENT})


@dataclass(frozen=True)
class Prepared:
    """A run that is ready for its first (or next) step."""

    config: RunConfig
    folder: Path
    accelerator: Accelerator
    method: Method
    pipe: LatentPipeline
    parameters: list[torch.nn.Parameter]
    make_reference: MakeReference
    data: Batches
    draw_samples: DrawSamples
    score: Score
    reward_gradient: RewardGradient
    checkpoint: Path | None


def prepare_run(config: str | Path | Mapping[str, Any], overrides: Sequence[str]) -> Prepared:
    """Everything before the loop.

    Raises:
        ValueError: whatever is wrong with config, data, model, run folder or their combination.
    """
    resolved = load_config(config, overrides)
    method: Method = build(METHODS, resolved.method, what="method")
    make_reference: MakeReference = build(REFERENCES, resolved.reference, what="reference")
    build(SELECTIONS, resolved.selection, what="selection")
    parse_users(resolved.users)
    refuse(resolved, method)
    folder = Path(str(resolved.output_dir))
    accelerator = make_accelerator(resolved, folder)
    refuse_graph(resolved, accelerator.device, accelerator.num_processes)
    refuse_launch(resolved, accelerator)
    refuse_uneven_groups(method, accelerator.num_processes)
    checkpoint = on_main_rank(accelerator, lambda: claim_folder(folder, resolved, bool(REWARDED & method.needs)))
    try:
        return _prepare_claimed(resolved, method, make_reference, folder, accelerator, checkpoint)
    except ValueError:
        if checkpoint is None and accelerator.is_main_process:
            (folder / RESUMED_CONFIG).unlink(missing_ok=True)  # the corrected run may have the folder
        raise


def _prepare_claimed(
    resolved: RunConfig, method: Method, make_reference: MakeReference, folder: Path, accelerator: Accelerator,
    checkpoint: Path | None,
) -> Prepared:  # fmt: skip
    """The rest of `prepare_run`, in a folder that is this run's."""
    accelerator.init_trackers("diffalign")
    examples = read_examples(resolved, method)
    users: dict[str, Tensor] | None = None
    if Need.USERS in method.needs:
        with accelerator.main_process_first():
            examples, users = known_users(resolved.users, examples, folder, accelerator.device)
    refuse_few_pairs(resolved, len(examples.train), 1 if spreads(method) else accelerator.num_processes)
    refuse_blind_stop(resolved, len(examples.validation))
    chooser = Chooser(build(SELECTIONS, resolved.selection, what="selection"), examples.train)
    pipe = load_pipeline(resolved.pretrained_model_name_or_path, dtype=weight_dtype(resolved),
                         device=accelerator.device, revision=resolved.revision, variant=resolved.variant,
                         attention=resolved.attention,
                         max_sequence_length=resolved.max_sequence_length)  # fmt: skip
    refuse_other_pixels(resolved, pipe)
    if resolved.init_lora:
        check_lora(pipe, resolved.init_lora)
    if resolved.train_timesteps:
        pipe.process = at_timesteps(pipe.process, resolved.train_timesteps)
        low, high = getattr(method, "time_low", 0.0), getattr(method, "time_high", 1.0)
        pipe.process.training_times(1, torch.Generator(), low, high)  # refuses a range without any, before the cache
    data = replace(cached(pipe, examples, resolved, accelerator, chooser), users=users)
    draw_samples = sample_drawer(pipe, data.cache, resolved, accelerator, users)
    score, gradient = (
        scorer(pipe, resolved, method, accelerator.device) if REWARDED & method.needs else (no_reward, no_reward)
    )
    pipe.release()
    dealt_out = in_shards(accelerator) or with_deepspeed(accelerator)  # what one rank then holds is not estimated
    budget = None if dealt_out else memory_budget(resolved, accelerator.device)
    resolved = with_checkpointing_planned(resolved, budget, pipe.network.config)
    refuse_graph(resolved, accelerator.device, accelerator.num_processes)
    if in_shards(accelerator):
        pipe.network.to("cpu")  # only its shards go back to the device; a frozen copy is made here too
    width = next(iter(users.values())).shape[-1] if users else None
    parameters = make_trainable(pipe, resolved, width)
    return Prepared(
        resolved,
        folder,
        accelerator,
        method,
        pipe,
        parameters,
        make_reference,
        data,
        draw_samples,
        score,
        gradient,
        checkpoint,
    )


def read_examples(config: RunConfig, method: Method) -> Examples:
    """The data of a run as its method looks at them, with a line in the log."""
    framing = Framing(config.resolution, config.random_crop, config.random_flip, config.seed, config.size,
                      config.num_frames, config.fps)  # fmt: skip
    examples = load_examples(config.data, framing, view_of(method.view))
    log.info(examples.summary())
    return examples


def scorer(
    pipe: LatentPipeline, config: RunConfig, method: Method, device: torch.device
) -> tuple[Score, RewardGradient]:
    """(the run's rewards of latents, asked in a thread of their own; the same with a gradient). Keeps the VAE alive."""
    rewards, decode = load_rewards(config.rewards, device=device), pipe.decoder()
    weights, few = rewards.weights, config.decoded_latents
    if Need.REWARD_GRADIENT in method.needs and not rewards.card.differentiable:
        black_box = [name for name, one in rewards.rewards.items() if weights[name] and not one.card.differentiable]
        raise ValueError(f"method {config.method_name!r} needs rewards with a gradient, and {', '.join(black_box)} has "
                         f"none: take one such as clip, pickscore or imagereward, or a method that asks for scores "
                         f"alone, such as ddpo, grpo, d3po, prdp or nft")  # fmt: skip
    if Need.COMPARISON in method.needs and not any(r.card.compares for n, r in rewards.rewards.items() if weights[n]):
        raise ValueError(f"method {config.method_name!r} learns from shares of wins, and none of the rewards compares "
                         f"the pictures of a prompt: set rewards: {{winrate: {{...}}}}, or take grpo")  # fmt: skip
    if spreads(method) and (comparing := [n for n, r in rewards.rewards.items() if weights[n] and r.card.compares]):
        raise ValueError(f"method.spread: {', '.join(comparing)} compares the pictures of a prompt, and each rank has "
                         f"only a part of them: set method.spread: false")  # fmt: skip

    @torch.no_grad()
    def score(latents: Tensor, prompts: Sequence[str]) -> Scores:
        with preferring(config.attention):
            # few at a time, as a VAE needs; the rewards see them all, since some compare the pictures of a prompt
            parts = [decode(part).clamp(0, 1).float().cpu() for part in latents.split(config.validation_batch_size)]
            rewards(as_shown(torch.cat(parts)), list(prompts))
            return scores_of({name: term.float().to(latents.device) for name, term in rewards.terms.items()}, weights)

    @torch.enable_grad()
    def gradient(latents: Tensor, prompts: Sequence[str]) -> tuple[Scores, Tensor]:
        found: list[Scores] = []
        slopes: list[Tensor] = []
        with preferring(config.attention):
            for start in range(0, len(latents), config.validation_batch_size):
                rows = slice(start, start + config.validation_batch_size)
                leaf = latents[rows].detach().float().requires_grad_()
                shown = leaf if few is None else leaf[:, :, :few]  # of a causal VAE, whose first frames need no others
                pixels = recompute(decode, shown, use_reentrant=False).clamp(0, 1)
                total = rewards(pixels, list(prompts)[rows])
                slopes.append(torch.autograd.grad(total.sum(), leaf)[0])
                found.append(scores_of({name: term.float() for name, term in rewards.terms.items()}, weights))
        return joined(found), torch.cat(slopes)

    background = Background(score, lambda latents, prompts: unscored(latents, weights), config.reward_timeout,
                            config.reward_retries)  # fmt: skip
    return background.submit, gradient


def make_accelerator(config: RunConfig, folder: Path) -> Accelerator:
    """Devices, ranks, mixed precision and trackers."""
    AcceleratorState._reset_state()  # a process may train several runs, with other precisions; ranks stay as they are
    with patch_environment(accelerate_use_deepspeed="false"):  # it is driven directly, see zero.py
        return Accelerator(
            cpu=config.cpu or os.environ.get("ACCELERATE_USE_CPU") == "true",
            mixed_precision=config.mixed_precision,
            log_with=None if config.report_to == "none" else config.report_to,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "logs")),
        )


def on_main_rank(accelerator: Accelerator, call: Callable[[], Result]) -> Result:
    """Calls once, on the main rank, and gives all ranks the result, or the same ValueError instead of a long wait."""
    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome = [call(), None]
        except ValueError as error:
            outcome = [None, str(error)]
    outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise ValueError(outcome[1])
    result: Result = outcome[0]
    return result


def weight_dtype(config: RunConfig) -> torch.dtype:
    """Of the frozen weights: 16 bit with mixed precision, fp32 when the whole network is trained."""
    if config.train == "full":
        return torch.float32
    return {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]


def cached(
    pipe: LatentPipeline, examples: Examples, config: RunConfig, accelerator: Accelerator, chooser: Chooser
) -> Batches:
    """Fills the cache on one rank while the others wait, then opens it on all."""
    everything = [*examples.train, *examples.validation]
    prompts = ["", *config.validation_prompts]

    def progress(what: str, done: int, total: int) -> None:
        log.info("cache: %s %d of %d", what, done, total)

    with accelerator.main_process_first():
        cache = Cache(Path(config.cache_dir), pipe)
        if accelerator.is_main_process:
            with preferring(config.attention):
                cache.fill(pipe, everything, prompts, config.validation_batch_size, progress)
    told = pipe.frame_condition if config.micro_conditioning == "data" else None
    return Batches(
        cache, examples.train, examples.validation, config.train_batch_size, config.validation_batch_size, config.seed,
        pipe.latent_shape, told, chooser,
        sampled=config.posterior == "sample",
    )  # fmt: skip


def make_trainable(pipe: LatentPipeline, config: RunConfig, user_width: int | None = None) -> list[torch.nn.Parameter]:
    """Attaches or loads the adapter, or frees the whole network; returns what is trained, in fp32.

    `user_width`: of the users' tokens, for train: user.
    """
    if config.gradient_checkpointing:
        pipe.network.enable_gradient_checkpointing()
    if config.compile:
        compile_blocks(pipe.network)
    if config.train == "full":
        pipe.network.requires_grad_(True)
        return trainable_in_fp32(pipe)
    if config.train == "user":
        assert user_width is not None
        return attach_user_adapter(pipe, user_width, config.seed)
    if config.init_lora:
        load_lora(pipe, config.init_lora, trainable=True)
        return trainable_in_fp32(pipe)
    if config.lora.dropout:
        pipe.network.train()
    lora = config.lora
    return attach_lora(
        pipe, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dropout=lora.dropout, seed=config.seed
    )


def adamw(parameters: list[torch.nn.Parameter], config: RunConfig) -> torch.optim.AdamW:
    """AdamW with the config's betas, decay and epsilon, in one kernel, which can also skip a step without being asked.

    On 1,120 small tensors: 14 ms of CPU time a step, where torch's default takes 78 (46 in its "foreach" form).
    """
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        eps=config.adam_epsilon,
        fused=True,
    )
