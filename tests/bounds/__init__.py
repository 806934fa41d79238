"""Families with values at the limits of their dtypes, and what each codec may miss of them."""
