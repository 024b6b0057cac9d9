"""A base as the trainer sees it: denoising, encoding, memory."""
