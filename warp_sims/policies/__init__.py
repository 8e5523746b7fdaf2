"""Policies, and what runs fused.

networks      MLP and WaveCNN, `explain`, and the fused form of a policy, if it has one
recognition   whether any module has one: traced again only when it changes, and tried against itself
translation   from torch.fx to operations of a fused policy, operation by operation
composing     the grammar of fused policies
convolving    values of channels and positions in it
observed      a policy of what a system lets it observe
gaussian      a policy that draws from noise given as input
ensembles     policies of one architecture as one
"""
