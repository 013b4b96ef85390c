"""The largest eigenvalues of the Hessian over training."""

from typing import Any

import numpy as np

from keras_infomcr import validation
from keras_infomcr.callbacks.measuring_callback import MeasuringCallback, check_one_tuple
from keras_infomcr.flatness.estimate import Estimate
from keras_infomcr.flatness.hessian.operator import Hessian
from keras_infomcr.flatness.hessian.results import TopEigenvalues
from keras_infomcr.flatness.running.checks import MisfitWarning, check_sampling
from keras_infomcr.models.stability import stability_threshold


class SharpnessCallback(MeasuringCallback):
    """Log the largest eigenvalues of the Hessian, and how large training lets them become.

    At each measurement it adds to the logs

    * `hessian_eigenvalue_1`, `hessian_eigenvalue_2` and so on, the eigenvalues of largest size of
      the Hessian of the loss over the same examples each time;
    * `stability_threshold`, the eigenvalue above which the optimizer diverges along the
      eigenvector, at its present learning rate: 2/lr for gradient descent, 2 (1 + momentum)/lr
      with momentum, (2 + 2 momentum)/((1 + 2 momentum) lr) with Nesterov's, and less under the
      plain form of `SharpnessAware`. It is NaN for other optimizers (for Adam the Hessian would
      have to be preconditioned) and other regularisers;
    * with `num_probes`, `hessian_trace` and `hessian_trace_stderr`.

    `keras_infomcr.flatness.plot.sharpness` draws the logs of `fit`, or the `record`. Full-batch
    gradient descent typically sharpens until the first eigenvalue reaches the threshold, and then
    hovers about it, at the edge of stability. With batches it stays below.

    Each search starts near the eigenvectors found last. On a perceptron that took 3 products with
    the Hessian in place of 12 for one eigenvalue, and 8 in place of 13 for two. An eigenvalue that
    overtakes all those that are sought may go unnoticed for a while, hence two are sought by
    default: there a search for one missed the largest in a quarter of the measurements, and a
    search for two in none (`benchmarks/sharpness.py`). The traces of the layers take products of
    their own, because those of the search are not with independent random vectors; but the
    eigenvectors found lower their standard errors.

    Put it before the callbacks that read the logs. It works with any `keras.Model`, and leaves the
    model, its optimizer and all seeds as they are.

    Args:
        data: As for `FlatnessCallback`.
        num_eigenvalues: Integer, at least 1. Defaults to 2.
        frequency: Integer, at least 1. Measure every so many epochs or steps, and after the last.
            Defaults to 1.
        unit: `"epoch"` or `"step"`, the unit of `frequency`. Measurements by steps take place
            before the first step and every so many steps after it; an epoch's logs hold the last
            one within it, and the `record` all. Defaults to `"epoch"`.
        num_examples: Integer, at least 1, or `None` for all of the data. The examples measured,
            drawn once. Defaults to 1000.
        num_probes: Integer, 0 or at least 2. Further products, from which the traces of the layers
            are estimated. Defaults to 0, no traces.
        tolerance: As for `hessian_top_eigenvalues`. Defaults to 0.01.
        max_products: As for `hessian_top_eigenvalues`. Defaults to 200.
        chunk_size: As for `hessian_trace`. Defaults to 128.
        training: As for `hessian_trace`. Defaults to `False`.
        loss: As for `hessian_trace`. Defaults to the compiled loss.
        seed: Integer or `None`, of all draws. Defaults to 0, so that runs compare.
        verbose: 0 or 1. With 1, a line is printed for each measurement, and once, after the
            second of those by epochs, what part of an epoch's time it takes. Defaults to 0.

    Attributes:
        result: The last `TopEigenvalues`, with vectors; `None` before the first.
        trace_by_layer: The last `HessianTraceByLayer`, which `plot.by_layer` draws; `None` without
            `num_probes`.
        record: Dictionary of arrays with an entry for each measurement of the last `fit`: `step`,
            the steps taken before it, and whatever is logged. With `num_probes` also
            `hessian_trace_by_layer`, an array `[n, L]` in the order of `trace_by_layer.layers`.

    Raises:
        TypeError: When training begins, if the data are of a wrong type.
        ValueError: If an argument is out of its range; when training begins, or as soon as the
            model is built, what `hessian_top_eigenvalues` refuses.

    Example:

    ```python
    sharpness = SharpnessCallback((x, y), frequency=10, unit="step")
    model.fit(x, y, epochs=10, callbacks=[sharpness])
    flatness.plot.sharpness(sharpness.record).figure.savefig("sharpness.png")
    ```

    Reference: Cohen, Kaur, Li, Kolter and Talwalkar, "Gradient Descent on Neural Networks
    Typically Occurs at the Edge of Stability", ICLR 2021 (https://arxiv.org/abs/2103.00065).
    """

    def __init__(
        self,
        data: Any,
        num_eigenvalues: int = 2,
        frequency: int = 1,
        unit: str = "epoch",
        num_examples: int | None = 1000,
        num_probes: int = 0,
        tolerance: float = 0.01,
        max_products: int = 200,
        chunk_size: int = 128,
        training: bool = False,
        loss: Any = None,
        seed: int | None = 0,
        verbose: int = 0,
    ):
        check_one_tuple(data, num_eigenvalues)
        super().__init__(data, frequency, verbose)
        validation.integer(minimum=1, num_eigenvalues=num_eigenvalues)
        validation.one_of("epoch", "step", unit=unit)
        if num_probes != 0:
            validation.integer(minimum=2, num_probes=num_probes)
        validation.positive(tolerance=tolerance)
        validation.integer(minimum=num_eigenvalues, max_products=max_products)
        validation.boolean(training=training)
        check_sampling(num_examples, 1, chunk_size, seed, verbose)
        self.unit = unit
        self.num_probes = num_probes
        self.names = [f"hessian_eigenvalue_{k + 1}" for k in range(num_eigenvalues)]
        self.names += ["stability_threshold"]
        self.names += ["hessian_trace", "hessian_trace_stderr"] if num_probes else []
        self.result = self.trace_by_layer = None
        self._rows = []
        self._search = {
            "num_eigenvalues": num_eigenvalues,
            "tolerance": tolerance,
            "max_products": max_products,
        }
        self._sampling = {
            "num_examples": num_examples,
            "num_trials": 1,
            "chunk_size": chunk_size,
            "training": training,
            "loss": loss,
            "seed": seed,
        }

    @property
    def record(self) -> dict[str, np.ndarray]:
        """What was measured, as a dictionary of arrays."""
        keys = self._rows[0] if self._rows else ["step", *self.names]
        return {key: np.array([row[key] for row in self._rows]) for key in keys}

    def on_train_begin(self, logs=None):
        super().on_train_begin(logs)
        self._rows = []
        self._hessian = None
        self._known = None
        self._misfit_warning = MisfitWarning()
        self._steps_before = self._step = self._due = 0
        self._prepare()

    def on_epoch_begin(self, epoch, logs=None):
        super().on_epoch_begin(epoch, logs)
        self._steps_before = self._step
        self._logs = super().logs_without_measurement()

    def on_train_batch_begin(self, batch, logs=None):
        # Keras would wait for each step if `on_train_batch_end` were defined.
        self._step = self._steps_before + batch
        self._prepare()
        if self.unit == "step" and self._step >= self._due and self._hessian is not None:
            self._due = self._step + self.frequency
            self._measure(self._logs, f"Step {self._step}", after_epoch=False)

    def on_epoch_end(self, epoch, logs=None):
        taken = self._step - self._steps_before + self.model.steps_per_execution
        self._step = self._steps_before + min(taken, self.params.get("steps") or taken)
        super().on_epoch_end(epoch, logs)

    def on_train_end(self, logs=None):
        super().on_train_end(logs)
        self._hessian = self._known = None

    def is_due(self, epoch: int) -> bool:
        """Return whether to measure at the end of an epoch."""
        return self.unit == "epoch" and super().is_due(epoch)

    def logs_without_measurement(self) -> dict[str, float]:
        """Return the last measurement within the epoch, NaN if there was none."""
        return self._logs

    def _prepare(self):
        """Draw the examples as soon as the model has weights: some models wait for a batch."""
        # In this order: on JAX Keras reattaches the state of `fit` wherever `self.model` is used.
        if self._hessian is None and self.model.built:
            self._hessian = Hessian(self.model, *self.examples(), **self._sampling)

    def measure(self) -> dict[str, float]:
        """Return the eigenvalues, the threshold and, with probes, the trace, as logs."""
        threshold = stability_threshold(self.model, self._gradient_norm)
        with self._misfit_warning.remembering():
            self.result = self._eigenvalues()
            row = dict(zip(self.names, [*map(float, self.result.eigenvalues), threshold]))
            traces = self._traces() if self.num_probes else {}
        logs = {**row, **{name: traces[name] for name in self.names if name in traces}}
        self._rows.append({"step": self._step, **logs, **traces})
        return logs

    def _eigenvalues(self) -> TopEigenvalues:
        starts = self._known and self._known.vectors
        if starts is not None and starts.shape[1] != self._hessian.size:
            starts = None  # a layer has been frozen since, or set free
        result = self._hessian.top_eigenvalues(vectors=True, starts=starts, **self._search)
        self._known = result if np.isfinite(result.vectors).all() else None
        return result

    def _traces(self) -> dict[str, Any]:
        traces = self.trace_by_layer = self._hessian.trace_by_layer(
            num_products=self.num_probes, method="hutchinson", known=self._known
        )
        total = Estimate.of(traces.samples.sum(axis=1))
        return {
            "hessian_trace": total.value,
            "hessian_trace_stderr": total.stderr,
            "hessian_trace_by_layer": traces.values,
        }

    def _gradient_norm(self) -> float:
        # The squares of a tiny gradient would vanish in float32.
        return float(np.linalg.norm(self._hessian.gradient().astype("float64")))
