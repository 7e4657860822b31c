from functools import partial
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.testing import assert_close
from torchvision.models import get_model_builder

from passdeploy.errors import MissingError, MissingExtra, ModelError, PassDeployError, RecipeError, WeightsError
from passdeploy.models import build
from passdeploy.models.build import build_model, comes_trained
from passdeploy.models.classifier import find_classifier, replace_classifier_

OURS = "passdeploy/resnet20_cifar"


def refusal(kind: type[PassDeployError], name: str = OURS, num_classes: int = 10, **options: object) -> str:
    with pytest.raises(kind) as caught:
        build_model(name, num_classes=num_classes, **options)
    message = str(caught.value)
    assert message.count("\n") <= 2
    return message


def state_of(name: str = OURS, num_classes: int = 10, seed: int = 0) -> dict[str, torch.Tensor]:
    return dict(build_model(name, num_classes=num_classes, seed=seed).state_dict())


@pytest.fixture
def weights(tmp_path: Path):
    """Return a function that writes tensors to a .safetensors file and returns its path."""

    def write(tensors: dict[str, torch.Tensor]) -> str:
        path = tmp_path / "weights.safetensors"
        save_file(tensors, path)
        return str(path)

    return write


def test_a_network_comes_in_eval_mode_with_the_classes_asked_for():
    network = build_model("torchvision/mobilenet_v2", num_classes=7)
    assert not any(module.training for module in network.modules())
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 7)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_networks_with_auxiliary_classifiers_come_without_them(name):
    network = build_model(f"torchvision/{name}", num_classes=3)  # warnings are errors here
    assert not [key for key in network.state_dict() if key.lower().startswith("aux")]
    assert network(torch.zeros(1, 3, 96, 96)).shape == (1, 3)


def test_random_weights_are_a_function_of_the_seed_alone():
    before = torch.get_rng_state()
    first = state_of(seed=3)
    torch.rand(5)
    again, other = state_of(seed=3), state_of(seed=4)
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
    torch.set_rng_state(before)
    state_of(seed=5)
    assert torch.equal(torch.get_rng_state(), before)


def test_an_unknown_name_names_the_closest_ones():
    assert "torchvision/resnet18" in refusal(ModelError, "torchvision/resnet81")
    assert "torchvision/resnet18" in refusal(ModelError, "ResNet18")
    assert "passdeploy/resnet20_cifar" in refusal(ModelError, "passdeploy/resnet20")
    assert "torchvision/NAME" in refusal(ModelError, "keras/xception")


def test_torchvision_models_that_are_not_classifiers_are_unknown():
    refusal(ModelError, "torchvision/deeplabv3_resnet50")


def test_timm_builds_by_name():
    pytest.importorskip("timm", reason="extra timm is not installed")
    assert build_model("timm/mobilenetv3_small_050", num_classes=5)(torch.zeros(1, 3, 32, 32)).shape == (1, 5)
    assert "timm/resnet18" in refusal(ModelError, "timm/resnet18x")
    assert "Invalid pretrained tag" in refusal(ModelError, "timm/resnet18.nobody_in1k")


def test_without_timm_the_extra_is_named(monkeypatch: pytest.MonkeyPatch):
    def missing(module: str, *, extra: str) -> None:
        raise MissingExtra(module, extra)

    monkeypatch.setattr(build, "require", missing)
    assert "passdeploy[timm]" in refusal(MissingExtra, "timm/resnet18")


# --- weights from a file


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "_orig_mod."])
def test_weights_load_whatever_common_prefix_they_carry(weights, prefix):
    saved = state_of(seed=1)
    path = weights({f"{prefix}{name}": tensor for name, tensor in saved.items()})
    loaded = build_model(OURS, num_classes=10, weights=path).state_dict()
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)


