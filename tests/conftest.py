"""Settings of the test process."""

import torch
import warp as wp

# The tensors here are small: threads that wait for each other cost several times the work.
# Tests of threads set their own number.
torch.set_num_threads(1)
# Warp's notes on every module that it compiles would bury the output.
wp.config.log_level = wp.LOG_WARNING
