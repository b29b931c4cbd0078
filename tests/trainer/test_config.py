"""Recipes, overrides, and what a user is told about a mistake in either."""

import subprocess
import sys

import pytest

from ultrarec.data.errors import UserError
from ultrarec.trainer.config import list_recipes, load_config

MINIMAL = """
[data]
path = "somewhere"
batch_rows = 8
[data.features.tab]
kind = "category"
role = "event"
num_values = 5
[embeddings]
dim = 8
[model]
width = 8
num_layers = 1
qk_dim = 4
value_dim = 4
[objective]
kind = "ranking"
tasks = ["is_click"]
[trainer]
epochs = 1
"""


@pytest.fixture
def recipe(tmp_path):
    """Writes a recipe and returns its path."""

    def write(text=MINIMAL, name="mine.toml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write


def message(path, *overrides):
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    return str(caught.value)


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_loads_and_survives_a_round_trip_through_toml(name, recipe):
    config = load_config(name)
    assert load_config(recipe(config.to_toml())) == config


def test_an_overridden_configuration_survives_a_round_trip_through_toml(recipe):
    overrides = (
        "trainer.max_steps=3",
        "optimizer.clip_norm=0.5",
        "embeddings.sharding.item=row_wise",
        "data.path='a = b'",
    )
    config = load_config(recipe(), overrides)
    assert load_config(recipe(config.to_toml())) == config


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("trainer.max_steps=7", lambda c: c.trainer.max_steps == 7),
        ("optimizer.lr=1e-4", lambda c: c.optimizer.lr == 1e-4),
        ("optimizer.betas=[0.8, 0.9]", lambda c: c.optimizer.betas == (0.8, 0.9)),
        ("data.audit=true", lambda c: c.data.audit is True),
        ("optimizer.decay=cosine", lambda c: c.optimizer.decay == "cosine"),
        ("optimizer.decay='cosine'", lambda c: c.optimizer.decay == "cosine"),
        ("data.path=/logs/a=b", lambda c: c.data.path == "/logs/a=b"),
        (" trainer.max_steps = 7 ", lambda c: c.trainer.max_steps == 7),
        ("data.features.tab.num_values=9", lambda c: c.data.features["tab"].num_values == 9),
        (
            "data.features.age={kind='category', role='user', num_values=3}",
            lambda c: c.data.features["age"].role == "user",
        ),
        ("embeddings.sharding.item=row_wise", lambda c: c.embeddings.sharding == {"item": "row_wise"}),
    ],
)
def test_overrides_take_toml_values_and_bare_words(recipe, override, read):
    assert read(load_config(recipe(), [override]))


def test_an_override_without_a_value_takes_the_setting_out_of_the_recipe(recipe):
    data = load_config(recipe(), ["data.batch_rows=", "data.batch_tokens=100"]).data
    assert (data.batch_rows, data.batch_tokens) == (None, 100)
    assert load_config(recipe(), ["data.features="]).data.features == {}
    with pytest.raises(UserError, match=r"does not set data\.batch_row, so there is nothing to remove"):
        load_config(recipe(), ["data.batch_row="])


def test_the_last_of_several_overrides_of_one_setting_counts(recipe):
    assert load_config(recipe(), ["trainer.max_steps=1", "trainer.max_steps=2"]).trainer.max_steps == 2


