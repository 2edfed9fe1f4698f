"""A report of runs in one file: `python -m jax_rlvr.report`."""
