"""Train the pruned model towards the dense model's predictions, and keep its best weights."""
