import copy
import re
import sys
from pathlib import Path

import pytest
import torch

from kernels_warmup.attention import (
    BACKENDS,
    attend,
    resolve,
    set_attention,
    transformer_blocks,
    why_unusable,
)
from tests.kernels_warmup.tiny import relative_error, step_inputs, tiny_unet

CPU = torch.device("cpu")


@pytest.mark.parametrize("fuse", [False, True])
@pytest.mark.parametrize("backend", ["auto", "math"])
@pytest.mark.parametrize("batch", [1, 2])
def test_the_processor_gives_the_unmodified_result(backend: str, fuse: bool, batch: int) -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    set_attention(unet, backend, fuse_qkv=fuse)  # type: ignore[arg-type]
    inputs = step_inputs(batch)
    with torch.no_grad():
        assert relative_error(unet(**inputs)[0], plain(**inputs)[0]) < 1e-5


def test_fusing_takes_effect_on_self_attention_alone() -> None:
    unet = tiny_unet()
    set_attention(unet, "auto", fuse_qkv=True)
    used = []
    for name, module in unet.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *_, name=name: used.append(name))
    with torch.no_grad():
        unet(**step_inputs(2))
    blocks = len(transformer_blocks(unet))
    assert sum(name.endswith("attn1.to_qkv") for name in used) == blocks
    assert not any(name.endswith(("attn1.to_q", "attn1.to_k", "attn1.to_v")) for name in used)
    assert sum(name.endswith(("attn2.to_k", "attn2.to_v")) for name in used) == 2 * blocks


def test_the_named_backend_is_the_operator_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    unet = tiny_unet()
    set_attention(unet, "math")
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *_, **__: pytest.fail("PyTorch's choice ran instead of the named backend"),
    )
    with torch.no_grad():
        unet(**step_inputs(1))


def test_math_is_the_formula_with_a_float32_softmax() -> None:
    draw = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(2, 3, n, 8, generator=draw) for n in (9, 5, 5))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    assert relative_error(attend("math", query, key, value), expected) < 1e-6


@pytest.mark.parametrize("backend", ["cudnn", "flash", "xformers"])
def test_a_backend_that_cannot_run_here_says_why(backend: str) -> None:
    reason = why_unusable(backend, CPU, torch.bfloat16)  # type: ignore[arg-type]
    assert reason == f"attention backend '{backend}' needs a CUDA device; this is cpu"
    with pytest.raises(ValueError, match="needs a CUDA device"):
        resolve(backend, CPU, torch.bfloat16)  # type: ignore[arg-type]


MISSING = "libcudart.so.12: cannot open shared object file: No such file or directory"
UNDEFINED = "/site-packages/xformers/_C.so: undefined symbol: _ZN3c10"


@pytest.mark.parametrize(
    ("cause", "named"), [(MISSING, "libcudart.so.12"), (UNDEFINED, "_C.so: undefined symbol")]
)
@pytest.mark.parametrize("at_import", [True, False])
def test_xformers_that_does_not_load_names_the_library(
    cause: str, named: str, at_import: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "xformers"
    package.mkdir()
    # As the real one does: torch.ops.load_library raises from the linker's error, and is caught.
    load = f"raise OSError('Could not load this library: /a/_C.so') from OSError({cause!r})"
    caught = f"try:\n    {load}\nexcept OSError as e:\n    _cpp_library_load_exception = e\n"
    (package / "_cpp_lib.py").write_text(load if at_import else caught)
    (package / "__init__.py").write_text("from . import _cpp_lib")
    (package / "ops.py").write_text("")
    import_only_from(package.parent, monkeypatch)
    reason = why_unusable("xformers", torch.device("cuda"), torch.bfloat16)
    assert reason is not None
    assert named in reason
    assert "/" not in reason
    with pytest.raises(ValueError, match=re.escape(reason)):
        resolve("xformers", torch.device("cuda"), torch.bfloat16)


def test_xformers_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_only_from(tmp_path, monkeypatch)
    monkeypatch.setitem(sys.modules, "xformers", None)
    reason = why_unusable("xformers", torch.device("cuda"), torch.bfloat16)
    assert reason is not None
    assert "does not load" in reason


def import_only_from(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import `xformers` from this folder, and restore what was imported at the end."""
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("xformers", "xformers.ops", "xformers._cpp_lib"):
        # Recorded as absent, so that the fake is removed again.
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    monkeypatch.syspath_prepend(folder)


def test_an_unknown_backend_is_refused_naming_the_known_ones() -> None:
    reason = why_unusable("sage", CPU, torch.bfloat16)  # type: ignore[arg-type]
    assert reason is not None
    assert "'sage'" in reason
    assert all(backend in reason for backend in BACKENDS)
    assert resolve("auto", CPU, torch.float32) == "auto"


def test_attention_that_does_more_than_sdxls_is_refused() -> None:
    unet = tiny_unet()
    transformer_blocks(unet)[0].attn2.norm_q = torch.nn.LayerNorm(16)
    with pytest.raises(ValueError, match="norm_q"):
        set_attention(unet, "auto")
    unet = tiny_unet()
    set_attention(unet, "auto")
    with pytest.raises(ValueError, match="mask"):
        unet(**step_inputs(1), attention_mask=torch.ones(1, 7))
