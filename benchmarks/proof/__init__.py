"""The parts of `benchmarks.gpu_proof`: each section runs in a process of its own and leaves one JSON file."""
