"""Pictures, and rollouts on a Warp tape.

recording   a rollout recorded on a Warp tape
animation   moving pictures of controlled systems
drawing     how each built-in system is drawn
plots       curves of runs
"""
