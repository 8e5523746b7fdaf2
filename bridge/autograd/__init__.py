"""The passes of a rollout as torch operators and autograd functions, and on a Warp tape."""
