"""Forward and backward pass of a rollout as plain functions of tensors."""
