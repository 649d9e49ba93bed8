import copy

import pytest
import torch

from kernels_warmup.rewrites.time_once import TimeProjection, set_time_once
from tests.kernels_warmup.tiny import (
    relative_error,
    step_inputs,
    tiny_unet,
)

ROUNDING = 1e-5


def test_the_steps_embedding_is_projected_by_one_product() -> None:
    unet = tiny_unet()
    plain = copy.deepcopy(unet)
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    set_time_once(unet)
    after = unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    parts = [module for module in unet.modules() if isinstance(module, TimeProjection)]
    assert len(parts) == 11
    # Stored once: the weights of every block are a view of the product's.
    assert {part.weight.untyped_storage().data_ptr() for part in parts} == {
        unet.time_embed_act.weight.untyped_storage().data_ptr()
    }
    products = []
    real = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.nn.functional,
            "linear",
            lambda given, weight, bias=None: (
                products.append(len(weight)) or real(given, weight, bias)
            ),
        )
        inputs = step_inputs(2)
        result = unet(**inputs)[0]
    assert products.count(sum(part.out_features for part in parts)) == 1
    assert relative_error(result, plain(**inputs)[0]) < ROUNDING


def test_a_time_embedding_that_is_not_sdxls_is_refused_and_unchanged() -> None:
    def refuses(change) -> None:  # type: ignore[no-untyped-def]
        unet = tiny_unet()
        change(unet, unet.mid_block.resnets[1])
        with pytest.raises(ValueError, match="not SDXL's time embedding"):
            set_time_once(unet)
        assert not any(isinstance(module, TimeProjection) for module in unet.modules())

    refuses(lambda unet, _: setattr(unet, "time_embed_act", torch.nn.SiLU()))
    refuses(lambda _, resnet: setattr(resnet, "time_emb_proj", None))
    refuses(lambda _, resnet: setattr(resnet, "time_embedding_norm", "scale_shift"))
    refuses(lambda _, resnet: setattr(resnet, "skip_time_act", True))
    refuses(lambda _, resnet: setattr(resnet, "nonlinearity", torch.nn.GELU()))
