"""What tensors and Warp share: memory, streams, prepared launches, threads, tracing, prepared systems."""
