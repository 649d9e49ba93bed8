"""The Triton kernels compiled for Hopper, without a GPU: registers, shared memory, instructions.

These tests find spilled registers and products that do not use the tensor cores' instructions. They
measure no speed.
"""

from __future__ import annotations

import math
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from tests.kernels_warmup.triton_here import require_triton

require_triton()

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kernels_warmup.triton import (  # noqa: E402
    cross_attention,
    geglu,
    layer_norm,
    self_attention,
)

HOPPER = GPUTarget("cuda", 90, 32)
SHARED_BYTES = 227 * 1024
"""The largest shared memory of one program."""


@dataclass(frozen=True)
class Compiled:
    ptx: str
    registers: int
    spilled_bytes: int
    shared_bytes: int
    serialized: bool
    """Whether the assembler serialises the products instead of letting several run."""

    def count(self, instruction: str) -> int:
        return len(re.findall(instruction, self.ptx))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    warps: int,
    stages: int = 3,
) -> Compiled:
    """Compile a kernel for Hopper.

    types: those of all arguments that are not constants. Pointers are aligned to 16 bytes; integers
        of type `i32*16` are multiples of 16.
    """
    names = kernel.arg_names
    assert set(names) == types.keys() | constants.keys()
    aligned = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name, type_ in types.items()
        if type_.startswith("*") or type_.endswith("*16")
    }
    signature = {name: types.get(name, "constexpr").removesuffix("*16") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values, aligned)
    options = {"num_warps": warps, "num_stages": stages}
    made = triton.compile(source, target=HOPPER, options=options)
    report = assembled(made.asm["ptx"])
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers is not None, report
    assert spills is not None, report
    result = Compiled(
        made.asm["ptx"],
        int(registers[1]),
        int(spills[1]) + int(spills[2]),
        int(made.metadata.shared),
        "wgmma.mma_async instructions are serialized" in report,
    )
    print(f"{result.registers} registers, {result.shared_bytes} bytes shared")
    return result


