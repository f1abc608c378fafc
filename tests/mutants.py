"""Plants mistakes in a copy of the library, one at a time, and runs the tests that have to see each.

python tests/mutants.py    # some ten minutes on two cores; exits with 1 where a mistake goes unseen
"""

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

ROOT = Path(__file__).parent.parent


class Mutant(NamedTuple):
    mistake: str
    module: str
    right: str  # stands once in the module
    wrong: str
    tests: str  # arguments of pytest


MUTANTS = [
    Mutant(
        "softmax − 1 as a difference",
        "_rule",
        "e * (-sum_less_1 / (1 + sum_less_1)) + (e - 1)",
        "e / (1 + sum_less_1) - 1",
        "tests/test_numerics.py",
    ),
    Mutant(
        "the gradient by U is dropped", "_rule", " + cotangents.vector_mass", "", "tests/test_derivatives.py -k options"
    ),
    Mutant(
        "spread without its target",
        "_rule",
        "d_logits += slopes.of_spread(row.class_vector, e)",
        "d_logits += cotangents.spread * slopes.numbers.vector_mass * slopes.softmax(e)",
        "tests/test_derivatives.py -k options",
    ),
    Mutant(
        "log_z with the derivative of the sum",
        "_rule",
        "return self.by.sum_less_1 * (1 + self.numbers.sum_less_1)",
        "return self.by.sum_less_1",
        "tests/test_derivatives.py -k options",
    ),
    Mutant(
        "spread is not taken back at the label",
        "_rule",
        "slopes.of_spread(u, e) + slopes.by.spread * u",
        "slopes.of_spread(u, e)",
        "tests/test_derivatives.py -k options",
    ),
    Mutant(
        "several maxima are one",
        "_rule",
        "(total - 1.5 < below) & (below < total - 0.5)",
        "total > 0.5",
        "tests/test_merge.py",
    ),
    Mutant(
        "0 · inf is NaN",
        "_rule",
        "jnp.abs(mass) * large * large",
        "large * large",
        "tests/test_edges.py -k infinity",
    ),
    Mutant(
        "a sum that copies its factors",
        "_rule",
        "sum_alone(mass * distance + zero)",
        "sum_alone(mass * distance)",
        "tests/test_memory.py -k real_run",
    ),
    Mutant(
        "sums over classes and rows in one loop",
        "_xla",
        "return _selected(jnp.sum(_selected(values) if writes_out.value else values))",
        "return jnp.sum(values)",
        "tests/test_memory.py -k real_run",
    ),
    Mutant(
        "an absolute error with a slope at 0",
        "_elementwise",
        "errors * jnp.sign(errors)",
        "jnp.abs(errors)",
        "tests/test_fuzz.py",
    ),
    Mutant(
        "temperature times infinite logits",
        "_head",
        "_finite(softened) * d_temperature",
        "softened * d_temperature",
        "tests/test_fuzz.py",
    ),
    Mutant(
        "residuals of rounded losses",
        "_rule",
        "nll = jnp.maximum(nll, 0)",
        "nll = jnp.maximum(nll, 1e-7)",
        "tests/test_numerics.py -k ahead",
    ),
    Mutant(
        "an entropy of what a label that is behind leaves",
        "_rule",
        "jnp.where(here & (lead < 0.5), sum_less_1, others)",
        "sum_less_1",
        "tests/test_summary.py -k confident",
    ),
    Mutant(
        "an entropy without its mean in the gradient",
        "_rule",
        "(jnp.minimum(depth, _DEEP) - self.numbers.mean_depth) - self.by.mean_depth",
        "jnp.minimum(depth, _DEEP) - self.by.mean_depth",
        "tests/test_summary.py -k confident",
    ),
    Mutant(
        "a mean depth without a derivative",
        "_rule",
        "of_both * (jnp.minimum(depth, _DEEP) - self.numbers.mean_depth) - self.by.mean_depth",
        "self.by.entropy * (jnp.minimum(depth, _DEEP) - self.numbers.mean_depth)",
        "tests/test_derivatives.py -k entropy",
    ),
    Mutant(
        "an entropy that is infinity times 0",
        "_rule",
        "jnp.minimum(row.maximum - row.logits.astype(dtype), _DEEP)",
        "row.maximum - row.logits.astype(dtype)",
        "tests/test_summary.py -k hostile",
    ),
    Mutant(
        "the entropy's gradient at the label is dropped",
        "_rule",
        "        d_on_label += slopes.of_entropy(lead, e)\n",
        "        pass\n",
        "tests/test_derivatives.py -k entropy",
    ),
    Mutant(
        "an entropy below 0",
        "_rule",
        "jnp.maximum(mean_depth + log_sum, 0)",
        "mean_depth + log_sum",
        "tests/test_summary.py -k negative",
    ),
    Mutant(
        "blocks that are as deep as they were",
        "_slice",
        "self.depth + times(self.sum_less_1 + 1, gap)",
        "self.depth",
        "tests/test_merge.py",
    ),
    Mutant(
        "the largest of ties in the last block",
        "_slice",
        "(is_tied & (left.argmax < right.argmax))",
        "(is_tied & (left.argmax > right.argmax))",
        "tests/test_summary.py -k hostile",
    ),
    Mutant(
        "NaN is not the largest of devices",
        "_slice",
        "jnp.where(jnp.isnan(part.maximum), part.argmax + first, candidate)",
        "candidate",
        "tests/test_mesh.py -k hostile",
    ),
    Mutant(
        "the largest class by its number in the block",
        "_head",
        "(_row(tile, logits, maximum)).numbered_from(start)",
        "(_row(tile, logits, maximum))",
        "tests/test_summary.py -k confident",
    ),
    Mutant(
        "a temperature of one row for all",
        "_head",
        "temperature[:, None] if temperature.ndim else temperature",
        "temperature[0] if temperature.ndim else temperature",
        "tests/test_linear.py -k half",
    ),
    Mutant(
        "temperatures of blocks of rows are added",
        "_rows",
        'shared = {"kernel", "bias", "softcap"}',
        'shared = {"kernel", "bias", "softcap", "temperature"}',
        "tests/test_linear.py -k half",
    ),
    Mutant(
        "the temperature of a row that does not count",
        "_rows",
        "temperature if counts is None else jnp.where(counts, temperature, 1)",
        "temperature",
        "tests/test_linear.py -k hold_anything",
    ),
    Mutant(
        "temperatures that are whole on every device",
        "_inputs",
        "whole if row_temperatures(logits) is None else rows",
        "whole",
        "tests/test_mesh.py -k 'types and linear'",
    ),
    Mutant(
        "a class that is listed twice has two gradients",
        "_rows",
        "jnp.where(is_again, -1, classes)",
        "classes",
        "tests/test_derivatives.py -k listed",
    ),
    Mutant(
        "padding of listed classes with a derivative",
        "_rows",
        "    masses = jnp.where(is_padding, 0, masses)  # of which there is no derivative\n",
        "",
        "tests/test_derivatives.py -k listed",
    ),
    Mutant(
        "a wrong class that is listed is padding",
        "_rows",
        "jnp.all(is_right, axis=-1)",
        "None",
        "tests/test_sparse.py -k loud",
    ),
    Mutant(
        "the rest of the masses as a difference",
        "_rule",
        "slopes.less_target(_sum_of_others(masses), masses, jnp.exp(-lead))",
        "slopes.less_target(jnp.sum(masses) - masses, masses, jnp.exp(-lead))",
        "tests/test_sparse.py -k exact",
    ),
    Mutant(
        "the listed class that is farthest is left out",
        "_rule",
        "jnp.argmin(jnp.where(here, leads, jnp.inf))",
        "jnp.argmax(jnp.where(here, leads, -jnp.inf))",
        "tests/test_sparse.py -k exact",
    ),
    Mutant(
        "masses have the gradient of every block",
        "_rule",
        "jnp.where(here, slopes.by.nll * slopes.by_mass(masses, lead, is_left_out), 0)",
        "slopes.by.nll * slopes.by_mass(masses, lead, is_left_out)",
        "tests/test_linear.py -k listed",
    ),
    Mutant(
        "what rows have is the gradient of the last block",
        "_blocks",
        "along.add(*pair, start, 0)",
        "pair[1].astype(pair[0].dtype) if along is Along.ROWS else along.add(*pair, start, 0)",
        "tests/test_linear.py -k listed",
    ),
    Mutant(
        "listed classes without their class weights",
        "_summary",
        "masses.astype(weights.dtype) * weights",
        "masses.astype(weights.dtype)",
        "tests/test_derivatives.py -k listed",
    ),
    Mutant(
        "narrow gradients by their bits alone",
        "_xla",
        "jax.jvp(function, primals, tangents)[1]",
        "tangents[0]",
        "tests/test_sparse.py -k half_precision",
    ),
    Mutant("blocks of ties are lost", "_slice", "top + rest * jnp.exp(-gap)", "top", "tests/test_merge.py"),
    Mutant("ties of devices are lost", "_slice", "others + (tops - 1)", "others", "tests/test_merge.py"),
    Mutant(
        "the 1 of other devices is lost",
        "_slice",
        "(part.sum_less_1 + 1) * jnp.exp(-gap)",
        "part.sum_less_1 * jnp.exp(-gap)",
        "tests/test_merge.py",
    ),
    Mutant(
        "moments of devices are not shifted",
        "_slice",
        "moments = part.target.shifted(gap),",
        "moments = part.target,",
        "tests/test_merge.py",
    ),
    Mutant(
        "every device begins at class 0",
        "_mesh",
        "return lax.axis_index(self.axes) * size if self.axes else 0",
        "return 0",
        "tests/test_mesh.py",
    ),
    Mutant(
        "padding counts as classes",
        "_mesh",
        "return None if self.number == self.slices * size else",
        "return None if True else",
        "tests/test_mesh.py",
    ),
    Mutant(
        "rows are not cast before the rule",
        "_mesh",
        "return vary(inputs, varying(inputs) | {*inputs.classes.axes})",
        "return inputs",
        "tests/test_mesh.py",
    ),
    Mutant(
        "one axis for rows and classes",
        "_split",
        "if len(names) < len(listed):",
        "if False:",
        "tests/test_errors.py",
    ),
    Mutant(
        "untyped shard_map",
        "_split",
        "if name not in varying(lax.axis_index(name)):",
        "if False:",
        "tests/test_errors.py",
    ),
    Mutant(
        "ignored labels by order",
        "_checks",
        "kept = labels != np.asarray(",
        "kept = labels > np.asarray(",
        "tests/test_edges.py",
    ),
    Mutant(
        "label −1 is a class",
        "_checks",
        "return labels, mask, (labels >= 0) &",
        "return labels, mask, (labels >= -1) &",
        "tests/test_edges.py",
    ),
    Mutant(
        "label C is a class",
        "_checks",
        "(labels < inputs.classes.number)",
        "(labels <= inputs.classes.number)",
        "tests/test_edges.py",
    ),
    Mutant(
        "a mask that multiplies",
        "_conventions",
        "return jnp.where(counts, values, jnp.zeros_like(values))",
        "return values * counts.astype(values.dtype)",
        "tests/test_edges.py",
    ),
    Mutant(
        "a NaN that forward mode drops",
        "_conventions",
        "return values * jnp.where(valid, jnp.ones((), values.dtype), jnp.full((), jnp.nan, values.dtype))",
        "return jnp.where(valid, values, jnp.nan)",
        "tests/test_edges.py",
    ),
    Mutant(
        "class axis swapped, not moved",
        "_rows",
        "logits = jnp.moveaxis(_widened(jnp.asarray(logits)), inputs.axis, -1)",
        "logits = jnp.swapaxes(_widened(jnp.asarray(logits)), inputs.axis, -1)",
        "tests/test_edges.py tests/test_torch.py",
    ),
    Mutant(
        "smoothing without its 1 − ε",
        "_losses",
        "losses = (1 - epsilon) * losses +",
        "losses = losses +",
        "tests/test_derivatives.py -k options",
    ),
    Mutant(
        "smoothing over C − 1 classes",
        "_losses",
        "epsilon / num_classes *",
        "epsilon / (num_classes - 1) *",
        "tests/test_derivatives.py -k options",
    ),
    Mutant(
        "smoothing over the classes of a device",
        "_losses",
        "num_classes = rows.classes.number",
        "num_classes = rows.logits.shape[-1]",
        "tests/test_mesh.py",
    ),
    Mutant(
        "z-loss without its square",
        "_losses",
        "jnp.square(summary.log_z)",
        "summary.log_z",
        "tests/test_derivatives.py -k options",
    ),
    Mutant(
        "focal loss with another γ",
        "_losses",
        "jnp.power(miss, gamma) * large",
        "jnp.power(miss, gamma + 1) * large",
        "tests/test_derivatives.py -k focal",
    ),
    Mutant(
        "class weights do not divide",
        "_reduction",
        "shares = weights * shares",
        "shares = weights",
        "tests/test_reduction.py",
    ),
    Mutant(
        "the mean of nothing is NaN",
        "_reduction",
        "empty = (self.weight == 0) & (self.total == 0)",
        "empty = jnp.zeros((), bool)",
        "tests/test_edges.py",
    ),
    Mutant(
        "sums in half precision",
        "_reduction",
        "    dtype = accumulator(losses, weights)\n",
        "    dtype = losses.dtype\n",
        "tests/test_numerics.py tests/test_edges.py tests/test_reduction.py",
    ),
    Mutant(
        "soft cap without its slope",
        "_head",
        "return capped, slope * d_logits",
        "return capped, d_logits",
        "tests/test_linear.py -k both_ways",
    ),
    Mutant(
        "the ragged last block is dropped", "_blocks", "    if rest != 0:\n", "    if False:\n", "tests/test_linear.py"
    ),
    Mutant(
        "masked hidden in the kernel's gradient",
        "_head",
        "Product(silence(counts, hidden), d_products)",
        "Product(hidden, d_products)",
        "tests/test_linear.py -k hold_anything",
    ),
    Mutant(
        "blocks of rows overwrite each other",
        "_forward_gradient",
        "return total + term\n",
        "return term\n",
        "tests/test_linear.py -k both_ways",
    ),
    Mutant(
        "gradients of devices are not added",
        "_forward_gradient",
        "over_axes(term, tuple(varying(term) - varying(value)))",
        "term",
        "tests/test_mesh.py",
    ),
    Mutant(
        "the maxima of one device",
        "_divergence",
        "(part, lax.pmax(part.maxima, classes.axes), temperature)",
        "(part, part.maxima, temperature)",
        "tests/test_mesh.py -k distillation",
    ),
    Mutant(
        "a divergence that is what large terms leave",
        "_divergence",
        "jnp.where(near, q * phi, p - q - far)",
        "p - q - q * jnp.where(q == 0, 0, r)",
        "tests/test_numerics.py -k distillation",
    ),
    Mutant(
        "a gradient that is what two probabilities leave",
        "_divergence",
        "jnp.where(near, q * (small + phi), p - q)",
        "p - q",
        "tests/test_numerics.py -k distillation",
    ),
    Mutant(
        "the ratio of two masses by their logs alone",
        "_divergence",
        "jnp.abs(ratio_less_1) < 0.5",
        "jnp.abs(ratio_less_1) < 0",
        "tests/test_numerics.py -k distillation",
    ),
    Mutant(
        "the lead of a class as its distances from two maxima leave it",
        "_divergence",
        "jnp.where(jnp.isfinite(lead), lead, (z - m) - (t - n))",
        "(z - m) - (t - n)",
        "tests/test_numerics.py -k distillation",
    ),
    Mutant(
        "an offset between student and teacher that is rounded",
        "_divergence",
        "(near - offset) + lax.stop_gradient(rest - offset_rest)",
        "near - offset",
        "tests/test_numerics.py -k distillation",
    ),
    Mutant(
        "the divergence inside a block is dropped",
        "_divergence",
        "between + q * jnp.where((q == 0) | jnp.isneginf(part.log_ratio), 0, part.divergence)",
        "between",
        "tests/test_numerics.py -k distillation",
    ),
    Mutant(
        "the temperature's derivative as what large terms leave",
        "_divergence",
        "d_u * jnp.where(is_finite, softened.lead, u - v) + of_both * v",
        "d_u * u + d_v * v",
        "tests/test_numerics.py -k distillation",
    ),
    Mutant(
        "temperature without its square",
        "_distillation",
        "jnp.square(jnp.asarray(temperature, rows.dtype))",
        "jnp.asarray(temperature, rows.dtype)",
        "--thorough tests/test_derivatives.py -k distillation",
    ),
    Mutant(
        "hinge without its power",
        "_scores",
        "jnp.where(is_other, shortfall**p, 0)",
        "jnp.where(is_other, shortfall, 0)",
        "tests/test_derivatives.py -k margin",
    ),
    Mutant(
        "binary smoothing over one class",
        "_elementwise",
        "t = t * (1 - epsilon) + epsilon / 2",
        "t = t * (1 - epsilon) + epsilon",
        "tests/test_derivatives.py -k binary",
    ),
    Mutant(
        "a wrong label counts for no class",
        "imbalance",
        "jnp.where(jnp.any(wrong), jnp.nan, counts)",
        "counts",
        "tests/test_imbalance.py -k loud",
    ),
    Mutant(
        "masked labels count",
        "imbalance",
        "in_range & where, ~in_range & where",
        "in_range, ~in_range & where",
        "tests/test_imbalance.py -k masked",
    ),
    Mutant(
        "labels are counted in float32",
        "imbalance",
        "jnp.zeros(num_classes + 1, jnp.int32).at[chosen].add(1)[:-1].astype(jnp.float32)",
        "jnp.zeros(num_classes + 1).at[chosen].add(1)[:-1]",
        "tests/test_imbalance.py -k one_by_one",
    ),
    Mutant(
        "a device counts its own labels alone",
        "imbalance",
        "return over_axes(jnp.where(jnp.any(wrong), jnp.nan, counts), enter(split).row_axes)",
        "return jnp.where(jnp.any(wrong), jnp.nan, counts)",
        "tests/test_imbalance.py -k explicit",
    ),
    Mutant(
        "a class that was never counted is one of C",
        "imbalance",
        "return jnp.where(counted, n, rarest), counted | ~is_any",
        "return jnp.where(counted, n, rarest), counted | True",
        "tests/test_imbalance.py -k never_counted",
    ),
    Mutant(
        "effective numbers that sum to 1",
        "imbalance",
        "return inverse / _mean(inverse, counted)",
        "return inverse / jnp.sum(inverse)",
        "tests/test_imbalance.py -k formula",
    ),
    Mutant(
        "costs of the predicted class",
        "imbalance",
        "costs = costs[rows.targets]",
        "costs = costs.T[rows.targets]",
        "tests/test_imbalance.py -k prices",
    ),
    Mutant(
        "costs that are not measured from that of the largest logit",
        "imbalance",
        "jnp.sum((costs - top_cost) * p, axis=-1)",
        "jnp.sum(costs * p, axis=-1) - top_cost[..., 0] / classes.slices",
        "tests/test_imbalance.py -k digits",
    ),
    Mutant(
        "the largest cost of the first device",
        "imbalance",
        "top_cost = classes.largest(jnp.max(jnp.where(is_top, costs, -jnp.inf), axis=-1, keepdims=True))",
        "top_cost = lax.stop_gradient(jnp.max(jnp.where(is_top, costs, -jnp.inf), axis=-1, keepdims=True))",
        "tests/test_mesh.py -k cost",
    ),
    Mutant(
        "counts of 64 bits wrap",
        "_arguments",
        "return array.astype(np.float32) if is_wide else array",
        "return array",
        "tests/test_edges.py -k beyond_32_bits",
    ),
    Mutant(
        "labels of 64 bits wrap",
        "_inputs",
        "    targets, ignore_index = _narrowed(targets, ignore_index)\n",
        "",
        "tests/test_edges.py -k 32_bits",
    ),
    Mutant(
        "labels of a device with 64 bits wrap",
        "_checks",
        "if not _is_cut(labels):\n        return labels\n",
        "if True:\n        return labels\n",
        "tests/test_edges.py -k x64_is_off",
    ),
    Mutant(
        "a sentinel that no label can be",
        "_inputs",
        "if not holds(targets, ignore_index):",
        "if False:",
        "tests/test_errors.py",
    ),
    Mutant(
        "a dtype without infinity is padded with it",
        "_rows",
        "if is_narrow else array",
        "if False else array",
        "tests/test_edges.py -k infinity_or",
    ),
    Mutant(
        "a tanh that underflows",
        "_head",
        "return jnp.where(is_small, logits, softcap * jnp.tanh(ratio))",
        "return softcap * jnp.tanh(ratio)",
        "tests/test_edges.py -k changes_nothing",
    ),
    Mutant(
        "a softcap's derivative without digits",
        "_head",
        "series, t - ratio * slope)",
        "t - ratio * slope, t - ratio * slope)",
        "tests/test_edges.py -k large_softcap",
    ),
    Mutant(
        "infinite settings",
        "_arguments",
        "number < high if open_high or high == np.inf else number <= high",
        "number < high if open_high else number <= high",
        "tests/test_errors.py -k infinite",
    ),
    Mutant("checks unasked", "_checks", "return _are_checked.value and", "return", "tests/test_checks.py -k asked_for"),
    Mutant(
        "only logits say how rows are split",
        "_split",
        "if not names and not any(any(split) for _, split in types):",
        "if not any(types[0][1]):",
        "tests/test_mesh.py -k any_way",
    ),
    Mutant(
        "elements that are split apart",
        "_split",
        "    return jax.tree.map(follow, tree)\n",
        "    return tree\n",
        "tests/test_mesh.py -k 'any_way and losses'",
    ),
    Mutant(
        "a branch on a symbolic number of classes",
        "_rule",
        "isinstance(num_classes, int) and num_classes",
        "num_classes",
        "tests/test_export.py",
    ),
    Mutant(
        "a mask of NumPy's is lost",
        "_arguments",
        "isinstance(value, np.ma.MaskedArray)",
        "False",
        "tests/test_errors.py",
    ),
    Mutant(
        "bools are integers",
        "_arguments",
        "        if isinstance(value, bool):\n            raise TypeError\n",
        "",
        "tests/test_errors.py",
    ),
    Mutant(
        "a teacher that is held is not silenced",
        "_divergence",
        "without_padding(silence(self.counts, block",
        "without_padding(silence(None, block",
        "tests/test_linear.py -k beside_held",
    ),
    Mutant(
        "the columns of the first device",
        "imbalance",
        "lax.dynamic_slice_in_dim(costs, start, size, axis=-1)",
        "lax.dynamic_slice_in_dim(costs, 0, size, axis=-1)",
        "tests/test_mesh.py -k cost",
    ),
    Mutant(
        "a formula meets the zeros of rows that do not count",
        "_custom",
        "jnp.where(counts, numbers, jnp.ones_like(numbers))",
        "numbers",
        "tests/test_custom.py -k not_read",
    ),
    Mutant(
        "what is beside a loss has a derivative",
        "_forward_gradient",
        "return losses, lax.stop_gradient(aux)",
        "return losses, aux",
        "tests/test_custom.py -k no_derivative",
    ),
    Mutant(
        "what a formula closes over is lost",
        "_custom",
        "return _custom(jax.tree_util.Partial(call, found), self.asked, self.has_aux) if found else self",
        "return self",
        "tests/test_custom.py -k plain_formula",
    ),
    Mutant(
        "arrays beside the logits belong to all blocks",
        "_rows",
        '{"counts", "valid", "weights", "extras"}',
        '{"counts", "valid", "weights"}',
        "tests/test_custom.py -k plain_formula",
    ),
    Mutant(
        "what is beside a loss is that of the last block",
        "_forward_gradient",
        "return jax.tree.map(jnp.add, total, part), [",
        "return (total[0] + part[0], part[1]), [",
        "tests/test_custom.py -k plain_formula",
    ),
    Mutant(
        "a formula sees all rows",
        "_custom",
        "over_rows(self._of_row, summary.nll.ndim, (0, 0))(*arguments)",
        "self._of_row(*arguments)",
        "tests/test_custom.py -k errors",
    ),
    Mutant(
        "of a formula with a closure over a mesh",
        "_custom",
        "if inputs.split.is_whole and (",
        "if False and (",
        "tests/test_custom.py -k over_a_mesh",
    ),
    Mutant(
        "the products of the last block of rows alone",
        "_head",
        "return total + Product(left, right)().astype(total.dtype)",
        "return Product(left, right)().astype(total.dtype)",
        "tests/test_linear.py -k both_ways",
    ),
    Mutant(
        "the rows that count are not put back",
        "_head",
        "return order.restored(gradient._replace(head=rounded(gradient.head, rows.head)), along)",
        "return gradient._replace(head=rounded(gradient.head, rows.head))",
        "tests/test_tiles.py",
    ),
    Mutant(
        "the loop ends before the last rows that count",
        "_blocks",
        "(needed + size - 1) // size",
        "needed // size",
        "tests/test_tiles.py",
    ),
    Mutant(
        "tiles in which some rows count are left out",
        "_blocks",
        "number))\n        return lax.cond(is_any, lambda: make",
        "number))\n        return lax.cond(jnp.all(cut(jnp.asarray(counts), first, number)), lambda: make",
        "tests/test_tiles.py",
    ),
    Mutant(
        "0 · NaN where rows do not count, in second derivatives",
        "_rule",
        "return _of_softmax(silence(counts, logits), silence(counts, maximum), *rest)",
        "return silence(counts, _of_softmax(logits, maximum, *rest))",
        "tests/test_chunks.py -k mask",
    ),
    Mutant(
        "rows that do not count in the gradient",
        "_rule",
        "return silence(counts, _of_softmax(logits, maximum, label, factor, sum_less_1))",
        "return _of_softmax(logits, maximum, label, factor, sum_less_1)",
        "tests/test_chunks.py -k mask",
    ),
    Mutant(
        "a chunk of rows at the place of the first",
        "_blocks",
        "partial(put, start=start, axis=0), results, function(chunk)",
        "partial(put, start=0, axis=0), results, function(chunk)",
        "tests/test_chunks.py -k elements",
    ),
    Mutant(
        "each device keeps its own gradient of the features",
        "_head",
        "kernel = lax.psum_scatter(gradient.kernel, gradient.feature_axis_name, scatter_dimension=0, tiled=True)",
        "kernel = lax.dynamic_slice_in_dim("
        "gradient.kernel, lax.axis_index(gradient.feature_axis_name) * (gradient.kernel.shape[0] // 8),"
        " gradient.kernel.shape[0] // 8)",
        "tests/test_features.py",
    ),
    Mutant(
        "the focal binary loss without its target's slope",
        "_elementwise",
        "tau, rest = jnp.where(leans_to_yes, t, 1 - t), jnp.where(leans_to_yes, 1 - t, t)",
        "tau, rest = jax.lax.stop_gradient((jnp.where(leans_to_yes, t, 1 - t), jnp.where(leans_to_yes, 1 - t, t)))",
        "tests/test_derivatives.py -k binary",
    ),
]


