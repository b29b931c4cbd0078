"""Whatever dies, and whenever: the run ends as if nothing had happened. `make faults` runs the long campaign."""

import pytest
from fault_campaign import Campaign, Fault, check_complete, check_equal, survive

# One of each kind, at moments that have been chosen to lie inside every part of a step, a save and the manifest.
CHOSEN = {
    "kill one": [Fault("kill one", rank=1, phase="tables", count=8, delay=0.0)],
    "kill all": [Fault("kill all", rank=0, phase="manifest", count=3, delay=0.0)],
    "terminate": [
        Fault("terminate", rank=1, phase="forward", count=5, delay=0.0),
        Fault("terminate", rank=0, phase="data", count=7, delay=0.0),
    ],
    "stop": [Fault("stop", rank=0, phase="backward", count=5, delay=0.0)],
    "stop in a save": [Fault("stop", rank=0, phase="manifest", count=2, delay=0.0)],
    "kill writer": [Fault("kill writer", rank=1, phase="checkpoint", count=4, delay=0.0)],
    "stop writer": [Fault("stop writer", rank=1, phase="checkpoint", count=7, delay=0.0)],
    "disk full": [Fault("disk full", rank=1, phase="checkpoint", count=2, delay=0.0)],
    "all full": [Fault("all full", rank=0, phase="agreement", count=7, delay=0.0)],
    "corrupt": [
        Fault("corrupt", rank=0, phase="agreement", count=14, delay=0.0),
        Fault("corrupt", rank=0, phase="agreement", count=10, delay=0.0, target="index", is_cut=True),
        Fault("corrupt", rank=0, phase="agreement", count=8, delay=0.0, target="manifest", place=0.02),
    ],
}


@pytest.fixture(scope="module")
def campaign(tmp_path_factory):
    return Campaign(tmp_path_factory.mktemp("campaign"))


@pytest.mark.parametrize("name", CHOSEN)
def test_after_a_fault_the_run_equals_the_uninterrupted_one_bit_for_bit(campaign, tmp_path, name):
    struck = survive(campaign.recipes["fixed"], tmp_path / "out", CHOSEN[name], world_sizes=[2])
    assert struck == [fault.kind for fault in CHOSEN[name]]
    check_equal(tmp_path / "out", campaign.whole["fixed"], world_size=2)


@pytest.mark.parametrize("world_size", [1, 3])
def test_after_the_loss_of_a_rank_the_run_goes_on_with_other_ranks_and_trains_each_row_once(
    campaign, tmp_path, world_size
):
    faults = [Fault("kill one", rank=1, phase="backward", count=8, delay=0.0)]
    assert survive(campaign.recipes["elastic"], tmp_path / "out", faults, world_sizes=[2, world_size]) == ["kill one"]
    check_complete(tmp_path / "out", campaign.whole["elastic"])
