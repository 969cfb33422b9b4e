"""Training with text, labels, loss, optimiser and M here, and the frozen stack on a cloud."""