def is_caught(mutant: Mutant) -> bool:
    """Whether a test fails in a copy of its own that has the mistake: one of every day, or else one of the others."""
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "build", "dist", "__pycache__"))
        path = copy / "jaxce" / f"{mutant.module}.py"
        source = path.read_text()
        assert source.count(mutant.right) == 1, f"{mutant.mistake}: {mutant.right!r} must stand once in {path.name}"
        path.write_text(source.replace(mutant.right, mutant.wrong))
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *shlex.split(mutant.tests)]
        environment = os.environ | {"PYTHONPATH": str(copy)}
        for which in ([], ["--thorough"]):
            result = subprocess.run([*command, *which], cwd=copy, env=environment, capture_output=True, text=True)
            assert result.returncode in (0, 1, 5), result.stdout + result.stderr  # 1: a test failed, 5: there is none
            if result.returncode == 1:
                return True
    return False


def main() -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        caught = list(tqdm(pool.map(is_caught, MUTANTS), total=len(MUTANTS), unit=" mistakes"))
    print(f"{len(MUTANTS)} planted, {sum(caught)} caught")
    for mutant, is_seen in zip(MUTANTS, caught, strict=True):
        if not is_seen:
            print(f"not caught: {mutant.mistake}")
    sys.exit(not all(caught))


if __name__ == "__main__":
    main()
