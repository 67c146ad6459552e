"""Rung 3: the same functions on a Wan2.1 checkpoint folder. Start with README.md, or `python wan_scale/run.py`."""
