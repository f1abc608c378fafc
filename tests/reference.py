"""The losses and all their gradients in float64 NumPy, every number with the error that the contract allows it.

`oracle.py` has 50 digits for single rows; this has whole batches with every option, fast enough for fuzzing, and
imports no JAX. Rows are measured from their maximum, so that the float64 here is exact where float32 is tested:

    z   logits        m   max z        L   log Σ exp(z − m)        distance   log_z − z = (m − z) + L        p   softmax
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

RELATIVE, PER_NAT = 1e-6, 1.2e-7  # the contract's 1e-6 + 1.2e-7 · lead; what is added up has the sum of its terms'
FLUSHED = 1e-36  # of numbers that XLA:CPU may round to 0, times what they are multiplied with


@dataclass(frozen=True, eq=False)
class Near:
    """A number, and how far from it an answer may be.

    An infinite error of a finite number promises nothing, and one of −inf that some number so marked is NaN.
    """

    value: Any
    error: Any = 0.0
    __array_ufunc__ = None  # NumPy leaves the operators to this class

    def __add__(self, other):
        other = near(other)
        return Near(self.value + other.value, self.error + other.error)

    def __mul__(self, other):
        other = near(other)
        return Near(self.value * other.value, abs(self.value) * other.error + self.error * abs(other.value))

    def __matmul__(self, matrix):
        rounding = RELATIVE * (abs(self.value) @ abs(matrix))
        return Near(self.value @ matrix, self.error @ abs(matrix) + rounding)

    def __sub__(self, other):
        return self + near(other) * -1.0

    def __getitem__(self, index):
        return Near(self.value[index], np.broadcast_to(self.error, np.shape(self.value))[index])

    __radd__, __rmul__ = __add__, __mul__

    def sum(self, axis=None):
        return Near(self.value.sum(axis), np.broadcast_to(self.error, self.value.shape).sum(axis))


def near(number, relative=0.0):
    return number if isinstance(number, Near) else Near(np.asarray(number, float), relative * abs(np.asarray(number)))


def where(condition, number, otherwise=0.0, error=0.0):
    return Near(np.where(condition, number.value, otherwise), np.where(condition, number.error, error))


class Losses(NamedTuple):
    """Losses per row before their weights, (R,), with derivatives by what is a row's own and by what all rows share.

    `shares` are the rows' shares in the divisor of the mean, `share_of` their derivative by the class weights. `loud`
    says where gradients are NaN somewhere, because a label is wrong.
    """

    losses: Near
    by_own: dict[str, Near]
    by_shared: dict[str, Near]
    shares: Any = 1.0
    share_of: Any = None
    loud: Any = ()


def reduce(losses, weights, counts, reduction, cotangent):
    """The reduced loss, and the gradients of all arguments for a cotangent of it."""
    of_rows, by_own, by_shared, shares, share_of, loud = losses
    weights = np.where(counts, 1.0 if weights is None else weights, 0.0)
    of_rows, shares = where(counts, of_rows), np.where(counts, shares, 0.0)
    result, divisor = of_rows * weights, 1.0
    if reduction != "none":
        result = _total(result)
    if reduction == "mean":
        divisor = (weights * shares).sum()
        if divisor == 0 and result.value != 0:
            return result * np.nan, {}
        nothing = divisor == 0
        result, cotangent, divisor = result * (1 / (divisor + nothing)), cotangent * ~nothing, divisor + nothing
    factor = cotangent * weights / divisor
    gradients = {name: _each(factor, partial) for name, partial in by_own.items()}
    gradients |= {name: _total(_each(factor, partial)) for name, partial in by_shared.items()}
    gradients["weights"] = of_rows * (cotangent / divisor)
    if reduction == "mean":
        by_divisor = result * (cotangent / divisor)
        gradients["weights"] -= by_divisor * shares
        if share_of is not None:
            is_share = counts[:, None] & (share_of != 0)
            gradients["class_weights"] -= _total(where(is_share, by_divisor * (weights[:, None] * share_of)))
    gradients["weights"] = where(counts, gradients["weights"])
    for name, is_loud in dict(loud).items():
        gradients[name] = where(~is_loud, gradients[name], np.nan, -np.inf)
    return result, gradients


def _total(terms):
    """The sum over rows that are added one by one."""
    total, rounding = terms.sum(0), len(terms.value) * 2.0**-24
    return Near(total.value, total.error + rounding * abs(terms.value).sum(0))


def _each(factor, partial):
    factor = np.reshape(factor, (-1,) + (1,) * (np.ndim(partial.value) - 1))
    is_promised = ~(np.isfinite(partial.value) & np.isposinf(partial.error))
    return where(is_promised, partial * factor, error=np.inf)


class Summary(NamedTuple):
    """What the losses know of rows of logits."""

    z: Any
    log_z: Near
    distance: Near
    p: Near
    miss: Near  # 1 − p


def summarize(z):
    m = z.max(-1, keepdims=True)
    m = np.where(np.isfinite(m), m, np.nan)  # of +inf, of NaN, or of −inf alone
    d = m - z
    is_first = np.arange(z.shape[-1]) == np.argmax(z, -1)[:, None]
    others = np.where(is_first, 0.0, np.exp(-d)).sum(-1, keepdims=True)
    L = np.log1p(others)
    lead = np.where(others == 0, 0.0, np.where(is_first, np.inf, d).min(-1, keepdims=True))
    distance = Near(d + L, RELATIVE * (d + L) + PER_NAT * lead * L)
    p = np.exp(-d - L)
    p = Near(p, p * (RELATIVE + PER_NAT * np.where(p == 0, 0.0, d)))
    miss = np.where(is_first, others * np.exp(-L), 1 - p.value)
    miss = Near(miss, miss * (RELATIVE + PER_NAT * np.where(is_first, lead, 0.0)))
    log_z = np.where(np.isneginf(z).all(-1, keepdims=True), -np.inf, m + L)  # of nothing
    return Summary(z, Near(log_z, RELATIVE * (abs(m) + L))[:, 0], distance, p, miss)


def _times(mass, s):
    """mass · distance, and its derivative by the mass: both are 0 where there is no mass on a logit of −inf."""
    terms = where((mass != 0) | ~np.isposinf(s.distance.value), s.distance) * mass
    return terms, where((mass != 0) | ~np.isneginf(s.z), s.distance)


def _softmax_minus(target, s, *, is_label=False):
    """Σt · p − t, which is (Σt − t) p − t (1 − p)."""
    mass = target.sum(-1, keepdims=True)
    exact = s.p * (mass - target) - s.miss * target
    return exact if is_label else Near(exact.value, RELATIVE * abs(target) + s.p.error * mass)


class Formula(NamedTuple):
    """A loss as arithmetic on nll, spread, log_z and the label's class weight: its value and its derivatives."""

    value: Near
    by_nll: Near
    by_weight: Near
    by_log_z: Any = None
    by_spread: Any = None
    by_settings: Any = ()


