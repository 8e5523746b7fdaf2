"""A GPU's blocks of threads on a CPU: executes the text that Warp compiles for CUDA. See README.md."""