def test_a_prefix_that_is_the_networks_own_stays(weights, tmp_path, monkeypatch):
    source = "class Net(nn.Module):\n  def __init__(self):\n    super().__init__()\n    self.model = nn.Linear(2, 3)\n"
    write_module(tmp_path, monkeypatch, source)
    saved = {"model.weight": torch.rand(3, 2), "model.bias": torch.rand(3)}
    network = build_model("mine:Net", num_classes=3, weights=weights(saved), allow_code=True)
    assert_close(network.state_dict()["model.weight"], saved["model.weight"])


def test_files_without_batch_counters_load(weights):
    saved = {name: tensor for name, tensor in state_of().items() if not name.endswith("num_batches_tracked")}
    build_model(OURS, num_classes=10, weights=weights(saved))


def test_a_missing_file_is_a_mistake_in_the_recipe():
    assert "nowhere.safetensors" in refusal(RecipeError, weights="nowhere.safetensors")


def test_a_home_directory_is_expanded(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    weights(state_of())
    build_model(OURS, num_classes=10, weights="~/weights.safetensors")


@pytest.mark.parametrize("content", [b"", b"not tensors at all", b"\xff" * 64])
def test_a_file_of_something_else_is_unreadable(tmp_path, content):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(content)
    assert "not a readable .safetensors file" in refusal(WeightsError, weights=str(path))


def test_a_truncated_file_is_unreadable(weights):
    path = Path(weights(state_of()))
    path.write_bytes(path.read_bytes()[:-100])
    assert "not a readable .safetensors file" in refusal(WeightsError, weights=str(path))


def test_a_pickle_is_not_opened(tmp_path):
    path = tmp_path / "weights.pth"
    path.write_bytes(b"anything")
    assert "pickle" in refusal(WeightsError, weights=str(path))


def test_weights_of_another_network_say_what_is_missing_unexpected_and_misshapen(weights):
    saved = state_of()
    del saved["layer1.0.conv1.weight"], saved["bn1.bias"]
    saved |= {"fc.weight": torch.rand(2), "conv1.weight": torch.rand(8, 3, 3, 3)}
    message = refusal(WeightsError, weights=weights(saved))
    assert "2 tensors missing (first 'bn1.bias')" in message
    assert "1 tensor unexpected (first 'fc.weight')" in message
    assert "1 tensor of another shape (first 'conv1.weight': 8x3x3x3, not 16x3x3x3)" in message


def test_a_classifier_for_other_classes_is_recognised(weights):
    message = refusal(WeightsError, num_classes=5, weights=weights(state_of(num_classes=10)))
    assert "only its final classifier 'linear' differs" in message
    assert "10 classes and the data has 5" in message


def test_a_new_head_takes_all_weights_but_those_of_the_classifier(weights):
    saved = {name: tensor + 1 for name, tensor in state_of(num_classes=10).items()}
    for classes in (5, 10):  # even where the old one would fit
        network = build_model(
            "passdeploy/resnet20_cifar", num_classes=classes, weights=str(weights(saved)), new_head=True
        )
        own = network.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in saved.items() if not name.startswith("linear."))
        assert own["linear.weight"].shape == (classes, 64)
        assert not torch.equal(own["linear.weight"][:5], saved["linear.weight"][:5])


def test_what_has_a_new_classifier_must_be_trained_first():
    resnet = partial(comes_trained, "torchvision/resnet18")
    assert not resnet(num_classes=1000, weights=None)
    assert resnet(num_classes=1000, weights="pretrained")
    assert not resnet(num_classes=10, weights="pretrained")
    assert not resnet(num_classes=1000, weights="pretrained", new_head=True)
    assert resnet(num_classes=10, weights="mine.safetensors")
    assert not comes_trained("timm/resnet18", num_classes=10, weights="pretrained")
    assert comes_trained("timm/resnet18", num_classes=1000, weights="pretrained")
    assert comes_trained("mine.networks:small", num_classes=10, weights="pretrained")  # the factory knows


def test_quantised_weights_are_not_taken_for_real_ones(weights):
    saved = state_of()
    saved["conv1.weight"] = saved["conv1.weight"].to(torch.int8)
    assert "another type (first 'conv1.weight')" in refusal(WeightsError, weights=weights(saved))