def cross_entropy(nll, spread, log_z, w, num_classes, label_smoothing=None, z_loss=None):
    loss = Formula(nll * w, near(w), nll, by_settings={})
    if label_smoothing is not None:
        kept, spread = 1 - label_smoothing, spread * (1 / num_classes)
        by_smoothing = spread - nll * w
        loss = Formula(loss.value * kept + spread * label_smoothing, near(kept * w), nll * kept)
        by_spread = np.full(np.shape(nll.value), label_smoothing / num_classes)
        loss = loss._replace(by_spread=by_spread, by_settings={"label_smoothing": by_smoothing})
    if z_loss is not None:
        square = log_z * log_z
        loss = loss._replace(
            value=loss.value + square * (z_loss * w),
            by_weight=loss.by_weight + square * z_loss,
            by_log_z=log_z * (2 * z_loss * w),
            by_settings=loss.by_settings | {"z_loss": square * w},
        )
    return loss


def focal(nll, spread, log_z, w, num_classes, gamma):
    """(1 − p)^γ nll and its derivatives, with the relative error of the power: γ times that of log(1 − p)."""
    n = nll.value
    miss, is_far = -np.expm1(-n), np.isinf(n)
    log_miss = np.log(np.where(n > 0, miss, 1.0))
    loss = miss**gamma * n
    slope = miss**gamma + np.where(is_far | (n == 0), 0.0, gamma * miss ** (gamma - 1) * np.exp(-n) * n)
    relative = RELATIVE + (1 + gamma) * np.where((n == 0) | is_far, 0.0, nll.error / n) - PER_NAT * gamma * log_miss
    loss = Near(loss, loss * relative)
    by_gamma = where(~is_far, loss * Near(log_miss, relative) * w, error=np.inf)
    return Formula(loss * w, Near(slope, slope * relative) * w, loss, by_settings={"gamma": by_gamma})


