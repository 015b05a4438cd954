"""A Ray cluster of several nodes on this machine, as a process of its own that is told on standard input what to do.

    python -m tests.ray_cluster HIDDEN...

`add` and `remove` are answered with a line when they are done. Every node has one CPU. HIDDEN folders are empty and
read-only for all that runs on a node, as if it were another machine; the first node is where drivers run, and has none.
"""

import ctypes
import os
import subprocess
import sys

from ray.cluster_utils import Cluster

CLONE_NEWNS = 0x20000


def hide(folders: list[str]) -> None:
    """For this process and all that it starts."""
    if not folders:
        return
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS):
        raise OSError(ctypes.get_errno(), "no mount namespace of its own")
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    for folder in folders:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "ro,size=4k", "tmpfs", folder], check=True)


def main(folders: list[str]) -> None:
    hide(folders)
    os.chdir("/")
    quiet = {"include_dashboard": False, "object_store_memory": 80 << 20}
    cluster = Cluster(initialize_head=True, head_node_args={**quiet, "num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=80 << 20) for _ in range(2)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "add":
            nodes.append(cluster.add_node(num_cpus=1, object_store_memory=80 << 20))
        else:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
        print(len(nodes), flush=True)
    cluster.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(sys.argv[1:])
