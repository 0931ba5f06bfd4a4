"""``mrmae doctor``: checks of a node, its links and the training engines before the first job."""