def poly(nll, spread, log_z, w, num_classes, epsilon):
    p = np.exp(-nll.value)
    p = Near(p, np.where(p == 0, 0.0, p * nll.error))
    miss = Near(-np.expm1(-nll.value), p.error - RELATIVE * np.expm1(-nll.value))
    loss, slope = nll + miss * epsilon, Near(1.0, RELATIVE) + p * epsilon
    return Formula(loss * w, slope * w, loss, by_settings={"epsilon": miss * w})


def over_classes(formula, z, labels=None, distributions=None, class_weights=None, lost=0.0, **settings):
    """A loss that is arithmetic on nll, spread and log_z, of labels or of distributions.

    `lost` is the absolute error of L.
    """
    s, num_classes, is_label = summarize(z), z.shape[-1], labels is not None
    weights = np.ones(num_classes) if class_weights is None else class_weights
    one_hot, w = _one_hot(labels, num_classes, class_weights) if is_label else (None, np.ones(len(z)))
    target = one_hot if is_label else distributions * weights
    terms, distance = _times(target, s)
    if is_label:
        # Where the label is behind, L is a difference: it has an absolute error, which the label's distance hides.
        lost = np.where(z.max(-1) > _at_label(z, one_hot), 2e-7, 0.0)
    lost = np.broadcast_to(lost, len(z))
    s = s._replace(log_z=s.log_z + Near(0.0, lost), distance=s.distance + Near(0.0, lost[:, None]))
    spread_terms, spread_distance = _times(weights, s)
    loss = formula(terms.sum(-1), spread_terms.sum(-1), s.log_z, w, num_classes, **settings)
    by_nll = loss.by_nll[:, None]
    d_logits = _softmax_minus(target, s, is_label=is_label) * by_nll
    if is_label:
        by_own, by_class_weight = {}, where(one_hot != 0, loss.by_weight[:, None] * one_hot)
    else:
        by_own, by_class_weight = {"distributions": distance * by_nll * weights}, distance * by_nll * distributions
    if loss.by_spread is not None:
        d_logits += _softmax_minus(weights, s) * loss.by_spread[:, None]
        by_class_weight += spread_distance * loss.by_spread[:, None]
    if loss.by_log_z is not None:
        d_logits += s.p * loss.by_log_z[:, None]
    by_own, by_shared = by_own | {"logits": d_logits}, {"class_weights": by_class_weight, **loss.by_settings}
    return Losses(loss.value, by_own, by_shared, w, one_hot, _loud(one_hot) if is_label else ())


def listed(formula, z, classes, masses, class_weights=None, **settings):
    """The same of listed classes: of the distribution that they stand for, which has their numbers at their places."""
    num_classes = z.shape[-1]
    one_hot = (classes[..., None] == np.arange(num_classes)).astype(float)
    is_class = one_hot.any(-1)
    is_wrong = (~is_class & (masses != 0)).any(-1)
    distributions = np.where(is_wrong[:, None], np.nan, (one_hot * masses[..., None]).sum(1))
    nearest = np.where(is_class, np.take_along_axis(z, np.where(is_class, classes, 0), -1), -np.inf)
    # Where no listed class leads, L is a difference, as for a label that is behind.
    lost = np.where(z.max(-1) > nearest.max(-1, initial=-np.inf), 2e-7, 0.0)
    losses = over_classes(formula, z, None, distributions, class_weights, lost, **settings)
    by_own = dict(losses.by_own)
    of_classes, place = by_own.pop("distributions"), (np.arange(len(z))[:, None], np.where(is_class, classes, 0))
    of_masses = of_classes[place]
    of_masses = Near(np.where(is_wrong[:, None], np.nan, of_masses.value), of_masses.error)
    by_own["masses"] = where(is_class | (masses != 0), of_masses)  # of padding there is no derivative
    # A weight that no listed class has is not read, unless it is in the spread.
    by_weights = losses.by_shared["class_weights"]
    is_read = one_hot.any(1) | is_wrong[:, None] | ("label_smoothing" in settings)
    return losses._replace(by_own=by_own, by_shared=losses.by_shared | {"class_weights": where(is_read, by_weights)})


