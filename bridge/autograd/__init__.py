"""The passes as torch's operators and autograd functions, and on a Warp tape."""