def test_weights_that_are_not_finite_are_refused(weights):
    saved = state_of()
    saved["bn1.weight"][3] = float("nan")
    assert "'bn1.weight'" in refusal(WeightsError, weights=weights(saved))


# --- the library's own weights


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> dict[str, torch.Tensor]:
    """Return random ResNet-18 weights, which torchvision loads as its pretrained ones."""
    torch.manual_seed(1)
    tensors = torchvision.models.resnet18(weights=None).state_dict()
    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", lambda *args, **options: tensors)
    return tensors


def test_pretrained_weights_come_whole_for_their_own_classes(published):
    network = build_model("torchvision/resnet18", num_classes=1000, weights="pretrained")
    assert torch.equal(network.fc.weight, published["fc.weight"])


def test_pretrained_weights_get_a_new_classifier_for_other_classes(published):
    network = build_model("torchvision/resnet18", num_classes=4, weights="pretrained")
    assert torch.equal(network.conv1.weight, published["conv1.weight"])
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 4)
    twin = build_model("torchvision/resnet18", num_classes=4, weights="pretrained")
    assert torch.equal(network.fc.weight, twin.fc.weight)  # the new classifier follows from the seed
    other = build_model("torchvision/resnet18", num_classes=1000, weights="pretrained", new_head=True)
    assert torch.equal(other.conv1.weight, published["conv1.weight"])
    assert not torch.equal(other.fc.weight, published["fc.weight"])


def simple_values(model: nn.Module) -> dict[str, object]:
    """Collect what a network keeps beside its tensors: the kinds of its modules, and their numbers and texts."""
    kept: dict[str, object] = {}
    for name, module in model.named_modules():
        values = {
            key: value for key, value in vars(module).items() if isinstance(value, bool | int | float | str | tuple)
        }
        kept[name] = type(module), {**values, "training": False}
    return kept


# One of each family, and all vision transformers, whose published weights are for several sizes. Those of RegNet
# compute their widths with tensors, which have no values on the meta device.
BUILDERS = {name: get_model_builder(name) for name in torchvision.models.list_models(module=torchvision.models)}
FAMILIES = {builder.__module__: name for name, builder in reversed(BUILDERS.items()) if "regnet" not in name}
NAMES = sorted({*FAMILIES.values(), *(name for name in BUILDERS if name.startswith("vit_"))})


@pytest.mark.parametrize("name", NAMES)
def test_a_network_without_its_pretrained_weights_can_be_built_as_with_them(name, monkeypatch):
    # On the meta device, since some have billions of parameters.
    kinds = type(torchvision.models.get_model_weights(name).DEFAULT)
    monkeypatch.setattr(kinds, "get_state_dict", lambda *args, **options: {})
    monkeypatch.setattr(nn.Module, "load_state_dict", lambda *args, **options: None)
    with torch.device("meta"):
        trained = build._create(f"torchvision/{name}", 1000, pretrained=True, allow_code=False)
        arguments = build._pretrained_arguments(f"torchvision/{name}")
        alike = build._create(f"torchvision/{name}", 1000, pretrained=False, allow_code=False, **arguments)
    assert simple_values(alike) == simple_values(trained)
    shapes = {key: tensor.shape for key, tensor in trained.state_dict().items()}
    assert {key: tensor.shape for key, tensor in alike.state_dict().items()} == shapes


def test_googlenet_changes_its_input_only_as_for_pretrained_weights():
    plain, alike = (
        build_model("torchvision/googlenet", num_classes=3, as_pretrained=as_pretrained)
        for as_pretrained in (False, True)
    )
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(plain._transform_input(images), images)
    assert not torch.allclose(alike._transform_input(images), images, atol=0.1)


@pytest.mark.parametrize("error", [URLError("no network"), TimeoutError(), RuntimeError("invalid hash value")])
def test_a_failed_download_says_what_to_do(monkeypatch, error):
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(torchvision.models.ResNet18_Weights, "get_state_dict", fail)
    assert "Go online once" in refusal(MissingError, "torchvision/resnet18", weights="pretrained")


