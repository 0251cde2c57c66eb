"""Clusters on hosts of one's own, over SSH: what Ray's cluster launcher leaves undone there.

`ray up` returns when the head runs, and says nothing of workers that never join; `ray down` stops the head alone.
"""

from paceline.launcher.cluster import Cluster
from paceline.launcher.file import ClusterFile, load_cluster_file
from paceline.launcher.state import HostState

__all__ = ["Cluster", "ClusterFile", "HostState", "load_cluster_file"]
