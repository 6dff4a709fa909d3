"""One forward per group: the prefix tree shared by student and teacher. See docs/prefix_tree.md."""
