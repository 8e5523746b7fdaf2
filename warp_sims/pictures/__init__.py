"""Pictures.

recording   a trained policy's rollout as arrays
animation   moving pictures of it
drawing     what a system draws with
plots       curves of a run
"""