NEITHER_END = "neither trainer.epochs nor trainer.max_steps is set; training needs an end: set one"


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trianer.epochs=1", "trianer is no known setting; did you mean 'trainer'?"),
        ("trainer.max_step=1", "trainer.max_step is no known setting; did you mean 'max_steps'?"),
        ("data.features.tab.colour=1", "data.features.tab.colour is no known setting; remove it"),
        (
            "checkpoint.xyz=1",
            "checkpoint.xyz is no known setting; known here: asynchronous, best_metric, "
            "every, keep_best, keep_every, keep_last, path, start_from",
        ),
        (
            "trainer.epochs=many",
            "trainer.epochs='many': input should be a valid integer, unable to parse string as an integer",
        ),
        ("trainer.epochs=0", "trainer.epochs=0: input should be greater than 0"),
        ("trainer.seed=-1", "trainer.seed=-1: input should be greater than or equal to 0"),
        ("optimizer.betas=[2.0, 0.9]", "optimizer.betas.0=2.0: input should be less than 1"),
        (
            "trainer.timeout_seconds=10000000",
            "trainer.timeout_seconds=10000000: input should be less than or equal to 604800",
        ),
        (
            "data.features.tab.num_values=1000000000",
            "data.features.tab: num_values=1000000000 with kind='category': every rank holds such a table, "
            "which may have 1,000,000 values; use kind='hash', whose table is sharded",
        ),
        ("model.dropout=1.0", "model.dropout=1.0: input should be less than 1"),
        ("trainer.precision=fp8", "trainer.precision='fp8': input should be 'fp32' or 'bf16'"),
        (
            "data.batch_tokens=100",
            "data.batch_rows=8, data.batch_tokens=100, data.batch_cost=None: exactly one of them sizes a step; "
            "set one and remove the others (--set data.NAME= removes one)",
        ),
        ("data.balance_for=0", "data.balance_for=0: input should be greater than 0"),
        (
            "objective.kind=next_item",
            "objective.tasks=['is_click'] belongs to kind='ranking'; remove it for kind='next_item'",
        ),
        (
            "objective.tasks=[]",
            "objective.tasks is empty: ranking needs at least one action to predict, e.g. tasks = ['is_click'], "
            "or one of objective.regressions",
        ),
        (
            'objective.tasks=["is_click", "is_click"]',
            "objective.tasks=['is_click', 'is_click'] names a task twice; name each once",
        ),
        ("objective.task_weights=[-1.0]", "objective.task_weights.0=-1.0: input should be greater than or equal to 0"),
        ("optimizer.lr=inf", "optimizer.lr=inf: input should be a finite number"),
        ("model.qk_dim=100000000", "model.qk_dim=100000000: input should be less than or equal to 65536"),
        (
            "objective.num_in_batch=4",
            "objective.num_in_batch=4 adds negatives to loss='sampled_softmax', and objective.loss='full_softmax' "
            "would ignore them; set that loss, or num_in_batch to 0",
        ),
        (
            "objective.similarity=mlp",
            "objective.similarity='mlp' belongs to kind='next_item'; remove it for kind='ranking'",
        ),
        (
            "model.tail={num_layers=1, num_events=8, prefix=2}",
            "model.tail: model.tail.prefix=2 exempts tokens from a window, and model.tail.window=0 is none; "
            "set model.tail.window",
        ),
        ("objective.task_weights=[1.0, 2.0]", "objective.task_weights has 2 values for 1 tasks; give one per task"),
        (
            "data.features.tab.kind=word",
            "data.features.tab.kind='word': input should be 'category', 'bucket' or 'hash'",
        ),
        (
            "embeddings.sharding.item=diagonal",
            "embeddings.sharding.item='diagonal': input should be 'auto', 'row_wise', 'table_wise', 'column_wise' or "
            "'data_parallel'",
        ),
    ],
)
def test_a_bad_setting_is_named_with_value_and_remedy(recipe, override, expected):
    path = recipe()
    assert message(path, override) == f"{path}: {expected}"


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["objective.loss=bce", "objective.negatives_shared_by=sample"],
            "objective.negatives_shared_by='sample' is for loss='sampled_softmax' without num_in_batch, and "
            "objective.loss='bce', objective.num_in_batch=0; use 'step'",
        ),
        (
            ["objective.loss=bce", "objective.negatives_shared_by=position"],
            "objective.negatives_shared_by='position' is for loss='sampled_softmax', and objective.loss='bce'; "
            "use 'step'",
        ),
        (
            ["embeddings.sharding.item=data_parallel", "embeddings.optimizer.kind=adam"],
            "embeddings.sharding places ['item'] data_parallel, where embeddings.optimizer.kind='adam' is none of the "
            "optimizers; choose 'adamw' or 'rowwise_adagrad', or another placement",
        ),
        (
            ["checkpoint.every=6", "checkpoint.keep_every=9"],
            "checkpoint.keep_every=9 is no multiple of checkpoint.every=6, so that no save falls on it; set it to one",
        ),
        (
            ["checkpoint.every=6", "checkpoint.keep_best=2", "trainer.evaluate_every=4"],
            "checkpoint.keep_best=2 wants checkpoints of validated steps, but checkpoint.every=6 and "
            "trainer.evaluate_every=4 do not meet; set one to a multiple of the other",
        ),
        (
            ["data.targets_per_sample=2", "model.relative_bias=position"],
            "data.targets_per_sample=2: later targets of a sample would train further from the history than they are "
            "scored, as model.relative_bias='position' counts targets too; use 1 target, or relative_bias='none' with "
            "model.position_encoding and model.time_encoding",
        ),
        (
            ["data.targets_per_sample=2", "model.backbone=fuxi_alpha"],
            "data.targets_per_sample=2: later targets of a sample would train further from the history than they are "
            "scored, as model.backbone='fuxi_alpha' counts targets too; use 1 target, or another backbone",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_named_with_a_remedy(recipe, overrides, expected):
    path = recipe()
    assert message(path, *overrides) == f"{path}: {expected}"


@pytest.mark.parametrize("override", ["trainer.max_steps", "max_steps=3", "=3", "trainer.=3", ".epochs=3", ""])
def test_an_override_that_is_no_assignment_is_refused(recipe, override):
    expected = f"--set {override!r}: expected section.field=value, e.g. --set trainer.max_steps=100"
    assert message(recipe(), override) == expected


def test_patience_with_storage_that_the_watchdog_would_cut_short_is_refused(recipe):
    said = message(recipe(), "data.retry_seconds=600")
    assert "data.retry_seconds=600 is not shorter than trainer.watchdog_seconds=300, which would end the step" in said
    load_config(recipe(), ["data.retry_seconds=600", "trainer.watchdog_seconds=900"])
    load_config(recipe(), ["trainer.watchdog_seconds=5"])


def test_a_bad_override_is_shown_without_the_key_of_an_address(recipe):
    said = message(recipe(), "checkpoint=s3://KEY:SECRET@bucket/run")
    assert said.startswith("--set 'checkpoint=s3://bucket/run': expected section.field=value")


def test_an_override_through_a_value_is_refused(recipe):
    assert message(recipe(), "data.path.x=3") == "--set 'data.path.x=3': 'path' is a value, not a section"


@pytest.mark.parametrize(
    ("removed", "expected"),
    [
        ("dim = 8\n", "embeddings.dim is missing; set it"),
        ("batch_rows = 8\n", "data.batch_rows=None, data.batch_tokens=None, data.batch_cost=None: exactly one of "
                             "them sizes a step; set one and remove the others (--set data.NAME= removes one)"),
        ("epochs = 1\n", NEITHER_END),
        ("[trainer]\nepochs = 1\n", "trainer is missing; set it"),
    ],
)  # fmt: skip
def test_a_missing_setting_is_named(recipe, removed, expected):
    assert removed in MINIMAL
    path = recipe(MINIMAL.replace(removed, ""))
    assert message(path) == f"{path}: {expected}"


def test_all_mistakes_of_a_file_are_told_at_once(recipe):
    path = recipe(MINIMAL.replace("width = 8", "wdith = 8"))
    assert (
        message(path)
        == f"{path}: model.width is missing; set it; model.wdith is no known setting; did you mean 'width'?"
    )


def test_an_unknown_recipe_is_answered_with_the_nearest_name_and_the_list():
    told = message("hstu_kuairand_smaple")
    assert told.startswith("no recipe 'hstu_kuairand_smaple'; did you mean 'hstu_kuairand_sample'? recipes: ")
    assert told.endswith("; a file of your own must end in .toml")
    assert "did you mean" not in message("zzz")


def test_a_file_that_is_missing_unreadable_or_no_toml_is_refused(recipe, tmp_path):
    missing, folder = tmp_path / "none.toml", tmp_path / "folder.toml"
    folder.mkdir()
    assert (
        message(str(missing)) == f"cannot read the configuration {missing}: No such file or directory; check the path"
    )
    assert message(str(folder)) == f"cannot read the configuration {folder}: Is a directory; check the path"
    path = recipe(b'path = "caf\xe9"')
    assert message(path) == f"{path} is not UTF-8 text (invalid continuation byte at byte 11); a configuration is TOML"
    path = recipe("[data\n")
    assert message(path).startswith(f"{path} is not valid TOML: ")
    path = recipe("data = 3\n")
    assert "data=3: input should be a valid dictionary" in message(path)


def test_reading_a_configuration_imports_neither_torch_nor_numpy():
    code = (
        "import sys; from ultrarec.trainer.config import load_config, list_recipes; load_config(list_recipes()[0]);"
        "print([m for m in ('torch', 'numpy', 'pyarrow') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("model.width=12", False),
        ("embeddings.dim=12", False),
        ("data.seed=1", False),
        ("data.batch_rows=9", False),
        ("objective.head_hidden=9", False),
        ("data.path=elsewhere", True),
        ("embeddings.sharding.item=row_wise", True),
        ("trainer.max_steps=9", True),
        ("checkpoint.every=9", True),
        ("data.prefetch=9", True),
        ("data.threads=9", True),
        ("data.bad_data=skip", True),
    ],
)
def test_a_checkpoint_belongs_to_a_model_and_an_order_of_data_not_to_a_machine(recipe, override, same):
    path = recipe()
    assert (load_config(path, [override]).training_hash() == load_config(path).training_hash()) is same
