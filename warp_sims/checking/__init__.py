"""`warp_sims.check` and `warp-sims check`: is a system's adjoint that of its step, in every form it comes in?

`run.py` has the function behind the command, `command.py` its options, `report.py` what it returns.
`sizes.py` compares the sizes of a system with its device functions, `forms.py` runs these at many points,
`differences.py` takes derivatives by finite differences, `functions.py` compares step and loss, `physical.py`
the cotangents of physical parameters, `rollouts.py` whole rollouts under each flow.
"""
