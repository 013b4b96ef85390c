"""How the compiled losses of a model make one number of the losses of the examples."""


def is_mean_over_examples(model):
    """Return whether the compiled losses say that they are means over the examples of the batch.

    Only then is L(B) = sum_i (b_i/B) L(B_i) for a model that maps each example by itself.
    """
    losses = [loss for loss in losses_of(model) if loss is not None]
    reductions = {getattr(loss, "reduction", "sum_over_batch_size") for loss in losses}
    return reductions <= {"sum_over_batch_size", "mean"}


def losses_of(model):
    """Return the compiled losses of the outputs as a list, `None` where there is none."""
    return _leaves(model.loss)


def _leaves(structure):
    # Keras's `tree.flatten` takes what TensorFlow makes of a tuple for a leaf.
    if isinstance(structure, dict):
        structure = structure.values()
    elif not isinstance(structure, (list, tuple)):
        return [structure]
    return [leaf for part in structure for leaf in _leaves(part)]
