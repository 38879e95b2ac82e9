"""What goes on from a checkpoint, against what never stopped."""
