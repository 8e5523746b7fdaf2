"""`warp-sims bench`: updates of a system, timed beside those of peers that have its equations.

`command` has the options, `settings` and `case` say what is measured and what is right, `contestants` finds
who takes part, `run` measures row by row with the clocks of `timing` (`ensemble` the rows of many controllers
at once, `worker` what needs a fresh process), and `report` writes the tables.
"""
