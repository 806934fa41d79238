"""A few numbers learned on a few rows: a codec's scalars, a merge's scale and weights."""
