"""The cluster file: defaults, what is refused and how that is said, bandwidths."""

import pytest

from ling.config import UserError
from ling.plan.cluster import Cluster, cluster_keys, load_cluster


def load(tmp_path, text):
    path = tmp_path / "cluster.yaml"
    path.write_text(text)
    return load_cluster(path)


def test_what_is_not_given_is_an_h100_node(tmp_path):
    cluster = load(tmp_path, "name: mine\nnode: {gpus: 4}\nslurm: {partition: gpu, time_limit: 1-00:00:00}\n")
    assert (cluster.name, cluster.node.gpus, cluster.gpu) == ("mine", 4, Cluster().gpu)
    assert (cluster.slurm.partition, cluster.slurm.account) == ("gpu", None)
    assert load(tmp_path, "environment: {NCCL_SOCKET_IFNAME: eth0, N: 3}").environment == {
        "NCCL_SOCKET_IFNAME": "eth0",
        "N": "3",
    }


def test_the_link_depends_on_the_span():
    cluster = Cluster()
    assert cluster.bandwidth(8) == 450e9
    assert cluster.bandwidth(9) == 50e9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu: {memory_gb: 80}", r"cluster.yaml: unknown key gpu.memory_gb; did you mean gpu.memory_gib\?"),
        ("gpus: {name: H100}", r"unknown key gpus; did you mean"),
        ("gpu: H100", r"gpu: expected a mapping, got 'H100'; write gpu: \{name: value\}"),
        ("node: {gpus: 0}", r"node.gpus: expected a whole number greater than 0, got 0; GPUs of one node"),
        ("node: {gpus: 7.5}", r"node.gpus: expected a whole number"),
        ("node: {inter_node_gb_s: fast}", r"node.inter_node_gb_s: expected a number greater than 0, got 'fast'"),
        ("storage: {write_gb_s: .inf}", r"storage.write_gb_s: expected a number"),
        ("slurm: {partition: 7}", r"slurm.partition: expected text, got 7; quote it"),
        ("environment: [A]", r"environment: expected a mapping"),
        ("colour: red", r"unknown key colour; the keys are name, environment"),
    ],
)
def test_wrong_files(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, text)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no such config file \(named by --cluster\)"):
        load_cluster(tmp_path / "none.yaml")


def test_every_key_says_what_it_is():
    assert all(row.metadata["doc"] for row in cluster_keys().values())
