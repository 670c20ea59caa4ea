"""One training loop for all embedded models: workers, cosine learning rate, EMA, checkpoints, resume.

On a CPU two workers of one thread each, averaging their gradients, are faster than one worker of two threads; on a
GPU one worker is used. A step's randomness comes from (seed, step, rank) alone, so a resumed run repeats a whole one.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

log = logging.getLogger("embedded")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def run_workers(target: Callable, workers: int, *args) -> None:
    """Call `target(rank, workers, *args)` in each worker process; with a GPU, or one worker, right here."""
    if workers == 1 or device().type == "cuda":
        target(0, 1, *args)
        return
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ["MASTER_PORT"] = str(29000 + os.getpid() % 2000)
    mp.spawn(_worker, args=(target, workers, args), nprocs=workers)


def _worker(rank: int, target: Callable, workers: int, args: tuple) -> None:
    torch.set_num_threads(1)
    # torch sends it to a worker whose parent was killed; a shell starts background jobs with it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    dist.init_process_group("gloo", rank=rank, world_size=workers)
    target(rank, workers, *args)
    dist.destroy_process_group()


def fit(
    name: str,
    model: nn.Module,
    loss_of: Callable[[int, torch.Generator], torch.Tensor],
    *,
    steps: int,
    learning_rate: float,
    restart: tuple[int, float] | None = None,
    cache: Path,
    rank: int = 0,
    workers: int = 1,
    seed: int = 0,
    warmup: int = 200,
    weight_decay: float = 0.01,
    ema_decay: float = 0.999,
    save_every: int = 500,
    clip: float = 1.0,
) -> nn.Module:
    """Train `model` for `steps` of AdamW; returns its EMA in eval mode.

    The learning rate falls along half a cosine; with `restart` of (step, rate) it does so up to that step, then again from that rate.
    `loss_of(step, generator)` returns the step's scalar loss. The checkpoint `cache/NAME.pt` is written every
    `save_every` steps and continued from when it is there.
    """
    checkpoint = cache / f"{name}.pt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98), fused=True
    )
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    first, warm = 0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        first = state["step"]
        if "optimizer" in state:
            optimizer.load_state_dict(state["optimizer"])
        else:
            warm = first  # restored weights: a new optimizer warms up from there
    started, recent = time.time(), []
    model.train()
    for step in range(first, steps):
        generator = torch.Generator().manual_seed((seed * 1_000_003 + step) * 16 + rank)
        start, end, peak = _cycle(step, steps, learning_rate, restart)
        rate = peak * min(1, (step + 1 - max(start, warm)) / warmup) * _cosine((step - start) / (end - start))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_of(step, generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if workers > 1:
            _average_gradients(parameters, workers)
        nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        decay = min(ema_decay, (step + 1 - warm) / (step + 10 - warm))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
            for mine, theirs in zip(ema.buffers(), model.buffers(), strict=True):
                mine.copy_(theirs)
        recent.append(loss.detach())
        if rank == 0 and (step + 1) % 100 == 0:
            pace = (time.time() - started) / (step + 1 - first)
            log.info(
                "%s step %d/%d loss %.4f, %.3f s a step, %.1f min left",
                name, step + 1, steps, torch.stack(recent).mean(), pace, pace * (steps - step - 1) / 60,
            )  # fmt: skip
            recent.clear()
        if rank == 0 and ((step + 1) % save_every == 0 or step + 1 == steps):
            _save(checkpoint, model, ema, optimizer, step + 1)
    return ema


def _cycle(
    step: int, steps: int, learning_rate: float, restart: tuple[int, float] | None
) -> tuple[int, int, float]:
    """First step, last step and highest learning rate of the cosine that `step` lies in."""
    if restart is None:
        return 0, steps, learning_rate
    at, again = restart
    return (0, at, learning_rate) if step < at else (at, steps, again)


def _cosine(done: float) -> float:
    return 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done))


def trained(cache: Path, name: str, model: nn.Module) -> nn.Module:
    """`model` with the EMA weights of the newest checkpoint `name`."""
    model.load_state_dict(torch.load(cache / f"{name}.pt", map_location="cpu", weights_only=True)["ema"])
    return model


def _average_gradients(parameters: list[nn.Parameter], workers: int) -> None:
    used = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.reshape(-1) for p in used])
    dist.all_reduce(flat)
    flat /= workers
    for p, grad in zip(used, flat.split([p.numel() for p in used]), strict=True):
        p.grad.copy_(grad.view_as(p))


def _save(path: Path, model: nn.Module, ema: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    part = path.with_suffix(".part")
    torch.save(
        {
            "model": model.state_dict(),
            "ema": ema.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": step,
        },
        part,
    )
    os.replace(part, path)
