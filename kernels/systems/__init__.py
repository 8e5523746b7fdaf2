"""Systems: equations, step, loss, hand-written adjoints, and their further forms for vector lanes and memory."""
