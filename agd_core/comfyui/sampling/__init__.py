"""A MODEL that samples with guidance embedded."""
