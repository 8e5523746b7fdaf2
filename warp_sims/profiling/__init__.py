"""`warp-sims profile` and `warp_sims.profile`: where the time of a rollout and its gradients goes.

`run` measures the `case` that `command` or a caller describes, `attribution` shares the time out among what
was recorded, `resources` compiles the kernels for what they take of a GPU, `generated` times Warp's own
adjoints, and `result` is what is returned, as a `table` too. What kernels have to do is counted in
`warp_sims.profiling.work`, what the machine reaches is measured in `warp_sims.profiling.ceilings`.
"""
