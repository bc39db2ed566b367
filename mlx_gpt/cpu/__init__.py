"""What makes a CPU without a GPU quick; a GPU needs none of it."""
