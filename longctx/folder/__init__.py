"""The folder of a run: what its path may be, how files in it are written, its log of steps."""
