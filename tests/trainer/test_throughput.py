"""Operations per second in the metrics, against samples counted one by one."""

import itertools
import math

import pytest
import torch
from random_datasets import ACTIONS
from small_runs import config_of

from ultrarec.model.flops import Inputs, Sample, sample_flops
from ultrarec.trainer.build import build_loader, load_dataset
from ultrarec.trainer.journal import read_lines
from ultrarec.trainer.parallel import World
from ultrarec.trainer.throughput import Throughput

CHANNELS = (
    "model.channels={clicks = {actions = ['is_click'], num_events = 3}, "
    "all = {actions = ['long_view', 'is_click'], num_events = 9}}"
)
CPU = torch.device("cpu")


def bits_taken(bits):
    return {name for number, name in enumerate(ACTIONS) if bits >> number & 1}


def one_by_one(config, batch):
    inputs = Inputs(embedding_dim=6, num_actions=2, num_event_features=1, num_outcomes=1)
    total = 0.0
    for (begin, end), targets in zip(
        itertools.pairwise(batch.offsets.tolist()), batch.num_targets.tolist(), strict=True
    ):
        taken = [bits_taken(bits) for bits in batch.actions[begin : end - targets].tolist()]
        chosen = tuple(
            sum(not names.isdisjoint(channel.actions) for names in taken) for channel in config.model.channels.values()
        )
        sample = Sample(contextual=1, history=end - begin - targets, targets=targets, chosen=chosen)
        total += sample_flops(config.model, config.objective, sample, inputs).train
    return total


def batches_of(config):
    return list(build_loader(config, load_dataset(config), World(0, 1, CPU), split="train"))


def test_every_line_of_a_run_states_the_operations_of_its_samples(dataset, trained):
    config = config_of(dataset, "ranking")
    batches = batches_of(config)
    lines = [line for line in read_lines(trained(1)["ranking"] / "metrics.jsonl") if line["split"] == "train"]
    for line, batch in zip(lines, batches, strict=True):
        operations = line["model_tflops"] * 1e12 / line["samples_per_second"] * len(batch.samples)
        assert operations == pytest.approx(one_by_one(config, batch), rel=1e-9)
        assert "mfu" not in line


def test_a_window_of_steps_is_the_sum_of_its_batches_and_rematerialising_is_no_progress(dataset):
    config = config_of(dataset, "ranking", "model.window=3", "model.full_tail=2")
    batches = batches_of(config)
    expected = sum(one_by_one(config, batch) for batch in batches)
    for settings in ("model.rematerialize=false", "model.rematerialize=true"):
        again = config_of(dataset, "ranking", "model.window=3", "model.full_tail=2", settings)
        throughput = Throughput(again, num_items=45, actions=ACTIONS, device=CPU)
        for batch in batches:
            throughput.add(batch)
        assert throughput.read() == pytest.approx(expected, rel=1e-12)
        assert throughput.read() == 0.0


def test_channels_count_the_events_that_they_select(dataset):
    config = config_of(dataset, "ranking", CHANNELS)
    batches = batches_of(config)
    throughput = Throughput(config, num_items=45, actions=ACTIONS, device=CPU)
    for batch in batches:
        throughput.add(batch)
    assert throughput.read() == pytest.approx(sum(one_by_one(config, batch) for batch in batches), rel=1e-12)


@pytest.mark.parametrize(("precision", "peak"), [("bf16", 989.4e12), ("fp32", 66.9e12)])
def test_utilisation_is_of_the_peak_of_all_ranks_where_it_is_known(dataset, monkeypatch, precision, peak):
    config = config_of(dataset, "ranking", f"trainer.precision={precision}")
    for name, is_known in (("NVIDIA H100 80GB HBM3", True), ("NVIDIA H100 PCIe", False)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device, name=name: name)
        throughput = Throughput(config, num_items=45, actions=ACTIONS, device=torch.device("cuda", 0))
        metrics = throughput.metrics(4 * peak, 10.0, num_ranks=2)
        assert math.isclose(metrics["model_tflops"], 0.4 * peak / 1e12)
        assert metrics.get("mfu") == (pytest.approx(0.2) if is_known else None)
