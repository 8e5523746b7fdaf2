"""The peers of `warp-sims bench`; see README.md."""

PEERS = {
    "jax": "jax_scan:JaxScan",
    "torch": "torch_eager:TorchEager",
    "torch-compile": "torch_compiled:TorchCompiled",
    "warp-tape": "warp_tape:WarpTape",
}
"""Name in tables: module:Class."""
