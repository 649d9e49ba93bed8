import pytest

from kernels_warmup.shapes import DEMO_SHAPES, SDXL_SHAPES, CompiledShape


def test_a_size_is_parsed_and_printed() -> None:
    shape = CompiledShape.parse(" 1152x896 ")
    assert (shape.width, shape.height) == (1152, 896)
    assert str(shape) == "1152x896"
    assert shape.latent == (112, 144)
    assert CompiledShape.parse("64X2048") == CompiledShape(64, 2048)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "WIDTHxHEIGHT"),
        ("1024", "'1024'"),
        ("1024x", "'1024x'"),
        ("-64x64", "'-64x64'"),
        ("1024x1024x3", "WIDTHxHEIGHT"),
        ("1020x1024", "width 1020"),
        ("1024x56", "height 56"),
        ("2056x1024", "from 64 to 2048"),
        ("999999x64", "'999999x64'"),
        ("١٠٢٤x١٠٢٤", "WIDTHxHEIGHT"),
    ],
)
def test_a_wrong_size_is_refused_by_name(text: str, named: str) -> None:
    with pytest.raises(ValueError, match="not an image size") as refusal:
        CompiledShape.parse(text)
    assert named in str(refusal.value)


def test_the_trained_sizes_are_about_a_megapixel_and_start_with_the_default() -> None:
    assert len(set(SDXL_SHAPES)) == 9
    assert str(SDXL_SHAPES[0]) == "1024x1024"
    assert all(0.93 < shape.pixels / 1024**2 <= 1 for shape in SDXL_SHAPES)
    assert {CompiledShape(s.height, s.width) for s in SDXL_SHAPES} == set(SDXL_SHAPES)
    assert [str(shape) for shape in DEMO_SHAPES] == ["128x128", "160x96"]
