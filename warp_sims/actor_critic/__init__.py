"""Short-horizon actor-critic: SHAC under flow R, and the same under every other flow.

`config.py` has the settings, `task.py` what a system must supply for episodes, `networks.py` actor and
critic, `targets.py` their training targets, `worlds.py` the state of the worlds of a run, `updates.py` one
update, `evaluation.py` whole episodes, `run.py` the loop of `ws.train_actor_critic`, `folder.py` its run
folder and how it is resumed, `command.py` `warp-sims train SYSTEM --algorithm shac`.
"""
