"""`warp-sims profile` and `warp_sims.profile`: where the time of a rollout and its gradients goes.

`run` measures the `case` that `command` or a caller describes. `attribution` divides the time among the
recorded events. `resources` compiles the kernels and reads what they take of a GPU. `generated` times Warp's
own adjoints, and `verdict` decides which adjoint is right. `result` is what is returned, and `table` prints
it. `work` counts operations and bytes of the kernels, `ceilings` measures what the machine reaches.
"""
