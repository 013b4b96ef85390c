"""How the compiled losses of a model make one number of those of the examples."""

import keras


def is_mean_over_examples(model):
    """Return whether the compiled losses say that they are means over the examples of the batch.

    Only then is L(B) = sum_i (b_i/B) L(B_i) for a model that maps each example by itself.
    """
    losses = [x for x in keras.tree.flatten(model.loss) if x is not None]
    reductions = {getattr(loss, "reduction", "sum_over_batch_size") for loss in losses}
    return reductions <= {"sum_over_batch_size", "mean"}
