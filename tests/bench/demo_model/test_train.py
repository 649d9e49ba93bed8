"""The training program on a few scenes: what it repeats, resumes and writes."""

import json
import math
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from bench.demo_model.architecture import build_pipeline
from bench.demo_model.losses import encode_tokens
from bench.demo_model.train import train, write_archive
from bench.demo_model.trainer import Trainer
from bench.demo_model.training_data import (
    CAPTIONS_PER_SCENE,
    load_scenes,
    render_scenes,
    tokenizer_of,
)
from bench.demo_model.training_plan import Limit, TrainingPlan

# diffusers' schedulers hand tensors to numpy the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

CPU = torch.device("cpu")


def plan(**changes: object) -> TrainingPlan:
    values: dict[str, object] = {
        "seed": 0,
        "scenes": 6,
        "vae": Limit(2, None),
        "vae_batch": 2,
        "diffusion": Limit(2, None),
        "diffusion_batch": 2,
    }
    return TrainingPlan(**(values | changes))  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def line_trainer(folder: Path, steps: int, *, save_seconds: float = math.inf) -> Trainer:
    """A trainer of one straight line, whose module is its attribute `line`."""
    torch.manual_seed(0)
    line = torch.nn.Linear(1, 1)
    trainer = Trainer(
        "line",
        torch.nn.ModuleDict({"line": line}),
        Limit(steps, None),
        rate=0.05,
        decay=0.9,
        seed=3,
        state_file=folder / "line.pt",
        save_seconds=save_seconds,
        device=CPU,
    )
    trainer.line = line  # type: ignore[attr-defined]
    return trainer


def fit(trainer: Trainer, *, stop_at: int | None = None) -> tuple[float, float]:
    line = trainer.line  # type: ignore[attr-defined]

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        if step == stop_at:
            raise KeyboardInterrupt
        x = torch.randn(16, 1, generator=generator)
        return (line(x) - (3 * x - 1)).square().mean()

    trainer.run(loss_of)
    return line.weight.item(), line.bias.item()


def test_it_learns(tmp_path: Path) -> None:
    weight, bias = fit(line_trainer(tmp_path, 400))
    assert weight == pytest.approx(3, abs=0.1)
    assert bias == pytest.approx(-1, abs=0.1)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    whole = fit(line_trainer(tmp_path / "whole", 60))
    with pytest.raises(KeyboardInterrupt):
        fit(line_trainer(tmp_path / "broken", 60, save_seconds=-1), stop_at=25)
    resumed = line_trainer(tmp_path / "broken", 60)
    assert resumed.step == 25
    assert fit(resumed) == whole


def test_a_finished_phase_is_not_trained_again(tmp_path: Path) -> None:
    first = fit(line_trainer(tmp_path, 30))
    again = line_trainer(tmp_path, 30)
    assert fit(again, stop_at=30) == first
    assert fit(line_trainer(tmp_path, 30)) == first


def test_a_phase_ends_by_steps_or_by_seconds_whichever_comes_first() -> None:
    limit = Limit(100, 10.0)
    assert limit.progress(50, 1.0) == 0.5
    assert limit.progress(50, 9.0) == 0.9
    assert limit.progress(100, 1.0) == limit.progress(0, 11.0) == 1.0
    assert Limit(None, 10.0).progress(10_000, 5.0) == 0.5


