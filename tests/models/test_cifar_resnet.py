import pytest
import torch
from torch import nn
from torch.testing import assert_close

from passdeploy.models.cifar_resnet import NETWORKS, BasicBlock, resnet20_cifar


def expected_names() -> set[str]:
    """List the names of the tensors of the published CIFAR ResNet-20 weights."""
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = {"conv1.weight", "linear.weight", "linear.bias", *(f"bn1.{part}" for part in norm)}
    for block in (f"layer{stage}.{index}" for stage in (1, 2, 3) for index in (0, 1, 2)):
        names |= {f"{block}.conv1.weight", f"{block}.conv2.weight"}
        names |= {f"{block}.{bn}.{part}" for bn in ("bn1", "bn2") for part in norm}
    return names


def test_resnet20_has_the_published_names_and_shapes():
    tensors = resnet20_cifar().state_dict()
    assert set(tensors) == expected_names()
    assert tuple(tensors["conv1.weight"].shape) == (16, 3, 3, 3)
    assert tuple(tensors["layer2.0.conv1.weight"].shape) == (32, 16, 3, 3)
    assert tuple(tensors["layer3.2.conv2.weight"].shape) == (64, 64, 3, 3)
    assert tuple(tensors["linear.weight"].shape) == (10, 64)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnet20_cifar", 269_722),
        ("resnet32_cifar", 464_154),
        ("resnet44_cifar", 658_586),
        ("resnet56_cifar", 853_018),
    ],
)
def test_every_depth_has_the_size_in_the_paper(name, parameters):
    network = NETWORKS[name](10)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def test_logits_have_one_column_for_each_class():
    assert resnet20_cifar(7).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


def test_a_wider_shortcut_takes_every_second_pixel_between_zero_channels():
    block = BasicBlock(4, 8, stride=2).eval()
    nn.init.zeros_(block.bn2.weight)  # the branch adds nothing: only the shortcut is left
    x = torch.arange(4 * 6 * 6, dtype=torch.float32).view(1, 4, 6, 6) + 1
    out = block(x)
    assert_close(out[:, 2:6], x[:, :, ::2, ::2])
    assert out[:, :2].count_nonzero() == out[:, 6:].count_nonzero() == 0


def test_an_equal_shortcut_is_the_input_itself():
    block = BasicBlock(4, 4, stride=1).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 4, 5, 5)
    assert_close(block(x), x)
