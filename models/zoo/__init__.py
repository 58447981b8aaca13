"""The shipped detector: the INT8 file that ``edgesight run`` uses and its float version."""