@pytest.mark.slow
def test_processes_render_the_scenes_one_process_does(tmp_path: Path) -> None:
    # In a process of its own: forking one that holds threads warns, and warnings are errors here.
    program = """
import hashlib, pathlib, sys
from bench.demo_model.training_data import render_scenes
from bench.demo_model.training_plan import Limit, TrainingPlan

plan = TrainingPlan(0, 600, Limit(1, None), 1, Limit(1, None), 1)
for workers in (1, 2):
    folder = pathlib.Path(sys.argv[1], str(workers))
    folder.mkdir()
    rendered = render_scenes(plan, workers, folder)
    parts = [pixels.tobytes() + "|".join(captions).encode() for pixels, captions in rendered]
    print(hashlib.sha256(b"".join(parts)).hexdigest())
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    in_one, in_two = output.split()
    assert in_one == in_two


def test_scenes_of_both_sizes_come_with_their_captions(tmp_path: Path) -> None:
    rendered = render_scenes(plan(), 1, tmp_path)
    assert [pixels.shape for pixels, _ in rendered] == [(4, 128, 128, 3), (2, 96, 160, 3)]
    assert [len(captions) for _, captions in rendered] == [
        4 * CAPTIONS_PER_SCENE,
        2 * CAPTIONS_PER_SCENE,
    ]


def test_the_model_is_trained_on_the_inputs_the_pipeline_sends() -> None:
    pipeline = build_pipeline(0)
    prompts = ["a red circle", ""]
    with torch.no_grad():
        hidden, pooled = encode_tokens(pipeline, tokenizer_of(pipeline)(prompts).long())
        expected = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    torch.testing.assert_close(hidden, expected[0])
    torch.testing.assert_close(pooled, expected[2])

    scenes = load_scenes(plan(), tokenizer_of(pipeline), CPU, 1)
    for some in scenes:
        size = (some.height, some.width)
        sent = pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, 96)
        assert torch.equal(some.time_ids[None], sent)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("training")
    run(out)
    return out


def run(out: Path, **changes: object) -> dict[str, object]:
    return train(
        plan(**changes),
        out,
        device=CPU,
        workers=1,
        save_seconds=math.inf,
        archive=out / "checkpoint.tar",
        prompts=1,
        steps=2,
    )


@pytest.mark.slow
def test_a_whole_run_leaves_checkpoint_card_figures_grid_and_archive(trained: Path) -> None:
    metrics = json.loads((trained / "metrics.json").read_text())
    assert metrics["vae_steps"] == metrics["diffusion_steps"] == 2
    assert set(metrics["figures"]) >= {"128x128 one object", "160x96 two objects", "128x128 vae"}
    card = (trained / "checkpoint" / "README.md").read_text()
    assert "## Figures" in card
    assert "| 160x96 two objects | 1 |" in card
    assert max(len(line) for line in card.splitlines()) <= 100
    assert (trained / "grid.png").stat().st_size > 0
    with tarfile.open(trained / "checkpoint.tar") as tar:
        names = tar.getnames()
    assert {"checkpoint/model_index.json", "checkpoint/README.md"} <= set(names)


@pytest.mark.slow
def test_training_moves_every_part_but_leaves_random_numbers_alone(trained: Path) -> None:
    before = torch.random.get_rng_state()
    fresh = build_pipeline(0)
    assert torch.equal(before, torch.random.get_rng_state())
    state = torch.load(trained / "work" / "diffusion.pt", weights_only=True)
    name = "unet.conv_in.weight"
    assert not torch.equal(state["modules"][name], fresh.unet.conv_in.weight)


@pytest.mark.slow
def test_states_of_another_plan_are_refused(trained: Path) -> None:
    with pytest.raises(SystemExit, match="another plan"):
        run(trained, seed=1)


def test_an_archive_of_the_same_files_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "file").write_text("text")
    write_archive(folder, tmp_path / "one.tar")
    (folder / "file").touch()
    write_archive(folder, tmp_path / "two.tar")
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()


def test_noise_depends_on_seed_phase_and_step_alone(tmp_path: Path) -> None:
    draws: list[list[float]] = []
    for folder in ("one", "two"):
        trainer = line_trainer(tmp_path / folder, 3)

        def loss_of(
            step: int,
            generator: torch.Generator,
            trainer: Trainer = trainer,
        ) -> torch.Tensor:
            draws.append(torch.rand(2, generator=generator).tolist())
            return trainer.line.weight.square().sum()  # type: ignore[attr-defined]

        trainer.run(loss_of)
    assert draws[:3] == draws[3:]
    assert len({tuple(draw) for draw in draws}) == 3
