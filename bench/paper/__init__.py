"""The paper's tables and figures, ours beside them: `python -m bench.paper table4`, from a checkout's root.

The runs are the groups of recipes.toml; what is missing is run, and whatever was interrupted goes on.
"""
