"""Systems: equations, step, loss and adjoints by hand, and their forms in vector lanes and in memory."""