def entropy(z, labels):
    """Of the softmax; of the labels it knows nothing. Its slope is p (depth − mean depth), a difference."""
    s = summarize(z)
    terms, _ = _times(s.p.value, s)
    value = terms.sum(-1)
    value = Near(value.value, value.error + (s.p.error * np.where(s.p.value == 0, 0.0, s.distance.value)).sum(-1))
    depth = np.where(s.p.value == 0, 0.0, z.max(-1, keepdims=True) - z)
    relative = 2 * RELATIVE + PER_NAT * depth
    of_classes = s.p.value * depth
    mean_depth = Near(of_classes, of_classes * relative).sum(-1)  # as exact as what it consists of
    distance, error = depth - mean_depth.value[:, None], depth * relative + mean_depth.error[:, None]
    slope = Near(s.p.value * distance, s.p.value * (error + abs(distance) * relative))
    return Losses(value, {"logits": slope}, {})


def by_temperatures(d_logits, z, temperatures):
    """Of logits over temperatures, the gradients by the logits before and by the temperatures."""
    scaled = np.where(np.isinf(z), 0.0, z) / temperatures[:, None]
    terms = d_logits * -scaled
    total = terms.sum(-1)
    rounding = RELATIVE * abs(terms.value).sum(-1)
    return d_logits * (1 / temperatures[:, None]), Near(total.value, total.error + rounding)


def _one_hot(labels, num_classes, class_weights):
    """The labels as distributions, and their class weights: NaN where the label is wrong."""
    is_wrong = (labels < 0) | (labels >= num_classes)
    one_hot = np.where(is_wrong[:, None], np.nan, labels[:, None] == np.arange(num_classes))
    return one_hot, np.ones(len(labels)) if class_weights is None else one_hot @ class_weights


def _at_label(z, one_hot):
    return np.where(one_hot == 0, 0.0, one_hot * z).sum(-1)


def _loud(one_hot):
    return {"class_weights": np.full(one_hot.shape[-1], np.isnan(one_hot).any())}


def distillation(z, teacher_logits, temperature=1.0, divergence="forward", mixture=0.5):
    """T² Σ q (log q − log p) or another divergence, for a power of two T, by which logits are divided exactly."""
    T = temperature
    if divergence == "reverse":
        swapped = distillation(teacher_logits, z, T)
        by_own = swapped.by_own
        return swapped._replace(by_own={"logits": by_own["teacher_logits"], "teacher_logits": by_own["logits"]})
    if divergence == "jensen_shannon":
        return _jensen_shannon(z, teacher_logits, T, mixture)
    s, t = summarize(z / T), summarize(teacher_logits / T)
    cross, own = _times(t.p.value, s)[0], _times(t.p.value, t)[0]
    loss = cross.sum(-1) - own.sum(-1)
    d_logits = Near(T * (s.p.value - t.p.value), T * (s.p.error + t.p.error))
    # Its terms q, q log q, q log p and q · loss are rounded before they cancel.
    scale = cross.value + own.value + t.p.value * (1 + (cross.value + own.value).sum(-1, keepdims=True))
    relative = RELATIVE + PER_NAT * np.where(t.p.value == 0, 0.0, t.distance.value)
    d_teacher = cross - own - loss[:, None] * t.p.value
    d_teacher = Near(T * d_teacher.value, T * (d_teacher.error + scale * relative))
    return _of_models(z, teacher_logits, T, loss, d_logits, d_teacher)


def _of_models(z, teacher_logits, T, loss, d_logits, d_teacher):
    """T² times a divergence of two models, whose derivatives by their logits are T times those by logits over T."""
    pairs = (z, d_logits), (teacher_logits, d_teacher)
    by_scale = sum(((d * np.where(np.isneginf(z), 0.0, z)).sum(-1) for z, d in pairs), near(0.0))
    by_temperature = (loss * (2 * T**2) - by_scale) * (1 / T)
    return Losses(loss * T**2, {"logits": d_logits, "teacher_logits": d_teacher}, {"temperature": by_temperature})


