"""Short-horizon actor-critic: SHAC under flow R, and the same under every other flow.

`config.py` holds the settings, `task.py` what a system has to say of episodes, `networks.py` actor and
critic, `targets.py` what they are trained on, `worlds.py` where the worlds of a run are, `updates.py` one
update, `evaluation.py` whole episodes, `run.py` the loop behind `ws.train_actor_critic`, `folder.py` what
its run folder holds and how it is resumed, `command.py` `warp-sims train SYSTEM --algorithm shac`.
"""
