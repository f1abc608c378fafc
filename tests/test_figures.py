"""The figures of the lecture on cross entropy, of the study of class weights and of PyTorch's reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxce

LECTURE = jnp.array([[-1.0, -3.0, 4.0], [-3.0, 3.0, -1.0]])
STUDY_WEIGHTS = (0.8, 26.0, 4.0, 0.4)

# logits, label, the label's class weight if it is not the study's, printed probabilities, printed loss
STUDY = [
    ([10, 0.1, 0.1, 0.1], 0, None, [9.99849499e-01, 5.01671307e-05, 5.01671307e-05, 5.01671307e-05], 0.00012041017484),
    ([0.1, 10, 0.1, 0.1], 1, None, [5.01671307e-05, 9.99849499e-01, 5.01671307e-05, 5.01671307e-05], 0.003913330682586),
    ([0.1, 0.1, 10, 0.1], 2, None, [5.01671307e-05, 5.01671307e-05, 9.99849499e-01, 5.01671307e-05], 0.000602050874244),
    ([0.1, 0.1, 0.1, 10], 3, None, [5.01671307e-05, 5.01671307e-05, 5.01671307e-05, 9.99849499e-01], 6.02050874244e-05),
    ([10, 8, 0.1, 0.1], 0, None, [8.80719233e-01, 1.19192387e-01, 4.41898075e-05, 4.41898075e-05], 0.10161311565097),
    ([10, 0.1, 0.1, 0.8], 0, None, [9.99798652e-01, 5.01645795e-05, 5.01645795e-05, 1.01019058e-04], 0.00016109479196),
    ([10, 8, 5, 0.1], 0, None, [8.75562129e-01, 1.18494449e-01, 5.89949122e-03, 4.39310514e-05], 0.10631133259521),
    ([10, 8, 5, 5], 0, None, [0.87046507, 0.11780464, 0.00586515, 0.00586515], 0.11098211900127),
    ([10, 9, 9, 9], 0, None, [0.47536689, 0.1748777, 0.1748777, 0.1748777], 0.59493470450294),
    ([10, 0.1, 0.1, 5], 3, None, [9.93208148e-01, 4.98339031e-05, 4.98339031e-05, 6.69218386e-03], 2.00272600850496),
    ([10, 0.1, 0.1, 0.1], 3, None, [9.99849499e-01, 5.01671307e-05, 5.01671307e-05, 5.01671307e-05], 3.96006020508742),
    ([10, 0.1, 0.1, 0.1], 3, 1.0, [9.99849499e-01, 5.01671307e-05, 5.01671307e-05, 5.01671307e-05], 9.90015051271856),
    ([10, 0.1, 0.1, 0.1], 3, 0.8, [9.99849499e-01, 5.01671307e-05, 5.01671307e-05, 5.01671307e-05], 7.92012041017485),
]


def test_lecture_cross_entropy_and_nll():
    targets = jnp.array([0, 1])
    assert f"{jaxce.cross_entropy(LECTURE, targets):.4f}" == "2.5141"
    assert f"{jaxce.nll_loss(jax.nn.log_softmax(LECTURE), targets):.4f}" == "2.5141"
    log_probs = jaxce.torch.log_softmax(LECTURE, dim=1)
    assert f"{jaxce.torch.nll_loss(log_probs, targets):.4f}" == "2.5141"
    assert f"{jaxce.torch.cross_entropy(LECTURE, targets):.4f}" == "2.5141"


def test_lecture_softmax():
    logits = jnp.array([[-10.0, -10, 10, -5], [3, 0, 0, 0], [1, 2, 3, 4]])
    printed = [
        ["2.0612e-09", "2.0612e-09", "1.0000e+00", "3.0590e-07"],
        ["8.7005e-01", "4.3317e-02", "4.3317e-02", "4.3317e-02"],
        ["3.2059e-02", "8.7144e-02", "2.3688e-01", "6.4391e-01"],
    ]
    assert [[f"{p:.4e}" for p in row] for row in jaxce.torch.softmax(logits, 1)] == printed


@pytest.mark.parametrize(("logits", "label", "weight", "probabilities", "loss"), STUDY)
def test_study_of_class_weights(logits, label, weight, probabilities, loss, x64):
    class_weights = np.array(STUDY_WEIGHTS)
    if weight is not None:
        class_weights[label] = weight
    logits = jnp.array([logits], jnp.float64)
    result = jaxce.cross_entropy(logits, jnp.array([label]), class_weights=class_weights, reduction="sum")
    np.testing.assert_allclose(result, loss, rtol=2e-10)
    np.testing.assert_allclose(jaxce.torch.softmax(logits, 1)[0], probabilities, rtol=5e-7)
    single = jnp.asarray(logits, jnp.float32)
    result = jaxce.cross_entropy(single, jnp.array([label]), class_weights=class_weights, reduction="sum")
    np.testing.assert_allclose(result, loss, rtol=1e-6)


def test_explained_gradient():
    gradient = jax.grad(jaxce.cross_entropy)(jnp.log(jnp.array([0.1, 0.7, 0.2])), jnp.array(0))
    np.testing.assert_allclose(gradient, [-0.9, 0.7, 0.2], rtol=1e-6)


def test_surfaces_of_mse_and_cross_entropy(x64):
    correct, other = np.meshgrid(np.linspace(-3, 3, 13), np.linspace(-3, 3, 13))
    activations = jnp.stack([jnp.asarray(correct), jnp.asarray(other)], -1)
    targets = jnp.broadcast_to(jnp.array([1.0, -1.0]), activations.shape)
    mse = jaxce.mse_loss(activations, targets, reduction="none").sum(-1)
    np.testing.assert_allclose(mse, (correct - 1) ** 2 + (other + 1) ** 2, rtol=1e-14)
    entropy = jaxce.cross_entropy(activations, jnp.zeros(correct.shape, jnp.int32), reduction="none")
    np.testing.assert_allclose(entropy, -np.log(np.exp(correct) / (np.exp(correct) + np.exp(other))), rtol=1e-12)
    right_side = np.s_[0, -1]  # correct = 3, other = −3: as right as it gets
    assert mse[right_side] == 8
    assert entropy[right_side] == entropy.min()


def test_range_from_perfect_to_unbounded():
    def loss(lead):
        return jaxce.cross_entropy(jnp.array([lead, 0.0, 0.0, 0.0]), jnp.array(0))

    assert loss(200.0) == 0
    np.testing.assert_allclose(loss(0.0), np.log(4), rtol=1e-7)
    np.testing.assert_allclose(loss(-1e4), 1e4 + np.log(3), rtol=1e-7)
