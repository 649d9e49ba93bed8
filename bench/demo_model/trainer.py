"""The training loop of one phase: optimiser, learning rate, averaged weights, saved states."""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from bench.demo_model.training_plan import Limit

_WARM_UP = 0.03
"""The share of a phase in which the learning rate rises."""


class Trainer:
    """Trains modules until a limit, from the start or from a saved state.

    Each step seeds its random numbers with the seed, the phase's name and the step's index, so a
    resumed run ends with the same weights as an uninterrupted one.
    """

    def __init__(
        self,
        name: str,
        modules: nn.ModuleDict,
        limit: Limit,
        *,
        rate: float,
        decay: float,
        seed: int,
        state_file: Path,
        save_seconds: float,
        device: torch.device,
    ) -> None:
        self.name = name
        self.limit = limit
        self.step = 0
        self.seconds = 0.0
        self.done = False
        self.losses: list[tuple[int, float]] = []
        self._modules = modules
        self._rate = rate
        self._decay = decay
        self._seed = seed
        self._state_file = state_file
        self._save_seconds = save_seconds
        self._device = device
        self._weights: list[Tensor] = list(modules.parameters())
        self._averages: list[Tensor] = [weight.detach().clone() for weight in self._weights]
        self._optimizer = torch.optim.AdamW(
            self._weights,
            lr=rate,
            betas=(0.9, 0.98),
            weight_decay=0.01,
            fused=device.type == "cuda",
        )
        if state_file.exists():
            self._restore()

    def run(
        self,
        loss_of: Callable[[int, torch.Generator], Tensor],
        on_save: Callable[[], None] = lambda: None,
    ) -> None:
        """Train until the limit; afterwards the modules hold the averaged weights.

        Args:
            loss_of: the loss of a step, given its index and its random generator.
            on_save: called after each saved state, while the modules hold the averaged weights.
        """
        generator = torch.Generator(self._device)
        bar = Progress(self.name)
        loss = torch.tensor(math.nan)
        resumed, begun = self.seconds, time.perf_counter()
        saved = shown = begun
        self._modules.train()
        while not self.done:
            self.seconds = resumed + time.perf_counter() - begun
            progress = self.limit.progress(self.step, self.seconds)
            if progress >= 1:
                self.done = True
                break
            generator.manual_seed(_step_seed(self._seed, self.name, self.step))
            loss = self._advance(loss_of, generator, progress)
            now = time.perf_counter()
            if now - shown > bar.interval or self.step == 1:
                shown = now
                self.losses.append((self.step, float(loss)))
                bar.show(progress, self.step, self.seconds, float(loss))
            if now - saved > self._save_seconds:
                self._save()
                with self.averaged():
                    on_save()
                saved = time.perf_counter()
        self._modules.eval()
        self._swap()
        self._save()
        bar.close(self.step, self.seconds, float(loss))

    def _advance(
        self,
        loss_of: Callable[[int, torch.Generator], Tensor],
        generator: torch.Generator,
        progress: float,
    ) -> Tensor:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate * _schedule(progress)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._device.type == "cuda"):
            loss = loss_of(self.step, generator)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self._decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._averages, self._weights, 1 - keep)
        return loss.detach()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """A block in which the modules hold the averaged weights."""
        self._modules.eval()
        self._swap()
        try:
            yield
        finally:
            self._swap()
            self._modules.train()

    def _swap(self) -> None:
        with torch.no_grad():
            for weight, average in zip(self._weights, self._averages, strict=True):
                kept = weight.detach().clone()
                weight.copy_(average)
                average.copy_(kept)

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "done": self.done,
            "losses": self.losses,
            "modules": self._modules.state_dict(),
            "averages": self._averages,
            "optimizer": self._optimizer.state_dict(),
        }
        self._state_file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self._state_file.with_suffix(".new")
        torch.save(state, unfinished)
        unfinished.replace(self._state_file)

    def _restore(self) -> None:
        state = torch.load(self._state_file, map_location=self._device, weights_only=True)
        self.step, self.seconds, self.done = state["step"], state["seconds"], state["done"]
        self.losses = [(int(step), float(loss)) for step, loss in state["losses"]]
        self._modules.load_state_dict(state["modules"])
        self._optimizer.load_state_dict(state["optimizer"])
        for average, kept in zip(self._averages, state["averages"], strict=True):
            average.copy_(kept)
        if self.done:
            # The modules of a finished state hold the averages, and `run` swaps once more.
            self._swap()


def _schedule(progress: float) -> float:
    """Learning rate as a share of its peak: a linear rise, then half a cosine down to 0.01."""
    if progress < _WARM_UP:
        return max(progress / _WARM_UP, 1e-3)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - _WARM_UP) / (1 - _WARM_UP)))


def _step_seed(seed: int, name: str, step: int) -> int:
    mixed = np.random.SeedSequence([seed, *name.encode(), step]).generate_state(1, np.uint64)[0]
    return int(mixed) >> 1


class Progress:
    """Progress on stderr: a bar on a terminal, plain lines elsewhere."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._terminal = sys.stderr.isatty()
        self.interval = 0.5 if self._terminal else 10.0

    def show(self, progress: float, step: int, seconds: float, loss: float) -> None:
        filled = round(progress * 24)
        bar = f"[{'#' * filled}{'.' * (24 - filled)}] " if self._terminal else ""
        text = f"{self._name} {bar}{progress:4.0%} step {step} {seconds:.0f} s loss {loss:.5f}"
        sys.stderr.write(f"\r{text} " if self._terminal else f"{text}\n")
        sys.stderr.flush()

    def close(self, step: int, seconds: float, loss: float) -> None:
        start = "\r" if self._terminal else ""
        sys.stderr.write(
            f"{start}{self._name} done: {step} steps, {seconds:.0f} s, last loss {loss:.5f}\n"
        )
        sys.stderr.flush()


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
