import subprocess
import sys
from pathlib import Path
from typing import Any, get_origin

import pytest
from pydantic import BaseModel, ValidationError

from passdeploy.errors import RecipeError
from passdeploy.recipe import (
    DataSpec,
    DistillSpec,
    ModelSpec,
    Recipe,
    Target,
    find_recipe,
    load_recipe,
    parse_recipe,
    recipe_schema,
    shipped_recipes,
)

SMALL = "model: {name: torchvision/resnet18}\ndata: {name: digits}\n"


@pytest.fixture(autouse=True)
def _empty_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def load(text: str = SMALL, *overrides: str, name: str = "mine.yaml") -> Recipe:
    Path(name).write_text(text)
    return load_recipe(name, overrides)


def refusal(text: str = SMALL, *overrides: str, name: str = "mine.yaml") -> str:
    with pytest.raises(RecipeError) as caught:
        load(text, *overrides, name=name)
    message = str(caught.value)
    assert message.count("\n") <= 2
    return message


# --- what a recipe says


def test_a_recipe_of_two_names_has_every_default():
    recipe = load()
    assert recipe.prune.method == "pass"
    assert (recipe.prune.target.kind, recipe.prune.target.value) == ("macs", 0.5)
    assert (recipe.prune.steps, recipe.prune.round_to, recipe.prune.exclude) == (300, "auto", ())
    assert (recipe.prune.prompt.kind, recipe.prune.prompt.size, recipe.prune.prompt.keep) == ("padding", 8, True)
    assert (recipe.prune.hypernet.kind, recipe.prune.hypernet.hidden) == ("lstm", 64)
    assert (recipe.train.epochs, recipe.train.optimizer.name, recipe.train.optimizer.lr) == (8, "sgd", 0.05)
    assert recipe.finetune.distill == DistillSpec(alpha=0.5, temperature=4.0)
    assert recipe.train.distill is None
    assert (recipe.gates.equivalence, recipe.gates.top1_drop) == (1e-5, 0.02)
    assert (recipe.data.image_size, recipe.data.batch_size, recipe.data.workers) == (64, 64, "auto")


def test_a_new_head_is_one_of_given_weights():
    assert load(SMALL, "model.weights=pretrained", "model.new_head=true").model.new_head
    assert "Name some in model.weights" in refusal(SMALL, "model.new_head=true")


def test_the_name_is_the_files_name_where_none_is_given():
    assert load(name="my nets.yaml").name == "my-nets"
    assert load("name: other\n" + SMALL).name == "other"


def test_a_recipe_cannot_be_changed():
    recipe = load()
    with pytest.raises(ValidationError):
        recipe.seed = 3
    assert hash(recipe) == hash(load())


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_shipped_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name.startswith(name.split("-")[0].removesuffix(".yaml"))
    assert load_recipe(name.removesuffix(".yaml")) == recipe


def test_the_recipes_that_we_promise_are_shipped():
    assert {"mobilenetv2.yaml", "resnet20-cifar10.yaml"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_resolved_recipe_is_a_recipe_and_equal(name):
    recipe = load_recipe(name, ["prune.exclude=[stem, 'no']", "finetune.optimizer.name=adamw"])
    Path("resolved.yaml").write_text(recipe.to_yaml())
    assert load_recipe("resolved.yaml") == recipe


def test_a_resolved_recipe_spells_out_every_default():
    def keys(section: type[BaseModel], values: dict[str, Any]) -> None:
        if section is Target:
            assert values == {"macs": 0.5}
            return
        assert list(values) == list(section.model_fields)
        for key, field in section.model_fields.items():
            kind = field.annotation
            if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, BaseModel):
                keys(kind, values[key])

    keys(Recipe, load().model_dump(mode="json"))


def test_optimizers_bring_a_rate_that_suits_them():
    recipe = load(SMALL, "finetune.optimizer.name=adamw", "train.optimizer={name: adamw, lr: 0.3}")
    assert recipe.finetune.optimizer.lr == 0.001
    assert recipe.train.optimizer.lr == 0.3
    assert load(SMALL, "finetune.optimizer.name=sgd").finetune.optimizer.lr == 0.02


def test_home_directories_are_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    recipe = load(SMALL, "data.root=~/images", "model.weights=~/w.safetensors")
    assert recipe.data.root == f"{tmp_path}/images"
    assert recipe.model.weights == f"{tmp_path}/w.safetensors"
    assert load(SMALL, "model.weights=pretrained").model.weights == "pretrained"


@pytest.mark.parametrize(
    ("written", "kind", "value"),
    [
        ("{macs: 0.3}", "macs", 0.3),
        ("{macs: 3e8}", "macs", 300_000_000),
        ("{params: 1_000_000}", "params", 1_000_000),
        ("{channels: 0.7}", "channels", 0.7),
        ("{latency: 0.5}", "latency", 0.5),
        ("{latency_ms: 2}", "latency_ms", 2),
    ],
)
def test_a_target_has_one_kind_and_its_number(written, kind, value):
    target = load(SMALL, f"prune.target={written}").prune.target
    assert (target.kind, target.value) == (kind, value)
    assert type(target.value) is (float if kind == "latency_ms" else type(value))


