"""The losses as anyone would write them in JAX: what derivatives are compared with, on harmless float64 inputs."""

import jax
import jax.numpy as jnp


def target_of(labels_or_distribution, num_classes):
    if jnp.issubdtype(labels_or_distribution.dtype, jnp.integer):
        return jax.nn.one_hot(labels_or_distribution, num_classes)
    return labels_or_distribution


def cross_entropy(logits, targets, class_weights=None, weights=None, label_smoothing=0.0, z_loss=0.0):
    num_classes = logits.shape[-1]
    distance = -jax.nn.log_softmax(logits)
    class_weights = jnp.ones(num_classes) if class_weights is None else class_weights
    of_classes = jnp.broadcast_to(class_weights, logits.shape)
    target = target_of(targets, num_classes)
    smooth = (1 - label_smoothing) * target + label_smoothing / num_classes
    losses = jnp.sum(of_classes * smooth * distance, -1)
    z_weight = jnp.ones(losses.shape)
    if jnp.issubdtype(targets.dtype, jnp.integer):
        z_weight = class_weights[targets]
        losses = (1 - label_smoothing) * jnp.sum(of_classes * target * distance, -1)
        losses += label_smoothing / num_classes * jnp.sum(of_classes * distance, -1)
    losses += z_loss * z_weight * jax.nn.logsumexp(logits, axis=-1) ** 2
    return losses if weights is None else weights * losses


def divisor(targets, class_weights, weights):
    share = jnp.ones(targets.shape[:1]) if weights is None else weights
    if class_weights is not None and jnp.issubdtype(targets.dtype, jnp.integer):
        share = share * class_weights[targets]
    return jnp.sum(share)


def nll(log_probs, labels):
    return -jnp.take_along_axis(log_probs, labels[:, None], -1)[:, 0]


def entropy(logits):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.sum(jnp.exp(log_p) * log_p, -1)


def focal(logits, labels, gamma):
    p = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], -1)[:, 0]
    return -((1 - p) ** gamma) * jnp.log(p)


def poly(logits, labels, epsilon):
    p = jnp.take_along_axis(jax.nn.softmax(logits), labels[:, None], -1)[:, 0]
    return -jnp.log(p) + epsilon * (1 - p)


def binary(logits, targets, pos_weight=1.0):
    p = 1 / (1 + jnp.exp(-logits))
    pos_weight = jnp.broadcast_to(pos_weight, logits.shape)
    return -pos_weight * targets * jnp.log(p) - (1 - targets) * jnp.log(1 - p)


def binary_focal(logits, targets, gamma, alpha):
    p = 1 / (1 + jnp.exp(-logits))
    p_t = p * targets + (1 - p) * (1 - targets)
    return (alpha * targets + (1 - alpha) * (1 - targets)) * (1 - p_t) ** gamma * binary(logits, targets)


def distillation(logits, teacher_logits, temperature, divergence="forward", mixture=0.5):
    log_p, log_q = jax.nn.log_softmax(logits / temperature), jax.nn.log_softmax(teacher_logits / temperature)
    log_m = jnp.log(mixture * jnp.exp(log_q) + (1 - mixture) * jnp.exp(log_p))

    def kl(log_of, log_from):
        return jnp.sum(jnp.exp(log_of) * (log_of - log_from), -1)

    divergences = {
        "forward": lambda: kl(log_q, log_p),
        "reverse": lambda: kl(log_p, log_q),
        "jensen_shannon": lambda: mixture * kl(log_q, log_m) + (1 - mixture) * kl(log_p, log_m),
    }
    return temperature**2 * divergences[divergence]()


def expected_cost(logits, targets, costs):
    return jnp.sum((target_of(targets, logits.shape[-1]) @ costs) * jax.nn.softmax(logits), -1)


def multi_margin(logits, labels, margin, p):
    at_label = jnp.take_along_axis(logits, labels[:, None], -1)
    shortfall = jnp.maximum(0, margin - at_label + logits) ** p
    return jnp.sum(shortfall * (1 - jax.nn.one_hot(labels, logits.shape[-1])), -1) / logits.shape[-1]