def _jensen_shannon(z, teacher_logits, T, mixture):
    """T² ((1 − β) KL(p ‖ m) + β KL(q ‖ m)) of the mixture m = β q + (1 − β) p."""
    models = summarize(z / T), summarize(teacher_logits / T)
    shares = 1 - mixture, mixture
    parts = [share * model.p.value for share, model in zip(shares, models, strict=True)]
    log_parts = [np.log(share) - model.distance.value for share, model in zip(shares, models, strict=True)]
    m, log_m = sum(parts), np.logaddexp(*log_parts)
    # The logarithm of a sum has the mean of its parts' errors.
    spread = sum(np.where(part == 0, 0.0, part * s.distance.error) for part, s in zip(parts, models, strict=True))
    error = RELATIVE + spread / np.where(m == 0, 1.0, m)
    distances, gradients = [], []
    for share, model in zip(shares, models, strict=True):
        ratio = where(model.p.value != 0, Near(log_m, error) + model.distance)  # log m − log p
        distances.append((model.p * ratio).sum(-1) * -1.0)
        gradients.append(model.p * (ratio + distances[-1][:, None]) * (-share * T))
    loss = distances[0] * shares[0] + distances[1] * shares[1]
    losses = _of_models(z, teacher_logits, T, loss, *gradients)
    return losses._replace(by_shared=losses.by_shared | {"mixture": (distances[1] - distances[0]) * T**2})


def expected_cost(z, costs, labels=None, distributions=None):
    """Σ_c K_yc p_c, or the same of a distribution over y."""
    s = summarize(z)
    target = distributions if labels is None else _one_hot(labels, z.shape[-1], None)[0]
    of_row = target @ costs
    loss = (s.p * of_row).sum(-1)
    # Costs are measured from that of the most probable class, and rounded at its size.
    is_top = s.p.value == s.p.value.max(-1, keepdims=True)
    loss += Near(0.0, RELATIVE * np.where(is_top, abs(of_row), 0.0).max(-1))
    d_logits = s.p * (near(of_row, RELATIVE) - loss[:, None])
    d_costs = Near(s.p.value[:, None, :], s.p.error[:, None, :]) * target[:, :, None]
    if labels is None:
        return Losses(loss, {"logits": d_logits, "distributions": s.p @ costs.T}, {"costs": d_costs})
    loud = {"costs": np.full(costs.shape, np.isnan(target).any())}
    return Losses(loss, {"logits": d_logits}, {"costs": where(target[:, :, None] != 0, d_costs)}, loud=loud)


def nll(z, labels, class_weights=None):
    one_hot, w = _one_hot(labels, z.shape[-1], class_weights)
    loss = near(-_at_label(z, one_hot), RELATIVE)
    by_own = {"logits": near(-one_hot * w[:, None], RELATIVE)}
    by_shared = {"class_weights": where(one_hot != 0, loss[:, None] * one_hot)}
    # The derivative is that of the picked score alone: with a wrong label it is NaN for one class.
    loud = _loud(one_hot) | {"logits": np.isnan(one_hot)}
    return Losses(loss * w, by_own, by_shared, w, one_hot, loud)


def multi_margin(z, labels, p, margin, class_weights=None):
    one_hot, w = _one_hot(labels, z.shape[-1], class_weights)
    z_y, is_other, scale = _at_label(z, one_hot)[:, None], one_hot != 1, 1 / z.shape[-1]
    gap = margin - z_y + z
    rounding = np.where(np.isinf(z), 0.0, RELATIVE * (abs(z_y) + abs(z) + margin))
    is_on = is_other & ((gap > 0) | np.isnan(gap))
    shortfall = where(is_on, Near(gap, rounding))
    # Rounding decides which side of the hinge a gap of nearly 0 is on.
    slope = Near(1.0 * is_on, RELATIVE * is_on + (is_other & (abs(gap) <= rounding))) if p == 1 else shortfall * 2.0
    loss = (shortfall if p == 1 else shortfall * shortfall).sum(-1) * scale
    by_logits = (slope - slope.sum(-1)[:, None] * one_hot) * (w * scale)[:, None]
    # The slope is promised of finite losses, and to be NaN for a wrong label.
    is_wrong, is_number = np.isnan(one_hot).any(-1), np.isfinite(loss.value)
    by_own = {"logits": where((is_number | is_wrong)[:, None], by_logits, error=np.inf)}
    by_margin = where(is_number, slope.sum(-1) * (w * scale), error=np.inf)
    by_shared = {"class_weights": where(one_hot != 0, loss[:, None] * one_hot), "margin": by_margin}
    return Losses(loss * w, by_own, by_shared, loud=_loud(one_hot))


