"""Training: tasks, the one loop, the interface of methods, finetuning at fixed widths."""
