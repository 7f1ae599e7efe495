"""Recipes from flags, YAML and Python: the same names, one precedence, and one sentence for each mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from halflap.amounts import Amount
from halflap.binding import Call, bind
from halflap.cli import VERBS
from halflap.errors import RecipeError
from halflap.recipe import inputs_of, leaves, normalise, settings_of, to_yaml
from halflap.train.config import Fit

RECIPES = {verb: row.recipe for verb, row in VERBS.items()}


def build(*words: str, **given: Any) -> Any:
    call = bind(RECIPES, words, given or None)
    assert isinstance(call, Call)
    return call.recipe


def test_flags_reach_sections_and_lists_take_several_values() -> None:
    recipe = build(
        *("compress", "DIR", "--data", "a.txt", "b.jsonl.xz", "--data.field", "body", "--params", "50%"),
        *("--memory", "31.7GiB", "--tokens", "2M", "--fit.learning-rate", "1e-4", "--sizes.drop-blocks", "3", "4"),
        *("--space.hidden-size", "96", "128", "--out", "runs/half", "--fit.compile"),
    )
    assert recipe.model == "DIR"
    assert recipe.text.data == ("a.txt", "b.jsonl.xz")
    assert recipe.text.field == "body"
    assert recipe.budgets.params == Amount(0.5, share=True)
    assert recipe.budgets.memory == Amount(34_037_615_821, "bytes")
    assert recipe.tokens == 2_000_000
    assert recipe.fit == Fit(learning_rate=1e-4, compile=True)
    assert recipe.sizes.drop_blocks == (3, 4)
    assert recipe.space.hidden_size == (96, 128)
    assert recipe.common.out == "runs/half"


@pytest.mark.parametrize("verb", RECIPES)
def test_what_show_prints_gives_the_same_recipe_back(verb: str, tmp_path: Path) -> None:
    first = bind(RECIPES, [verb], dict.fromkeys(_required(RECIPES[verb]), "x"))
    assert first is not None
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(verb, settings_of(first.recipe)))
    again = bind(RECIPES, [verb, "--config", str(file)])
    assert again is not None
    assert again.recipe == first.recipe


def test_a_full_recipe_survives_yaml(tmp_path: Path) -> None:
    first = build(
        *(
            "compress",
            "DIR",
            "--data",
            "a",
            "b",
            "--data.weights",
            "0.25",
            "0.75",
            "--params",
            "4.3B",
            "--latency",
            "20ms",
        ),
        *("--fit.betas", "0.9", "0.99", "--controls", "random", "scratch", "--fit.save-every", "7", "--quiet"),
    )
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml("compress", settings_of(first)))
    assert yaml.safe_load(file.read_text())["data"]["paths"] == ["a", "b"]
    assert build("compress", "--config", str(file)) == first


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: DIR\ndata: [a, b]\ntokens: 3M\nfit: {learning_rate: 1e-4, batch-size: 4}\n")
    recipe = build("compress", "--config", str(file), "--data", "c", "--fit.batch-size", "8")
    assert (recipe.model, recipe.text.data, recipe.tokens) == ("DIR", ("c",), 3_000_000)
    assert recipe.fit == Fit(learning_rate=1e-4, batch_size=8)


def test_python_keywords_may_be_numbers_lists_paths_sections_or_flat() -> None:
    recipe = build(
        "compress",
        **{"model": Path("DIR"), "data": ["a"], "params": 4.3e9, "memory": "50%", "fit": Fit(batch_size=2)},
        **{"sizes": {"hidden_size": 64}, "data_field": "body", "seed": 3, "quiet": True},
    )
    assert recipe.budgets.params == Amount(4_300_000_000)
    assert recipe.budgets.memory == Amount(0.5, "bytes", share=True)
    assert (recipe.fit.batch_size, recipe.sizes.hidden_size, recipe.text.field) == (2, 64, "body")
    assert (recipe.common.seed, recipe.common.quiet) == (3, True)


def test_null_is_the_value_none_and_an_empty_section_is_nothing(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("model: DIR\nimportance: null\nparams:\nsizes:\ndata: []\nfit: {micro_batch_size: null}\n")
    recipe = build("compress", "--config", str(file))
    assert recipe == build("compress", "DIR")


def test_names_of_other_tools_are_understood_and_said_in_ours() -> None:
    names = {"prune_target_params": "50%", "target_latency_seconds": 0.02, "num_layers": 4, "ffn_hidden_size": 64}
    call = bind(RECIPES, ["compress"], {"model": "DIR"} | names, "old.yaml")
    assert call is not None
    budgets, sizes = call.recipe.budgets, call.recipe.sizes
    assert (budgets.params, budgets.latency) == (Amount(0.5, share=True), Amount(0.02, "seconds"))
    assert (sizes.num_blocks, sizes.intermediate_size) == (4, 64)
    assert "old.yaml: num_layers is called sizes.num_blocks here; read as sizes.num_blocks: 4" in call.remarks


def test_sizes_of_other_tools_are_the_space_of_a_search() -> None:
    call = bind(RECIPES, ["search"], {"model": "DIR", "num_layers": 4, "ffn_hidden_size": [64, 128]})
    assert call is not None
    assert (call.recipe.space.num_blocks, call.recipe.space.intermediate_size) == ((4,), (64, 128))
    assert "num_layers is called space.num_blocks here; read as space.num_blocks: 4" in call.remarks[0]


@pytest.mark.parametrize(("family", "blocks"), [("llama", 8), ("nemotron", 8), ("nemotron_h", 4)])
def test_layers_of_other_tools_are_two_blocks_where_ours_are(tmp_path: Path, family: str, blocks: int) -> None:
    (tmp_path / "config.json").write_text(f'{{"model_type": "{family}", "hybrid_override_pattern": "M-M*-"}}')
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_layers: 4\n")
    for words, given in (([str(tmp_path), "--config", str(recipe)], None), ([], {"model": tmp_path, "num_layers": 4})):
        call = bind(RECIPES, ["prune", *words], given)
        assert call is not None and call.recipe.sizes.num_blocks == blocks
        assert call.remarks[0].endswith(
            f"num_layers is called sizes.num_blocks here; read as sizes.num_blocks: {blocks}"
        )


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("compres DIR", "'compres' is not a verb that exists; did you mean 'compress'?"),
        ("compress DIR --parms 5", "'--parms' is not a flag of compress; did you mean '--params'?"),
        ("compress DIR --fit.learning-rat 5", "did you mean '--fit.learning-rate'?"),
        ("compress DIR --device gpu", "--device is 'gpu'; allowed are auto, cpu, cuda: did you mean 'cpu'?"),
        ("compress DIR --controls nonsense", "allowed are scratch, group_blind, random"),
        ("compress DIR --params 12XB", "--params: '12XB' is not an amount that fits here"),
        ("compress DIR --memory 500", "write bytes with their unit, such as 31.7GiB"),
        ("compress DIR --tokens 50%", "--tokens: '50%' is not an amount"),
        ("compress DIR --batch 0", "--batch: 0 is too small; at least 1 is allowed"),
        ("bench DIR --batch 1 0", "--batch: 0 is too small; at least 1 is allowed"),
        ("compress DIR --seed x", "--seed: 'x' is no seed; it is a whole number from 0"),
        ("compress DIR --fit.learning-rate x", "--fit.learning-rate is 'x'; a number is allowed"),
        ("compress DIR --fit.learning-rate -1", "fit.learning_rate is -1.0; it must be greater than 0"),
        ("compress DIR --fit.betas 0.9", "--fit.betas has too few values"),
        ("compress DIR --seed 1 --seed 2", "--seed is given twice"),
        ("compress DIR other", "'other' does not belong to any flag of compress"),
        ("compress", "compress needs MODEL; write `halflap compress MODEL`"),
        ("compress DIR --config nowhere.yaml", "the recipe 'nowhere.yaml' is not a file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(words: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as error:
        bind(RECIPES, words.split())
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("parms: 50%", "'parms' is not a field that exists; did you mean 'params'?"),
        ("fit: {learning_rat: 1}", "'fit.learning_rat' is not a field that exists; did you mean 'fit.learning_rate'?"),
        ("seed: [1, 2]", "seed is [1, 2]; a single value is allowed"),
        ("params: 50%\nprune_target_params: 40%", "params is given twice"),
        ("data: [{a: 1}]", 'data is [{"a": 1}]; a plain list is allowed'),
        ("device: gpu", "device is 'gpu'; allowed are auto, cpu, cuda"),
        ("tokens: many", "tokens: 'many' is not an amount"),
        ("verb: search", "this recipe is for `halflap search`"),
        ("- 1", "it must be a mapping of names to values"),
        ("a: [1", "is not YAML at line"),
    ],
)
def test_a_mistake_in_a_recipe_file_names_the_file(content: str, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(content + "\n")
    with pytest.raises(RecipeError) as error:
        bind(RECIPES, ["compress", "DIR", "--config", str(file)])
    assert sentence in str(error.value)
    assert "recipe.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_every_field_has_a_help_text() -> None:
    from cyclopts import App

    from halflap.binding import _app

    app: App = _app(App, RECIPES, lambda *_: None)
    for verb in RECIPES:
        for argument in app[verb].assemble_argument_collection(parse_docstring=True):
            if argument.names and argument.names[0] != "*" and argument.show:
                assert argument.parameter.help, f"{verb} {argument.names[0]} has no help"


def test_a_package_that_checks_types_changes_nothing() -> None:
    """cyclopts asks pydantic as soon as anybody has loaded it."""
    pytest.importorskip("pydantic")
    for verb, words in (("report", []), ("doctor", []), ("inspect", ["--list"]), ("serve", ["x", "--port", "0"])):
        assert bind(RECIPES, [verb, *words]) is not None


def test_inputs_are_the_fields_that_name_files() -> None:
    recipe = build("compress", "DIR", "--data", "a", "b", "--eval-data", "c")
    assert inputs_of(recipe) == {"model": ["DIR"], "data": ["a", "b"], "eval_data": ["c"]}


def test_normalise_takes_dots_dashes_and_nesting_alike() -> None:
    kind = RECIPES["compress"]
    for given in ({"fit": {"batch-size": 2}}, {"fit.batch_size": 2}, {"fit_batch_size": 2}, {"fit": {"batch_size": 2}}):
        assert normalise(kind, given, "")[0] == {"fit.batch_size": 2}


def _required(recipe: type) -> list[str]:
    from dataclasses import MISSING

    return [name for name, leaf in leaves(recipe).items() if leaf.default is MISSING]
