"""Articulated robots: `ws.Robot` and the tasks built on it.

`model` holds a robot's numbers, `geometry` its poses and mass matrix in NumPy, `stability` the longest time
step that its stiffnesses allow, `articulated` the system, `robot` what users name, `mjcf` what MuJoCo's
compiler reads, `build` turns its arrays into a model; `hopper`, `half_cheetah` and `ant` (`runners` is what
those two share) and `linked_pendulum` are the registered systems, `shapes` what they are put together from,
and `picture` draws them all.
"""