def test_a_count_is_read_back_as_it_was_written():
    for count in (2**53, 3 * 10**8):
        recipe = load(SMALL, f"prune.target.macs={count}")
        assert parse_recipe(recipe.to_yaml(), "written").prune.target.macs == count
    assert "larger than any network" in refusal(SMALL, f"prune.target.macs={10**400}")
    assert "larger than any network" in refusal(SMALL, "prune.target.macs=1.0e+30")


def test_mask_learning_may_be_given_in_passes_over_the_images():
    prune = load(SMALL, "prune.epochs=1.5", "prune.steps=7").prune
    assert prune.counted(images=100, batch_size=32).steps == 5  # 1.5 times 100 images in batches of 32
    assert prune.counted(images=10, batch_size=32).steps == 2  # a batch holds no more images than there are
    assert load(SMALL, "prune.epochs=0.001").prune.counted(images=100, batch_size=32).steps == 1
    assert load(SMALL, "prune.steps=7").prune.counted(images=100, batch_size=32).steps == 7
    assert "prune.epochs" in refusal(SMALL, "prune.epochs=0")


# --- overrides


def test_an_override_wins_over_the_file_and_a_later_one_over_an_earlier():
    recipe = load(SMALL + "prune: {steps: 10}", "prune.steps=20", "prune.steps=30", "seed=7")
    assert (recipe.prune.steps, recipe.seed) == (30, 7)


def test_an_override_may_give_a_whole_section():
    assert load(SMALL, "prune.prompt={kind: none}").prune.prompt.kind == "none"
    assert load(SMALL, "prune.exclude=[stem, head]").prune.exclude == ("stem", "head")


def test_an_override_fills_a_section_that_was_null():
    assert load(SMALL + "finetune: {distill: null}", "finetune.distill.alpha=0.3").finetune.distill == DistillSpec(
        alpha=0.3
    )
    assert load(SMALL, "finetune.distill=null").finetune.distill is None


def test_a_value_may_hold_an_equals_sign_or_nothing():
    assert load(SMALL, "data.root=/x=y").data.root == "/x=y"
    assert load(SMALL + "prune: {batch_size: 3}", "prune.batch_size=").prune.batch_size is None


def test_setting_one_kind_of_target_replaces_the_other():
    recipe = load(SMALL + "prune: {target: {macs: 0.5}}", "prune.target.params=0.3")
    assert (recipe.prune.target.kind, recipe.prune.target.value) == ("params", 0.3)


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("prune.steps", "key=value"),
        ("=3", "key=value"),
        ("prune..steps=3", "key=value"),
        ("prune.target={macs", "not YAML"),
        ("prune.stepz=3", "'prune.steps'"),
        ("prune.target.flops=0.5", "Known here: macs"),
    ],
)
def test_a_wrong_override_is_shown_as_it_was_given(override, says):
    message = refusal(SMALL, override)
    assert message.startswith(f"--set {override}: ")
    assert says in message


def test_a_list_is_overridden_as_a_whole():
    assert "as a whole" in refusal(SMALL + "prune: {exclude: [stem]}", "prune.exclude.0=head")


# --- errors


def test_an_unknown_key_names_the_nearest_one_with_file_and_line():
    message = refusal(SMALL + "prune:\n  steps: 3\n  metod: taylor\n")
    assert message == "mine.yaml:5: unknown key 'prune.metod'.\nDid you mean 'prune.method'?"


def test_a_key_in_the_wrong_section_names_the_right_one():
    assert "'prune.steps'" in refusal("steps: 3\n" + SMALL)
    assert "'prune.optimizer.lr'" in refusal(SMALL + "prune: {lr: 0.1}")


def test_a_key_like_no_other_gets_the_list():
    assert "Known here: equivalence, parity, top1_drop." in refusal(SMALL + "gates: {xyz: 1}")


def test_an_unknown_method_or_data_set_gets_the_known_ones():
    assert "Did you mean 'taylor'? Known: pass, random" in refusal(SMALL, "prune.method=tailor")
    message = refusal(SMALL, "data.name=cifar")
    assert "data.name" in message
    assert "Did you mean 'cifar10'? Known: digits" in message


