"""Articulated robots: `ws.Robot` and the tasks built on it.

`model` has a robot's numbers, `geometry` its poses and mass matrix in NumPy, `stability` the longest time
step that its stiffnesses allow. `articulated` is the base class of the systems, `robot` is `ws.Robot`. `mjcf`
reads files with MuJoCo's compiler, `contacts` their shapes, and `build` turns its arrays into a model.
`hopper`, `half_cheetah`, `ant` and `linked_pendulum` are the registered systems; `runners` is what
half-cheetah and ant share, `shapes` the solids they are built from. `picture` draws them all.
"""
