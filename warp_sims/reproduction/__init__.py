"""`warp-sims reproduce`: the published experiments again, and a page about what they gave.

`run` shares the trainings out among processes of `worker` and shows their `progress`; `report` writes the
page with its `figures`, and `toy` computes the paper's two studies in the plane. What was published, as
settings and jobs, is in `warp_sims.training.published`: other commands take their defaults from it.
"""
