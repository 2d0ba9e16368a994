"""The formats whose gradients are compared are those that are meant."""

import four_bit
import pytest
import torch

from xfactor_peft.lowmem.int8 import Int8Linear
from xfactor_peft.lowmem.nf4 import NF4Linear

WEIGHT = torch.randn(96, 64, generator=torch.Generator().manual_seed(0))


def test_formats_are_those_of_the_packages_layers():
    for made, layer in ((four_bit.nf4(WEIGHT, 64), NF4Linear), (four_bit.int8(WEIGHT), Int8Linear)):
        assert torch.allclose(made, layer.from_weight(WEIGHT, None).dequantize().float(), atol=1e-3)
        assert not torch.allclose(made, WEIGHT, atol=1e-3)


def test_finer_blocks_and_loftq_lose_less():
    lost = [float((four_bit.nf4(WEIGHT, block) - WEIGHT).norm()) for block in (64, 32, 16)]
    assert lost == sorted(lost, reverse=True)
    loftq = [float((four_bit.loftq(WEIGHT, rank) - WEIGHT).norm()) for rank in (0, 8, 32)]
    assert loftq == sorted(loftq, reverse=True)
    assert loftq[0] == pytest.approx(lost[0])
