"""Which of many topic filters match a topic, without trying each."""

from __future__ import annotations

from typing import Final, TypeAlias

TreeNode: TypeAlias = "dict[str, TreeNode]"

# Where a filter ends: no level can hold a null character ([MQTT-4.7.3-2]).
END: Final = "\0"


class FilterTree:
    """Valid filters, without `$share/{group}/`, by their levels. Matching costs what matches, not what is there."""

    def __init__(self) -> None:
        """Empty."""
        self._root: TreeNode = {}

    def empty(self) -> bool:
        """Whether there is none."""
        return not self._root

    def add(self, topic_filter: str) -> None:
        """One more; again is nothing."""
        node = self._root
        for level in topic_filter.split("/"):
            node = node.setdefault(level, {})
        node[END] = {}

    def discard(self, topic_filter: str) -> None:
        """One less; what led to it alone goes, too."""
        path, node = [], self._root
        for level in (*topic_filter.split("/"), END):
            if level not in node:
                return
            path.append((node, level))
            node = node[level]
        for parent, level in reversed(path):
            if parent[level]:
                return
            del parent[level]

    def matching(self, topic: str) -> list[str]:
        """The filters that match a topic, in no order that depends on how they came. A topic may have 32,767 levels."""
        levels = topic.split("/")
        found: list[str] = []
        # Nodes that match the levels so far, each with its path, from the last one pushed on.
        nodes: list[tuple[TreeNode, tuple[str, ...]]] = [(self._root, ())]
        while nodes:
            node, path = nodes.pop()
            depth = len(path)
            hidden = depth == 0 and levels[0].startswith("$")  # [MQTT-4.7.2-1]
            if "#" in node and not hidden:
                found.append("/".join((*path, "#")))  # also the parent level: "a/#" matches "a"
            if depth == len(levels):
                if END in node:
                    found.append("/".join(path))
                continue
            nodes += (
                (node[level], (*path, level))
                for level in dict.fromkeys((levels[depth], "+"))
                if level in node and not (level == "+" and hidden)
            )
        return sorted(found)
