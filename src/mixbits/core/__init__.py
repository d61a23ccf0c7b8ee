"""Plain data: grids, profiles, policies, costs, budgets, programs. Standard library and NumPy only."""
