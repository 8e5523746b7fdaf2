"""Training by gradients of whole rollouts.

config            settings, checked
train, together   the loops: one policy, or several of one architecture at once
updates, graphed  one update, and as a CUDA graph
optimizers        by name
divergence        what is done when numbers are lost
processes         what several processes exchange; meeting: what they settle first
runs, run_config, provenance
                  what a run folder holds
resuming, durable, run_lock, interruption
                  what fits together, how it is written, by whom, and how a run is stopped
published         the settings and jobs of the paper
"""
