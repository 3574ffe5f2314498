"""`make gpu-check`: every check of a GPU in one call, each in a process and under a limit of its own."""
