"""Objects of ours in model options, which other nodes copy deeply."""


class SharedByDeepcopy:
    """A mixin: `copy.deepcopy` returns the object itself, for the sampling goes on with that one, not with a copy."""

    def __deepcopy__(self, memo):
        return self