def assembled(ptx: str) -> str:
    """The report of the assembler that comes with Triton."""
    ptxas = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    done = subprocess.run(
        [ptxas, "-v", "--gpu-name", "sm_90a", "-o", "/dev/null", "-"],
        input=ptx,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stderr


def compiled_norm(
    width: int,
    how: layer_norm.Launch,
    *,
    add: bool,
    shift: bool = False,
    scales: str = "none",
) -> Compiled:
    head, tail = layer_norm.split(width)
    pointers = ("hidden", "change", "missing", "weight", "bias", "total", "normed", "scales")
    numbers = ("rows", "first_changed", "first_normed")
    types = dict.fromkeys(pointers, "*bf16") | dict.fromkeys(numbers, "i32") | {"eps": "fp32"}
    if shift:
        types["missing"] = "*fp32"
    if scales != "none":
        types |= {"normed": "*fp8e4nv", "scales": "*fp32"}
    constants = {"ADD": add, "SHIFT": shift, "SCALES": scales}
    constants |= {"HEAD": head, "TAIL": tail, "ROWS": how.rows}
    return compiled(layer_norm._add_layer_norm_kernel, types, constants, how.warps)


def compiled_attention(keys: int, how: cross_attention.Launch) -> Compiled:
    head, tail = cross_attention.split(keys)
    strides = [f"{of}_{by}" for of in ("query", "key", "value") for by in ("batch", "token")]
    types = dict.fromkeys(("query", "key", "value", "out"), "*bf16")
    types |= dict.fromkeys(strides, "i32*16")
    types |= {"tokens": "i32", "keys": "i32", "scale": "fp32"}
    constants = {"SIZE": 64, "HEAD": head, "TAIL": tail, "QUERIES": how.queries}
    return compiled(cross_attention._few_keys_kernel, types, constants, how.warps)


def compiled_self_attention(how: self_attention.Launch, *, whole: bool = True) -> Compiled:
    """whole: the tokens fill the tiles of keys. 1,024 do; the 988 of 1216x832 do not."""
    rows = {"query": how.queries, "key": how.keys, "value": how.keys, "out": how.queries}
    types = {name: f"tensordesc<bf16[1,{count},64]>" for name, count in rows.items()}
    types |= {"tokens": "i32", "scale": "fp32"}
    constants = {"SIZE": 64, "QUERIES": how.queries, "KEYS": how.keys, "WHOLE": whole}
    kernel = self_attention._self_attention_kernel
    return compiled(kernel, types, constants, how.warps, how.stages)


def compiled_geglu(how: geglu.Launch) -> Compiled:
    types = {
        "hidden": f"tensordesc<bf16[{how.rows},{how.inner}]>",
        "weight": f"tensordesc<bf16[2,{how.columns},{how.inner}]>",
        "out": f"tensordesc<bf16[{how.rows},{how.columns}]>",
        "bias": "*bf16",
        "rows": "i32",
        "columns": "i32*16",
        "inner": "i32*16",
    }
    constants = {
        "PROGRAMS": 132 * how.programs,
        "ROWS": how.rows,
        "COLUMNS": how.columns,
        "INNER": how.inner,
        "TOGETHER": geglu.TILES_TOGETHER,
        "FLATTEN": how.flatten,
    }
    return compiled(geglu._geglu_kernel, types, constants, how.warps, how.stages)


def check_norm(made: Compiled, how: layer_norm.Launch) -> None:
    assert made.spilled_bytes == 0
    if how.warps == 1:
        # The sums of a row stay in its warp.
        assert made.shared_bytes == 0
        assert made.count(r"bar\.sync") == 0
        assert made.count(r"shfl\.sync\.bfly") > 0


@pytest.mark.parametrize("add", [True, False], ids=["sum and norm", "norm alone"])
@pytest.mark.parametrize("width", [640, 1280])
def test_a_row_stays_in_one_warps_registers(width: int, add: bool) -> None:
    how = layer_norm.launch_for(width)
    made = compiled_norm(width, how, add=add)
    check_norm(made, how)
    # Every thread accesses 16 bytes at a time, with one exception: of the last 128 of 640 channels
    # a warp needs one row of weight and bias, which is 8 bytes per thread.
    narrow = 2 if width == 640 else 0
    assert made.count(r"ld\.global") - narrow == made.count(r"ld\.global\.v4\.b32") > 0
    assert made.count(r"st\.global") == made.count(r"st\.global\.v4\.b32") > 0
    # The 65,536 registers of a multiprocessor suffice for at least 16 programs of one warp.
    assert made.registers <= 128


@pytest.mark.parametrize("width", [640, 1280])
def test_the_norm_of_a_shifted_row_stays_in_registers_too(width: int) -> None:
    how = layer_norm.launch_for(width)
    made = compiled_norm(width, how, add=False, shift=True)
    check_norm(made, how)
    assert made.registers <= 128


@pytest.mark.parametrize("scales", ["row", "one"])
@pytest.mark.parametrize("add", [True, False], ids=["sum and norm", "norm alone"])
@pytest.mark.parametrize("width", [640, 1280])
def test_a_norm_as_fp8_stays_in_one_warps_registers(width: int, add: bool, scales: str) -> None:
    how = layer_norm.launch_for(width)
    made = compiled_norm(width, how, add=add, scales=scales)
    check_norm(made, how)
    assert made.registers <= 128
    # Two values at a time; a value that is too large becomes fp8's largest number.
    pairs = width * how.rows // 32 // 2
    assert made.count(r"cvt\.rn\.satfinite\.e4m3x2\.f32") == pairs
    # A thread's 8 neighbours are 16 bytes of bfloat16 and 8 of fp8; threads exchange none.
    assert made.count(r"st\.global\.v4\.b32") == (pairs // 4 if add else 0)
    assert made.count(r"st\.global\.v2\.b32") == pairs // 4
    assert made.count(r"st\.global\.b32") == (scales == "row")


@pytest.mark.slow
@pytest.mark.parametrize("how", layer_norm.CANDIDATES, ids=str)
@pytest.mark.parametrize("width", [640, 1280])
def test_no_candidate_of_the_norm_spills(width: int, how: layer_norm.Launch) -> None:
    check_norm(compiled_norm(width, how, add=True), how)
    assert compiled_norm(width, how, add=True, scales="row").spilled_bytes == 0


def check_attention(made: Compiled) -> None:
    assert made.spilled_bytes == 0
    assert not made.serialized
    assert made.shared_bytes < SHARED_BYTES // 3
    # 77 keys become 64 and 16: products of both widths and no others.
    assert made.count(r"wgmma\.mma_async\S*m64n64k16") > 0
    assert made.count(r"wgmma\.mma_async\S*m64n16k16") > 0
    assert made.count(r"mma\.sync") == 0


def test_attention_to_77_keys_runs_on_the_tensor_cores_from_registers() -> None:
    made = compiled_attention(77, cross_attention.launch_for(1024))
    check_attention(made)
    # Queries are read, and results written, 16 bytes at a time.
    assert made.count(r"st\.global") == made.count(r"st\.global\.v4\.b32") > 0
    # Three programs of 8 warps fit a multiprocessor, so the 320 for 1,024 tokens run at once.
    assert made.registers * 256 * 3 <= 65536


@pytest.mark.slow
@pytest.mark.parametrize("how", cross_attention.CANDIDATES, ids=str)
def test_no_candidate_of_the_attention_spills(how: cross_attention.Launch) -> None:
    check_attention(compiled_attention(77, how))


def check_self_attention(made: Compiled, how: self_attention.Launch) -> None:
    assert made.spilled_bytes == 0
    assert not made.serialized
    assert made.shared_bytes <= SHARED_BYTES
    # Products for the scores of a tile of keys and for 64 channels; bulk copies load all operands.
    assert made.count(rf"wgmma\.mma_async\S*m64n{how.keys}k16") > 0
    assert made.count(r"wgmma\.mma_async\S*m64n64k16") > 0
    assert made.count(r"mma\.sync") == 0
    assert made.count(r"ld\.global") == 0
    assert made.count(r"st\.global") == 0
    # The softmax weights pass from one product to the next in registers.
    assert made.count(r"ld\.shared\.(v|b)") == made.count("ldmatrix") == 0


@pytest.mark.parametrize("whole", [True, False], ids=["1024", "988"])
def test_all_programs_of_self_attention_run_at_once(whole: bool) -> None:
    how = self_attention.CHOSEN
    made = compiled_self_attention(how, whole=whole)
    check_self_attention(made, how)
    # 8 tiles of each of 40 heads run at once on 132 multiprocessors: up to three on each.
    together = math.ceil(40 * 1024 / how.queries / 132)
    assert together == 3
    assert math.ceil(made.registers / 8) * 8 * 32 * how.warps * together <= 65536
    # Of the 228 kB, every program uses 1 kB in addition to its own.
    assert (made.shared_bytes + 1024) * together <= 228 * 1024


@pytest.mark.slow
@pytest.mark.parametrize("how", self_attention.CANDIDATES, ids=str)
def test_no_candidate_of_self_attention_spills(how: self_attention.Launch) -> None:
    check_self_attention(compiled_self_attention(how), how)


def check_geglu(made: Compiled, how: geglu.Launch) -> None:
    assert made.spilled_bytes == 0
    assert not made.serialized
    assert made.shared_bytes * how.programs <= SHARED_BYTES
    # Value and gate are columns of one product ...
    assert made.count(rf"wgmma\.mma_async\S*m64n{2 * how.columns}k16") > 0
    assert made.count(r"mma\.sync") == 0
    # ... and one thread holds both, so splitting them needs no shared memory.
    assert made.count(r"ld\.shared\.(v|b)") == 0
    # The tensor memory accelerator loads operands and stores results.
    assert made.count(r"cp\.async\.bulk\.tensor\.3d\.shared") > 0
    assert made.count(r"cp\.async\.bulk\.tensor\.2d\.shared") > 0
    assert made.count(r"cp\.async\.bulk\.tensor\.2d\.global") > 0


def test_geglu_is_one_product_on_the_tensor_cores() -> None:
    how = geglu.launch_for(2048, 5120, 1280)
    assert how == geglu.launch_for(8192, 2560, 640)
    check_geglu(compiled_geglu(how), how)


@pytest.mark.slow
@pytest.mark.parametrize("how", geglu.CANDIDATES, ids=str)
def test_no_candidate_of_geglu_spills(how: geglu.Launch) -> None:
    check_geglu(compiled_geglu(how), how)


@pytest.mark.slow
def test_serialised_products_would_be_detected() -> None:
    """The registers of four warps are too few for 128 keys per step and 128 queries."""
    assert compiled_self_attention(replace(self_attention.CHOSEN, keys=128)).serialized


@pytest.mark.slow
def test_a_spill_would_be_detected() -> None:
    """The registers of four warps are too few for a tile with twice as many accumulators."""
    assert compiled_geglu(replace(geglu.Launch(), warps=4)).spilled_bytes > 0


def test_every_launch_setting_in_use_is_a_candidate_of_the_bench() -> None:
    assert {layer_norm.launch_for(width) for width in (640, 1280)} <= set(layer_norm.CANDIDATES)
    assert {cross_attention.launch_for(n) for n in (1024, 4096)} <= set(cross_attention.CANDIDATES)
    assert self_attention.CHOSEN in self_attention.CANDIDATES
    assert geglu.launch_for(2048, 5120, 1280) in geglu.CANDIDATES
    assert geglu.launch_for(8192, 2560, 640) in geglu.CANDIDATES


def test_sizes_that_no_kernel_can_compute_are_refused() -> None:
    with pytest.raises(ValueError, match="a row of 896"):
        layer_norm.split(896)
    with pytest.raises(ValueError, match="multiples of 8 and 16"):
        geglu.launch_for(10, 40, 64)
    assert cross_attention.split(77) == (64, 16)
    assert cross_attention.split(16) == (16, 0)
    assert cross_attention.split(128) == (128, 0)
    assert cross_attention.why_unusable(77, 64) is None
    assert "129 keys" in str(cross_attention.why_unusable(129, 64))
    assert self_attention.why_unusable(1024, 1024, 64) is None
    assert "77 keys" in str(self_attention.why_unusable(1024, 77, 64))
    assert "a head of 48" in str(self_attention.why_unusable(64, 64, 48))
    assert "a head of 48" in str(cross_attention.why_unusable(77, 48))