def _binary_parts(z, t, positive):
    """The loss t · softplus(−z) · positive + (1−t) · softplus(z), and its derivatives by z, t and positive."""

    def softplus(x):
        return near(np.maximum(x, 0) + np.log1p(np.exp(-abs(x))), RELATIVE)

    yes, no = where((t != 0) | (z != -np.inf), softplus(-z)), where((t != 1) | (z != np.inf), softplus(z))
    by_z = near(_sigmoid(z), RELATIVE) * (1 - t) - near(_sigmoid(-z), RELATIVE) * (positive * t)
    return yes * (positive * t) + no * (1 - t), by_z, yes * positive - no, yes * t


def _sigmoid(x):
    return np.exp(-np.maximum(-x, 0) - np.log1p(np.exp(-abs(x))))


def binary(z, targets, pos_weight=1.0, label_smoothing=0.0):
    t = targets * (1 - label_smoothing) + label_smoothing / 2
    loss, by_z, by_t, by_positive = _binary_parts(z, t, pos_weight)
    by_smoothing = where(~np.isinf(by_t.value), by_t * (0.5 - targets), error=np.inf)
    own = {"logits": by_z, "targets": by_t * (1 - label_smoothing)}
    return Losses(loss, own, {"pos_weight": by_positive, "label_smoothing": by_smoothing})


def binary_focal(z, targets, gamma, alpha=None):
    """α_t (1−p_t)^γ times the binary loss, where 1−p_t = t σ(−z) + (1−t) σ(z) has the error of its logarithm."""
    t = targets
    loss, by_z, by_t, _ = _binary_parts(z, t, 1.0)
    log_yes, log_no = (-np.maximum(x, 0) - np.log1p(np.exp(-abs(x))) for x in (z, -z))  # log σ(−z), log σ(z)
    log_miss = np.logaddexp(np.log(t) + log_yes, np.log1p(-t) + log_no)
    power = np.exp(gamma * log_miss)
    relative = RELATIVE + gamma * (RELATIVE + PER_NAT * abs(np.where(power == 0, 0.0, log_miss)))
    power = Near(power, power * relative)
    slopes = {  # of log(1−p_t)
        "logits": near(np.exp(log_yes + log_no - log_miss) * (1 - 2 * t), RELATIVE + relative),
        "targets": near(np.exp(log_yes - log_miss) - np.exp(log_no - log_miss), RELATIVE + relative),
    }
    # exp |z| in a slope meets a product of powers that was flushed to 0 before.
    by_z, by_t = (
        where(loss.value != 0, power * (by + loss * slope * gamma)) + Near(0.0, FLUSHED * abs(slope.value))
        for by, slope in zip((by_z, by_t), slopes.values(), strict=True)
    )
    modulated = power * loss
    weight, shared = 1.0, {"gamma": modulated * Near(log_miss, RELATIVE * (1 + abs(log_miss)))}
    if alpha is not None:
        weight = alpha * t + (1 - alpha) * (1 - t)
        by_t += modulated * ((2 * alpha - 1) / weight)
        shared = {"gamma": shared["gamma"] * weight, "alpha": modulated * (2 * t - 1)}
    return Losses(modulated * weight, {"logits": by_z * weight, "targets": by_t * weight}, shared)


def mse(z, targets):
    error = z - targets
    by_z = near(2 * error, RELATIVE)
    return Losses(near(error**2, RELATIVE), {"logits": by_z, "targets": by_z * -1.0}, {})


def l1(z, targets):
    # Not promised are the slopes of NaN and of what may be rounded to 0.
    is_promised = (abs(z - targets) > FLUSHED) | (z == targets)
    by_z = where(is_promised, near(np.sign(z - targets), RELATIVE), error=np.inf)
    return Losses(near(abs(z - targets), RELATIVE), {"logits": by_z, "targets": by_z * -1.0}, {})


def through_head(d_logits, hidden, kernel, rounding, rounding_of_parts, underflow):
    """Gradients of hidden, kernel and bias from those of hidden · kernel + bias.

    The logits' gradient is rounded to the dtype of the products on its way to two of them, and on a mesh the devices'
    parts of all three are before they add up.
    """

    def rounded(by):
        return Near(d_logits.value, d_logits.error + by * abs(d_logits.value))

    on_way = rounded(rounding + rounding_of_parts) + Near(0.0, underflow)
    d_kernel = Near(on_way.value.T, on_way.error.T) @ hidden
    return on_way @ kernel.T, Near(d_kernel.value.T, d_kernel.error.T), rounded(rounding_of_parts).sum(0)