@pytest.mark.parametrize(
    ("line", "key", "says"),
    [
        ("seed: yes", "seed", "found 'yes', expected a whole number"),
        ("seed: true", "seed", "found true, expected a whole number"),
        ("seed: -1", "seed", "greater than or equal to 0"),
        ("seed: '8'", "seed", "found '8', expected a whole number"),
        ("version: 2", "version", "Known: 1"),
        ("name: ../up", "name", "cannot name a folder"),
        ("train: 3", "train", "where keys are expected"),
        ("train:", "train", "found nothing (null), where keys are expected"),
        ("train: {epochs: 1.5}", "train.epochs", "expected a whole number"),
        ("train: {distill: {alpha: 0.5}}", "train.distill", "belongs under finetune"),
        ("prune: {round_to: even}", "prune.round_to", "expected a whole number or 'auto'"),
        ("prune: {exclude: stem}", "prune.exclude", "expected a list"),
        ("prune: {exclude: [3]}", "prune.exclude[0]", "expected text"),
        ("prune: {target: 0.5}", "prune.target", "where keys are expected"),
        ("prune: {target: {}}", "prune.target", "here: none"),
        ("prune: {target: {macs: 0.5, latency: 0.5}}", "prune.target", "here: macs and latency"),
        ("prune: {target: {macs: 50%}}", "prune.target.macs", "expected a number."),
        ("prune: {target: {macs: 1}}", "prune.target.macs", "neither a share"),
        ("prune: {target: {macs: 1.5}}", "prune.target.macs", "neither a share"),
        ("prune: {target: {macs: -0.5}}", "prune.target.macs", "neither a share"),
        ("prune: {target: {channels: 3}}", "prune.target.channels", "less than 1"),
        ("prune: {prompt: {size: 32}}", "prune.prompt.size", "the widest is 31"),
        ("gates: {parity: .nan}", "gates.parity", "finite"),
        ("finetune: {optimizer: {name: adam}}", "finetune.optimizer.name", "Did you mean 'adamw'?"),
    ],
)
def test_a_value_that_does_not_fit_names_its_key_and_line(line, key, says):
    message = refusal(SMALL + line)
    assert message.startswith(f"mine.yaml:3: {key}: ")
    assert says in message


def test_a_missing_key_names_an_example():
    assert "mine.yaml:1: the key 'model' is missing" in refusal("data: {name: digits}")
    assert "mine.yaml:2: the key 'data.name' is missing" in refusal(SMALL.replace("{name: digits}", "{}"))


def test_several_mistakes_are_counted():
    message = refusal(SMALL + "seed: x\nprune: {steps: -1, anneal: 2}")
    assert message.splitlines()[-1].startswith("Wrong too: ")


@pytest.mark.parametrize("text", ["", "# nothing", "- a\n- b", "hello"])
def test_a_file_without_keys_is_no_recipe(text):
    assert "mine.yaml holds no recipe" in refusal(text)


def test_a_syntax_error_has_file_and_line():
    assert refusal("model: name: x").startswith("mine.yaml:1: not YAML")


def test_bytes_are_not_a_recipe():
    Path("mine.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(RecipeError, match="not text"):
        load_recipe("mine.yaml")


# --- where recipes are found


def test_the_readers_own_file_comes_first():
    Path("mobilenetv2.yaml").write_text("name: my-own\n" + SMALL)
    assert load_recipe("mobilenetv2").name == "my-own"


def test_recipes_are_found_by_path_and_without_their_ending(tmp_path):
    Path("nets").mkdir()
    Path("nets/small.yaml").write_text(SMALL)
    assert load_recipe("nets/small").name == "small"
    assert load_recipe(tmp_path / "nets" / "small.yaml").name == "small"
    assert find_recipe("nets/small").read_text() == SMALL


@pytest.mark.parametrize("name", ["mobilnetv2", "mobilenetv3.yaml"])
def test_an_unknown_recipe_names_the_nearest_of_ours(name):
    with pytest.raises(RecipeError, match=r"Did you mean 'mobilenetv2\.yaml'\?"):
        load_recipe(name)


@pytest.mark.parametrize("name", ["", ".", "nowhere/mobilenetv2.yaml", "x" * 5000, "a\0b", "~nobody-here/x"])
def test_a_name_that_can_be_no_file_is_an_unknown_recipe(name):
    with pytest.raises(RecipeError, match="no recipe"):
        load_recipe(name)


# --- the published schema


def test_every_key_is_described_in_the_schema():
    schema = recipe_schema()
    sections = [schema, *schema["$defs"].values()]

    def described(field: dict[str, Any]) -> str:  # where a key says what its section says, it is only there
        section = schema["$defs"].get(field.get("$ref", "").rpartition("/")[2], {})
        return str(field.get("description") or section.get("description") or "")

    undescribed = [
        f"{section['title']}.{key}"
        for section in sections
        for key, field in section["properties"].items()
        if len(described(field)) < 10
    ]
    assert not undescribed
    assert all(section["additionalProperties"] is False for section in sections)


def test_the_schema_holds_the_defaults_and_the_one_target():
    schema = recipe_schema()
    assert schema["properties"]["prune"]["default"]["target"] == {"macs": 0.5}
    assert {"required": ["latency_ms"]} in schema["$defs"]["Target"]["oneOf"]


def test_a_recipe_can_be_made_without_a_file():
    recipe = Recipe(model=ModelSpec(name="torchvision/resnet18"), data=DataSpec(name="digits"))
    assert recipe.model_copy(update={"name": "mine"}) == load()


def test_recipes_need_no_torch():
    code = "import sys, passdeploy.recipe as r; r.load_recipe('mobilenetv2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[2]).returncode == 0
