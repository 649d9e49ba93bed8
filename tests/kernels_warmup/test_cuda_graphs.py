import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from kernels_warmup import cuda_graphs
from kernels_warmup.compile import capture_text_encoders
from kernels_warmup.cuda_graphs import Captured, Fallbacks, PerShape
from kernels_warmup.recipes import MODES, RECIPES, Recipe
from kernels_warmup.warmup import compiler_counts

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():  # type: ignore[no-untyped-def]
    with torch.no_grad():
        yield


def test_when_frozen_a_cold_shape_runs_eagerly_and_is_counted() -> None:
    function = PerShape(lambda a: a + 1, RECIPES["default"], CPU)
    function(torch.zeros(2))
    function(torch.zeros(2))
    function(torch.zeros(3))
    assert len(function.met) == 2
    function.frozen = True
    assert torch.equal(function(torch.zeros(4)), torch.ones(4))
    assert len(function.met) == 2
    assert function.fallbacks == Fallbacks(cold=1)


def test_each_size_of_the_buffers_that_a_function_reads_is_warmed_by_itself() -> None:
    function = PerShape(lambda a: a + 1, RECIPES["default"], CPU)
    function(torch.zeros(2), buffers=77)
    function.frozen = True
    function(torch.zeros(2), buffers=77)
    assert function.fallbacks == Fallbacks()
    function(torch.zeros(2), buffers=154)
    assert function.fallbacks == Fallbacks(cold=1)


