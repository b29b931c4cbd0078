import shlex

import pytest

from ultrarec.data.errors import UserError
from ultrarec.launch.application import Size
from ultrarec.launch.component import train

RECIPE = "hstu_kuairand_sample"


def command_of(app):
    shell, script = app.roles[0].args
    assert (app.roles[0].entrypoint, shell) == ("bash", "-c")
    return script


def test_one_node_runs_torchrun_on_the_trainer():
    app = train("trainer.max_steps=3", config=RECIPE, out="runs/x", j="1x2")
    assert command_of(app) == (
        "exec torchrun --nnodes 1 --nproc-per-node 2 --max-restarts 3 --shutdown-timeout 120"
        " --rdzv-backend c10d --rdzv-endpoint localhost:0 --rdzv-id ${app_id}"
        " --role trainer --tee 3 --local-ranks-filter 0 --log-dir runs/x/logs/${app_id}/node-${replica_id}"
        " -m ultrarec.trainer hstu_kuairand_sample --out runs/x --set trainer.max_steps=3"
    )


def test_two_nodes_meet_at_the_first_ones_address():
    app = train(config=RECIPE, j="2x8")
    assert app.roles[0].num_replicas == 2
    assert '--rdzv-endpoint "$${${rank0_env}:=localhost}:29500"' in command_of(app)


def test_an_elastic_job_tells_torchrun_and_the_scheduler_its_fewest_nodes():
    app = train(config=RECIPE, j="1:3x2")
    assert (app.roles[0].num_replicas, app.roles[0].min_replicas) == (3, 1)
    assert "torchrun --nnodes 1:3 --nproc-per-node 2 " in command_of(app)


def test_a_node_offers_what_the_launch_section_says():
    app = train(
        "launch.nodes=4",
        "launch.procs_per_node=8",
        "launch.gpus_per_node=8",
        "launch.cpus_per_node=96",
        "launch.memory_gib_per_node=512",
        "launch.image=registry/ultrarec:1",
        "launch.max_retries=5",
        config=RECIPE,
    )
    role = app.roles[0]
    assert (role.num_replicas, role.max_retries, role.image) == (4, 5, "registry/ultrarec:1")
    assert (role.resource.gpu, role.resource.cpu, role.resource.memMB) == (8, 96, 512 * 1024)
    assert role.env["OMP_NUM_THREADS"] == "12"


def test_the_image_argument_wins():
    assert train(config=RECIPE, image="mine:2").roles[0].image == "mine:2"


def test_a_job_that_may_lose_nodes_says_how_often_ranks_start_again_and_never_looks_for_them_in_an_old_place():
    app = train("launch.max_restarts=50", config=RECIPE, j="2:4x8")
    assert "--nnodes 2:4 --nproc-per-node 8 --max-restarts 50 " in command_of(app)
    assert app.roles[0].env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"


def test_no_shell_ever_sees_inside_a_value():
    value = 'data.path="a b/$HOME/`id`"'
    script = command_of(train(value, config=RECIPE, out="runs/$x y")).replace("$$", "$")
    words = shlex.split(script)
    assert words[words.index("--set") + 1] == value
    assert words[words.index("--out") + 1] == "runs/$x y"


@pytest.mark.parametrize(
    "text", ["2", "x2", "0x2", "2x0", "2x-1", "1x2x3", "axb", "1.5x2", "2 x 2", "3:2x1", "0:2x1", ":2x1"]
)
def test_a_size_that_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="expected NODESxPROCS"):
        Size.parse(text)


def test_more_processes_than_gpus_are_refused():
    with pytest.raises(UserError, match="use -j 1x4"):
        train("trainer.device=auto", "launch.gpus_per_node=4", config=RECIPE, j="1x8")


def test_torchx_finds_the_component_and_still_its_own():
    from torchx.specs.finder import get_components

    names = set(get_components())
    assert {"ultrarec.train", "dist.ddp", "utils.echo"} <= names
    assert [name for name in names if name.startswith("ultrarec.")] == ["ultrarec.train"]
