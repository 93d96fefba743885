"""What grows with its input, computed in processes beside the event loop."""
