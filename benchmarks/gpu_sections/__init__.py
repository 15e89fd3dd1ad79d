"""The sections of `benchmarks/gpu.py`: each module has `cases(run)`, what to measure in order of importance."""