def test_our_networks_have_no_pretrained_weights():
    assert "model.weights" in refusal(ModelError, weights="pretrained")


def test_the_classifier_is_the_last_layer_of_that_width():
    network = nn.Sequential(nn.Linear(4, 10), nn.Linear(10, 10), nn.Linear(10, 3))
    assert find_classifier(network, 10) == "1"
    assert find_classifier(network, 7) is None
    with pytest.raises(ModelError, match="7 classes"):
        replace_classifier_(network, old_classes=7, num_classes=2)


def test_a_convolutional_classifier_is_replaced_too():
    network = torchvision.models.squeezenet1_1(weights=None, num_classes=10)
    replace_classifier_(network, old_classes=10, num_classes=3)
    assert network.eval()(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


# --- the reader's own code


def write_module(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, name: str = "mine") -> None:
    (folder / f"{name}.py").write_text(f"from torch import nn\n{source}")
    monkeypatch.chdir(folder)
    monkeypatch.delitem(build.sys.modules, name, raising=False)


def test_code_runs_only_where_it_was_allowed(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "raise SystemExit('this ran')")
    assert "--allow-code" in refusal(ModelError, "mine:net")


def test_a_factory_gets_the_keywords_that_it_takes(tmp_path, monkeypatch):
    source = (
        "def net(num_classes, width=4): return nn.Linear(width, num_classes)\ndef fixed(): return nn.Linear(2, 2)\n"
    )
    write_module(tmp_path, monkeypatch, source)
    assert build_model("mine:net", num_classes=6, allow_code=True).out_features == 6
    assert build_model("mine:fixed", num_classes=6, allow_code=True).out_features == 2
    assert str(tmp_path) not in build.sys.path


def test_a_wrapper_that_a_factory_puts_around_its_network_is_taken_off(tmp_path, monkeypatch):
    source = "import torch\ndef net(): return torch.compile(nn.DataParallel(nn.Linear(2, 3)), backend='eager')\n"
    write_module(tmp_path, monkeypatch, source)
    assert type(build_model("mine:net", num_classes=3, allow_code=True)) is nn.Linear
    write_module(tmp_path, monkeypatch, "def net(): return nn.LazyLinear(3)\n")
    assert "has no size yet" in refusal(ModelError, "mine:net", allow_code=True)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def net(): return torch.export.export(nn.Linear(2, 2), (torch.zeros(1, 2),)).module()", "fixed in one mode"),
        ("def net(): return nn.Linear(2, 2, device='meta')", "on the meta device"),
        ("def net(): raise SystemExit(3)", "cannot build 'mine:net': SystemExit: 3"),
    ],
)
def test_networks_that_cannot_be_trained_are_refused(tmp_path, monkeypatch, source, message):
    write_module(tmp_path, monkeypatch, f"import torch\n{source}\n")
    assert message in refusal(ModelError, "mine:net", allow_code=True)


def test_a_factory_may_bring_trained_weights(tmp_path, monkeypatch):
    write_module(tmp_path, monkeypatch, "def net(pretrained=False): return nn.Linear(2, 9 if pretrained else 2)\n")
    assert build_model("mine:net", num_classes=2, weights="pretrained", allow_code=True).out_features == 9


@pytest.mark.parametrize(
    ("source", "name", "news"),
    [
        ("def net(): raise ValueError('no\\nluck')", "mine:net", "ValueError: no"),
        ("", "mine:nett", "nett"),
        ("", "not_there:net", "not_there"),
        ("import also_missing", "mine:net", "also_missing"),
        ("def net(): return 3", "mine:net", "returned int"),
    ],
)
def test_trouble_in_the_readers_code_is_reported_in_a_few_lines(tmp_path, monkeypatch, source, name, news):
    write_module(tmp_path, monkeypatch, source)
    assert news in refusal(ModelError, name, allow_code=True)
