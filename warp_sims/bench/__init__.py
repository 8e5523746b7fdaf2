"""`warp-sims bench`: updates of a system, timed beside those of peers that have its equations.

`command` has the options. `settings` and `case` say what is measured and what is right. `contestants` finds
ours and the peers. `run` measures row by row with the clocks of `timing`; `ensemble` measures many policies
at once, `worker` what needs a fresh process. `report` writes the tables.
"""
