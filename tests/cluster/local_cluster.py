"""A Ray cluster of this machine in a process of its own: `TEMPORARY-FOLDER`, then a command a line.

`add` starts a node of one CPU and prints its place; `remove PLACE` kills that node; the end of the input ends all.
"""

import os
import sys
from pathlib import Path
from threading import Thread

os.environ |= {
    "RAY_TMPDIR": sys.argv[1],  # else the address of the cluster is written to a folder that only other clusters make
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # 127.0.0.1 stays what it is
}

from ray.cluster_utils import Cluster

NODE = {"node_ip_address": "127.0.0.1", "object_store_memory": 80 << 20, "include_dashboard": False}


def main() -> None:
    (Path(sys.argv[1]) / "ray").mkdir()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": sys.argv[1], **NODE})
    print(cluster.address, flush=True)
    nodes = []
    for line in sys.stdin:
        order, *place = line.split()
        if order == "add":
            nodes.append(cluster.add_node(num_cpus=1, **NODE))
        else:
            node = nodes[int(place[0])]
            Thread(target=cluster.remove_node, args=(node, False), daemon=True).start()  # waits until it is noticed
        print(len(nodes) - 1, flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