def test_when_frozen_a_recompile_runs_eagerly_instead_and_is_counted() -> None:
    """A guard of the compiler fails though the shapes are the same: a global has changed."""
    scale = {"by": 2.0}
    traced = []

    def function(tensor: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            traced.append("eager")
        return tensor * scale["by"]

    per_shape = PerShape(
        torch.compile(function, backend="eager", fullgraph=True, dynamic=False),
        RECIPES["default"],
        CPU,
    )
    per_shape(torch.ones(2))
    per_shape.frozen = True
    assert torch.equal(per_shape(torch.ones(2)), torch.full((2,), 2.0))
    assert traced == []
    assert per_shape.fallbacks == Fallbacks()
    scale["by"] = 3.0
    before = compiler_counts().graphs
    assert torch.equal(per_shape(torch.ones(2)), torch.full((2,), 3.0))
    assert traced == ["eager"]
    assert compiler_counts().graphs == before
    assert per_shape.fallbacks == Fallbacks(recompiles=1)
    scale["by"] = 2.0
    per_shape(torch.ones(2))
    assert traced == ["eager"]
    per_shape.frozen = False
    scale["by"] = 3.0
    per_shape(torch.ones(2))
    assert traced == ["eager"]
    assert compiler_counts().graphs == before + 1
    torch.compiler.reset()


def test_when_frozen_other_errors_are_raised() -> None:
    def broken(tensor: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of order")

    per_shape = PerShape(broken, RECIPES["default"], CPU)
    per_shape.met.add(((torch.Size([1]), torch.float32),))
    per_shape.frozen = True
    with pytest.raises(RuntimeError, match="out of order"):
        per_shape(torch.zeros(1))
    assert per_shape.fallbacks == Fallbacks()


def test_where_nothing_is_compiled_no_shape_is_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the compiler was asked")

    per_shape = PerShape(lambda a: a + 1, RECIPES["rewritten"], CPU)
    per_shape.frozen = True
    monkeypatch.setattr(torch.compiler, "set_stance", never)
    assert per_shape(torch.zeros(1)) == 1
    assert per_shape(torch.zeros(2)).shape == (2,)
    assert per_shape.fallbacks == Fallbacks()
    # A captured graph belongs to one shape, whether its function is compiled or not.
    captured = replace(RECIPES["rewritten"], replay="captured")
    assert PerShape(torch.relu, captured, torch.device("cuda")).has_graphs


def test_more_shapes_than_dynamos_own_limit_stay_compiled() -> None:
    traced = []

    def function(tensor: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return tensor + 1
        traced.append(tensor.shape)
        return tensor + 1

    compiled = torch.compile(function, backend="eager", dynamic=False)
    per_shape = PerShape(compiled, RECIPES["default"], CPU)
    for size in range(2, 14):
        per_shape(torch.zeros(size))
    for size in range(2, 14):
        per_shape(torch.zeros(size))
    assert not traced
    torch.compiler.reset()


class Recorded:
    """Replaces `Captured` on a CPU: it calls the function that it was captured with."""

    made: ClassVar[list[tuple[int, ...]]] = []
    replays = 0

    def __init__(self, function: Any, inputs: tuple[torch.Tensor, ...], pool: Any) -> None:
        self.made.append(tuple(inputs[0].shape))
        self._function = function

    def replay(self, inputs: tuple[torch.Tensor, ...]) -> Any:
        type(self).replays += 1
        return self._function(*inputs)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    """`PerShape` captures with `Recorded`, so that a CPU can run its CUDA path."""
    monkeypatch.setattr(Recorded, "made", [])
    monkeypatch.setattr(Recorded, "replays", 0)
    monkeypatch.setattr("kernels_warmup.cuda_graphs.Captured", Recorded)
    return Recorded


def test_a_graph_of_several_outputs_is_captured_once_a_shape(recorded: type[Recorded]) -> None:
    calls = []

    def both(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(tuple(ids.shape))
        return ids + 1, ids * 2

    per_shape = PerShape(both, Recipe(scope="none", replay="captured"), torch.device("cuda"))
    for batch in (1, 2, 1, 2):
        first, second = per_shape(torch.full((batch, 7), 3))
        assert (first == 4).all()
        assert (second == 6).all()
    assert recorded.made == [(1, 7), (2, 7)]
    assert recorded.replays == 2
    per_shape.frozen = True
    first, _ = per_shape(torch.full((4, 7), 3))
    assert (first == 4).all()
    assert per_shape.fallbacks == Fallbacks(cold=1)
    assert recorded.made == [(1, 7), (2, 7)]


def test_all_functions_run_on_one_stream_before_they_are_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch keeps a workspace for each stream that has run a product."""
    made: list[Any] = []
    ran_on: list[Any] = []
    current: list[Any] = [SimpleNamespace(wait_stream=lambda _: None)]

    @contextmanager
    def on(stream: Any, *_: Any, **__: Any) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    def new_stream(*_: Any) -> Any:
        made.append(SimpleNamespace(wait_stream=lambda _: None))
        return made[-1]

    def function(tensor: torch.Tensor) -> torch.Tensor:
        ran_on.append(current[-1])
        return tensor + 1

    replaced = {
        "Stream": new_stream,
        "CUDAGraph": object,
        "current_stream": lambda: current[-1],
        "synchronize": lambda: None,
        "stream": on,
        "graph": on,
    }
    for name, stand_in in replaced.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    cuda_graphs._side_stream.cache_clear()
    for size in (2, 3, 4):
        captured = Captured(function, (torch.zeros(size),), None)
        assert ran_on == [made[0], made[0], captured._graph]
        ran_on.clear()
    assert len(made) == 1
    cuda_graphs._side_stream.cache_clear()


@pytest.mark.parametrize("several", [False, True])
def test_a_replay_does_not_overwrite_earlier_results(several: bool) -> None:
    held, output = torch.zeros(2), torch.zeros(2)
    captured = object.__new__(Captured)
    captured._inputs = (held,)
    captured._output = (output, output) if several else output
    captured._graph = SimpleNamespace(replay=lambda: output.copy_(held))
    kept = [captured.replay((torch.full((2,), value),)) for value in (1.0, 2.0)]
    for value, given in zip((1.0, 2.0), kept, strict=True):
        for one in given if several else (given,):
            assert torch.equal(one, torch.full((2,), value))


def text_encoders() -> Any:
    """SDXL's two text encoders: one with a projection, one without."""
    torch.manual_seed(0)
    common = {
        "vocab_size": 60,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "max_position_embeddings": 7,
    }
    first = CLIPTextModel(CLIPTextConfig(**common, num_hidden_layers=3, eos_token_id=2))
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(**common, num_hidden_layers=4, projection_dim=24, eos_token_id=59)
    )
    return SimpleNamespace(text_encoder=first.eval(), text_encoder_2=second.eval())


def test_captured_text_encoders_return_what_sdxl_reads(recorded: type[Recorded]) -> None:
    models = text_encoders()
    plain = copy.deepcopy(models)
    for encoder in (models.text_encoder, models.text_encoder_2):
        type(encoder).device = property(lambda _: torch.device("cuda"))
    try:
        functions = capture_text_encoders(models, Recipe(scope="none", replay="none"))
    finally:
        for encoder in (models.text_encoder, models.text_encoder_2):
            del type(encoder).device
    ids = torch.randint(0, 59, (2, 7), generator=torch.Generator().manual_seed(1))
    ids[:, -1] = 59
    for batch in (1, 2, 2):
        for name in ("text_encoder", "text_encoder_2"):
            ours = getattr(models, name)(ids[:batch], output_hidden_states=True)
            theirs = getattr(plain, name)(ids[:batch], output_hidden_states=True)
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours.hidden_states[-2], theirs.hidden_states[-2])
    assert recorded.made == [(1, 7), (1, 7), (2, 7), (2, 7)]
    assert recorded.replays == 2
    for function in functions:
        function.frozen = True
    models.text_encoder(ids[:1].repeat(5, 1), output_hidden_states=True)
    assert [function.fallbacks.cold for function in functions] == [1, 0]
    with pytest.raises(TypeError, match="hidden states"):
        models.text_encoder(ids, output_hidden_states=False)


def test_text_encoders_are_captured_by_max_alone_and_on_no_cpu() -> None:
    assert [mode for mode in MODES if RECIPES[mode].text_encoders] == ["max"]
    models = text_encoders()
    first, second = capture_text_encoders(models, RECIPES["max"])
    ids = torch.full((1, 7), 59)
    models.text_encoder(ids, output_hidden_states=True)
    models.text_encoder(ids, output_hidden_states=True)
    assert first._captured == {}
    assert (len(first.met), len(second.met)) == (1, 0)


def test_encoding_text_reads_no_value_and_branches_on_none() -> None:
    """On the meta device no value can be read, so what a capture cannot contain fails here too."""
    for encoder in vars(text_encoders()).values():
        with torch.device("meta"):
            twin = type(encoder)(encoder.config).eval()
            output = twin(torch.zeros(2, 7, dtype=torch.long), output_hidden_states=True)
        assert output.hidden_states[-2].shape == (2, 7, 32)


def test_the_default_mode_captures_on_cuda() -> None:
    assert PerShape(torch.relu, RECIPES["default"], torch.device("cuda"))._replay == "captured"
    assert PerShape(torch.relu, RECIPES["default"], CPU)._replay == "none"
    assert callable(Captured.replay)
