"""A whole run, from a trained network and a budget to a packed model and its report, in resumable stages."""
