"""`warp-sims reproduce`: the published experiments again, and a page about what they gave.

`run` distributes the trainings among processes of `worker` and shows their `progress`. `report` writes the
page with its `figures`, and `toy` computes the paper's two studies in the plane. The published settings and
jobs are in `warp_sims.training.published`.
"""
