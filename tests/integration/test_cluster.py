"""The test cluster itself: that it does to etcd what tests believe it does."""

from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.etcd_process import EtcdProcess, EtcdProcessError

pytestmark = pytest.mark.etcd


def value(member: EtcdProcess) -> bytes:
    return member.etcdctl("get", "--print-value-only", "a").strip()


def test_members_lead_die_freeze_and_are_replaced(etcd_binary: Path) -> None:
    with Cluster(etcd_binary) as cluster:
        to = cluster.followers()[0]
        cluster.move_leader(to)
        assert cluster.leader() is to

        to.kill()
        second = cluster.leader(besides=to)
        assert second is not to
        second.etcdctl("put", "a", "1")
        second.pause()
        (third,) = cluster.running
        with pytest.raises(EtcdProcessError):
            third.etcdctl("--command-timeout=0.2s", "get", "a")
        cluster.heal()
        assert [value(member) for member in cluster.members] == [b"1"] * 3

        replaced = cluster.replace(cluster.followers()[0])
        assert value(replaced) == b"1"
        learner = cluster.add(learner=True)
        with pytest.raises(EtcdProcessError, match="learner"):
            learner.etcdctl("--command-timeout=0.2s", "get", "a")
