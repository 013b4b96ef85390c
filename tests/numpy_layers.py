"""Keras's layers and losses written by hand in NumPy, and derivatives that need no other code.

All functions are analytic where they are smooth, so that they take complex weights: with a step of
1e-30 the imaginary part of f(w + i h e) / h is the derivative to rounding (the error is of the
order h^2, and nothing is subtracted).
"""

import numpy as np

STEP = 1e-30
SPACING = 1e-3
STENCIL = [
    (s * k, s * c) for s in (1, -1) for k, c in enumerate((4 / 5, -1 / 5, 4 / 105, -1 / 280), 1)
]


def derivative(function, weights):
    """Return the derivatives of an array-valued function, each `[*values.shape, *weight.shape]`."""
    found = []
    for k, weight in enumerate(weights):
        columns = []
        for i in np.ndindex(weight.shape):
            moved = np.array(weight, complex)
            moved[i] += 1j * STEP
            columns.append(np.imag(function([*weights[:k], moved, *weights[k + 1 :]])) / STEP)
        columns = np.stack(columns, axis=-1)
        found.append(columns.reshape((*columns.shape[:-1], *weight.shape)))
    return found


def hessian_vector_product(function, weights, vector):
    """Return H v of a scalar function, by the eight-point stencil along the unit vector of v.

    With h = 1e-3 the step and G the gradient on the line, it errs by h^8 / 630 times the ninth
    derivative of G, which for a singularity of G at a distance of d is of the order 576 (h/d)^8:
    1e-13 for d = 0.1, as far as batch normalisation of a few examples has it. The rounding of G,
    of some 10 epsilon, is multiplied by 2/h: 4e-12 of |G|.
    """
    length = np.sqrt(sum((v**2).sum() for v in vector))
    products = [np.zeros_like(w) for w in weights]
    for distance, coefficient in STENCIL:
        moved = [w + distance * SPACING * v / length for w, v in zip(weights, vector)]
        for product, g in zip(products, derivative(function, moved)):
            product += coefficient * g * length / SPACING
    return products


def squared_errors(y, predictions):
    return ((predictions - y) ** 2).mean(-1)


def cross_entropies(y, logits):
    return -(y * np.log(softmax(logits))).sum(-1)


def softmax(logits):
    powers = np.exp(logits - logits.real.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def flatten(x):
    return x.reshape(len(x), -1)


def conv_2d(x, kernel, bias, stride=1, padding=(0, 0)):
    """Convolve `[n, rows, columns, channels]` with a kernel `[rows, columns, ., filters]`."""
    return sum(
        patch[..., None, :] @ kernel[i, j] for i, j, patch in _patches(x, kernel, stride, padding)
    )[..., 0, :] + bias  # fmt: skip


def depthwise_conv_2d(x, kernel, bias):
    """Convolve every channel with a kernel `[rows, columns, channels, multiplier]` of its own."""
    products = sum(patch[..., None] * kernel[i, j] for i, j, patch in _patches(x, kernel))
    return products.reshape(*products.shape[:-2], -1) + bias


def _patches(x, kernel, stride=1, padding=(0, 0)):
    x = np.pad(x, [(0, 0), padding, padding, (0, 0)])
    rows, columns = kernel.shape[:2]
    height, width = (x.shape[1] - rows) // stride + 1, (x.shape[2] - columns) // stride + 1
    for i, j in np.ndindex(rows, columns):
        yield i, j, x[:, i : i + height * stride : stride, j : j + width * stride : stride]


def max_pool_2d(x):
    windows = _windows_of_two(x)
    largest = windows.real.argmax(-1)[..., None]
    return np.take_along_axis(windows, largest, axis=-1)[..., 0]


def average_pool_2d(x):
    return _windows_of_two(x).mean(-1)


def _windows_of_two(x):
    return np.stack([x[:, i::2, j::2] for i, j in np.ndindex(2, 2)], axis=-1)


def normalize(x, mean, variance, gamma, beta, epsilon=1e-3):
    return (x - mean) / np.sqrt(variance + epsilon) * gamma + beta


def normalize_by_own_moments(x, axes, gamma, beta):
    mean = x.mean(axes, keepdims=True)
    return normalize(x, mean, ((x - mean) ** 2).mean(axes, keepdims=True), gamma, beta)


def group_norm(x, groups, gamma, beta):
    """Normalise `[n, height, width, channels]` over all but the examples and groups of channels."""
    grouped = x.reshape(*x.shape[:-1], groups, -1)
    gamma, beta = gamma.reshape(groups, -1), beta.reshape(groups, -1)
    return normalize_by_own_moments(grouped, (1, 2, 4), gamma, beta).reshape(x.shape)


def lstm(x, kernel, recurrent_kernel, bias):
    """Return the last output of a sequence `[n, steps, features]`."""
    hidden = cell = np.zeros((len(x), len(recurrent_kernel)))
    for step in range(x.shape[1]):
        gates = x[:, step] @ kernel + hidden @ recurrent_kernel + bias
        take, forget, candidate, give = np.split(gates, 4, axis=-1)
        cell = _sigmoid(forget) * cell + _sigmoid(take) * np.tanh(candidate)
        hidden = _sigmoid(give) * np.tanh(cell)
    return hidden


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))


def self_attention(x, q, q_bias, k, k_bias, v, v_bias, out, out_bias):
    """Attend with kernels `[features, heads, width]`, the last one `[heads, width, features]`."""
    query, key, value = (
        np.einsum("btd,dnh->btnh", x, kernel) + bias
        for kernel, bias in [(q, q_bias), (k, k_bias), (v, v_bias)]
    )
    scores = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(q.shape[-1])
    mixed = np.einsum("bnts,bsnh->btnh", softmax(scores), value)
    return np.einsum("btnh,nhd->btd", mixed, out) + out_bias
