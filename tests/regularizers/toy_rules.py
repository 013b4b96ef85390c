"""Small rules that use what the contract of `Regularizer` offers, each with its NumPy reading.

An oracle is a function `(rule, gradient, w, x, y, memory) -> (direction, memory)`, with
`gradient(w, x, y)` the gradient of the mean loss and `w` one vector. The direction is what the
weights move against.
"""

import keras
import numpy as np
from frameworks import slices
from keras import ops

from keras_infomcr.regularizers import (
    EntropySGD,
    Regularizer,
    SharpnessAware,
    SpectralRadius,
    Step,
    SubBatchPerturbation,
    WeightNoise,
)


@keras.saving.register_keras_serializable("keras_infomcr_tests")
class Anchored(Regularizer):
    """Pulls the weights to a mean of where earlier steps led, and makes the main pass itself."""

    def __init__(self, strength=0.5, keep=0.75):
        super().__init__(strength)
        self.keep = keep

    def build(self, variables):
        self.memory = [
            keras.Variable(ops.copy(v), dtype=v.dtype, trainable=False, name=f"anchor_{k}")
            for k, v in enumerate(variables)
        ]

    def replaces_main_pass(self, model):
        return True

    def __call__(self, objective, batch, memory):
        weights = objective.weights()
        main = objective.evaluate(weights, objective.state(), batch)
        pull = [w - m for w, m in zip(weights, memory)]
        value = sum(ops.sum(ops.square(p)) for p in pull) / 2
        # So that the memory depends on the batch, too: what replicas remember must be averaged.
        ahead = [w - g for w, g in zip(weights, main.gradients)]
        anchors = [self.keep * m + (1 - self.keep) * w for w, m in zip(ahead, memory)]
        return Step(value, pull, main, anchors)

    def get_config(self):
        return {"strength": float(self.strength), "keep": self.keep}


def anchored_oracle(rule, gradient, w, x, y, memory):
    memory = w if memory is None else memory
    g = gradient(w, x, y)
    direction = g + float(rule.strength) * (w - memory)
    return direction, rule.keep * memory + (1 - rule.keep) * (w - g)


def perturbation_oracle(rule, gradient, w, x, y, memory):
    extra, count = 0.0, min(rule.num_sub_batches, len(x))
    for rows in np.array_split(np.arange(len(x)), count):
        g = gradient(w, x[rows], y[rows])
        h = gradient(w - rule.alpha * g, x[rows], y[rows])
        extra += len(rows) / len(x) * (g - h)
    return gradient(w, x, y) + float(rule.beta) * extra, None


def sharpness_oracle(rule, gradient, w, x, y, memory):
    """SAM and its family, read slice by slice; T of ASAM is |w| + eta, for there are no biases."""
    memory = np.zeros_like(w) if memory is None else memory
    factor = np.abs(w) + rule.eta if rule.adaptive else 1.0
    here = there = 0.0
    count = min(rule.num_sub_batches, len(x))
    for rows in np.array_split(np.arange(len(x)), count):
        g = gradient(w, x[rows], y[rows])
        d = factor * (g - memory if rule.direction == "noise" else g)
        norm = np.linalg.norm(d)
        eps = float(rule.rho) * factor * d / norm if norm else 0.0
        here = here + len(rows) / len(x) * g
        there = there + len(rows) / len(x) * gradient(w + eps, x[rows], y[rows])
    s = float(rule.strength)
    return (1 - s) * here + s * there, 0.9 * memory + 0.1 * here


def noise_oracle(rule, gradient, w, x, y, memory):
    """The gradient at noise drawn by the rule itself, scaled by the norms of two columns."""
    if memory is None:
        memory = ops.copy(rule._normals.memory()[0])
    kernel = ops.reshape(ops.convert_to_tensor(w), (3, 2))
    (draws,), seed = rule._normals.draw([kernel], memory)
    columns = np.linalg.norm(w.reshape(3, 2), axis=0)
    noise = float(rule.std) * ops.convert_to_numpy(draws) * columns
    return gradient(w + noise.ravel(), x, y), seed


def radius_oracle(rule, gradient, w, x, y, memory):
    """The Hessian of least squares does not depend on w: the penalty adds nothing to the gradient.

    What a step remembers is the part of the vector before in the space of the largest eigenvalue,
    the only one that the iteration finds of a repeated eigenvalue.
    """
    if memory is None:
        rule.build([keras.Variable(w)])
        memory = ops.convert_to_numpy(rule.memory[0].value)
    zero = np.zeros_like(w)
    hessian = np.stack([gradient(e, x, y) - gradient(zero, x, y) for e in np.eye(len(w))])
    values, vectors = np.linalg.eigh(hessian)
    space = vectors[:, np.abs(values) > np.abs(values).max() * (1 - 1e-9)]
    vector = space @ (space.T @ memory)
    return gradient(w, x, y), vector / np.linalg.norm(vector)


def entropy_oracle(rule, gradient, w, x, y, memory):
    """The paper's loop over mini-batches, without noise, with the momentum of the authors' codes.

    Algorithm 1 of Chaudhari et al., ICLR 2017, in weights, not in displacements.
    """
    inner, mean, velocity = w, w, np.zeros_like(w)
    for rows in slices(len(x), rule.num_steps):
        g = gradient(inner, x[rows], y[rows])
        velocity = rule.momentum * velocity + g
        force = float(rule.gamma) * (w - inner)
        inner = inner - rule.step_size * (g + rule.momentum * velocity - force)
        mean = rule.averaging * mean + (1 - rule.averaging) * inner
    return w - mean, None


def entropy_sgd(gamma):
    return EntropySGD(3, 0.1, gamma, 0.0, noise=0.0, averaging=0.25, seed=0)


# Each rule of the suite is one line: how it is made, given its strength, and its oracle.
RULES = {
    "sub_batch_perturbation": (lambda s: SubBatchPerturbation(0.05, s, 2), perturbation_oracle),
    "sam": (lambda s: SharpnessAware(0.05, s), sharpness_oracle),
    "asam": (lambda s: SharpnessAware(0.5, s, adaptive=True), sharpness_oracle),
    "m_sam": (lambda s: SharpnessAware(0.05, s, num_sub_batches=2), sharpness_oracle),
    "friendly_sam": (lambda s: SharpnessAware(0.05, s, direction="noise"), sharpness_oracle),
    "spectral_radius": (lambda s: SpectralRadius(s, 0.0, 3, 1e-9, seed=0), radius_oracle),
    "weight_noise": (lambda s: WeightNoise(s / 10, seed=0), noise_oracle),
    "entropy_sgd": (entropy_sgd, entropy_oracle),
    "anchored": (Anchored, anchored_oracle),
}

# Their training gradient is the mean over slices of the batch, whatever the model.
CUTTING = {"m_sam"}

# Their step goes over mini-batches, so that at no strength it is Keras's own. With several replicas
# a mini-batch is the union of slices, so that one device takes the same steps in another order.
STEPPING = {"entropy_sgd"}

# They draw other numbers on each replica.
DRAWING = {"weight_noise"}

# Rules with other arguments, the rule of the tests alone, and two whose own tests do much of the
# same; CI tries them in full.
VARIANTS = {"asam", "m_sam", "friendly_sam", "anchored", "entropy_sgd", "spectral_radius"}
