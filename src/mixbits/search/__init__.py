"""Solvers over tables of widths and costs, without torch."""
