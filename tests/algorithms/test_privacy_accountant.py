"""The privacy that is counted: against an integral of its definition, the exact curve of one Gaussian, and published figures."""

import math

import numpy as np
import pytest

from minitune.algorithms.privacy_accountant import epsilon_of, log_moment, noise_for


def integral(noise: float, q: float, alpha: float) -> float:
    """Log of E_z (mixture(z) / normal(z))^alpha under the normal, on a fine grid."""
    z = np.linspace(-40 * noise, 40 * noise + alpha + 5, 40_001)
    log_normal = -(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    outside = math.log1p(-q) if q < 1 else -math.inf
    log_ratio = np.logaddexp(outside, math.log(q) + (2 * z - 1) / (2 * noise**2))
    values = log_normal + alpha * log_ratio
    return float(values.max() + math.log(np.trapezoid(np.exp(values - values.max()), z)))


@pytest.mark.parametrize(("noise", "q"), [(0.7, 0.3), (1.1, 0.01), (2.5, 0.004), (4.0, 1.0)])
def test_the_moment_is_the_integral_of_its_definition(noise: float, q: float) -> None:
    for alpha in (2, 3, 7, 16, 33):
        assert log_moment(noise, q, alpha) == pytest.approx(integral(noise, q, alpha), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize(("noise", "q", "n_steps"), [(0.8, 0.01, 300), (1.3, 0.02, 2000), (0.6, 0.05, 40)])
def test_epsilon_is_the_least_over_orders_that_an_integral_gives(noise: float, q: float, n_steps: int) -> None:
    delta = 1e-5

    def at(alpha: float) -> float:
        spent = n_steps * integral(noise, q, alpha) / (alpha - 1)
        return spent + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1)

    wanted = min(at(alpha) for alpha in (1.13, 1.5, 2, 2.5, 3.7, 5, 8, 13, 21, 34, 55))
    ours = epsilon_of(noise, q, n_steps, delta)
    assert 0.9 * wanted <= ours <= wanted * (1 + 1e-9)  # it looks at more orders


def test_one_gaussian_spends_no_less_than_its_exact_curve() -> None:
    """Balle & Wang 2018, arXiv 1805.06530, theorem 8: delta(epsilon) of one release without sampling."""

    def normal(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    for noise in (0.9, 2.0, 5.0):
        epsilon = epsilon_of(noise, 1.0, 1, 1e-5)
        exact = normal(0.5 / noise - epsilon * noise) - math.exp(epsilon) * normal(-0.5 / noise - epsilon * noise)
        assert 1e-7 < exact <= 1e-5


def test_the_published_example_of_dp_sgd_is_met() -> None:
    """MNIST of the tutorial of TensorFlow Privacy: 60000 rows, batches of 256, noise 1.1, 60 epochs, delta 1e-5: 3.01 by the
    older conversion, and 2.6 by the one that is used here."""
    q, n_steps = 256 / 60_000, 60 * 60_000 // 256
    older = min(n_steps * log_moment(1.1, q, a) / (a - 1) + math.log(1e5) / (a - 1) for a in range(2, 65))
    assert older == pytest.approx(3.01, abs=0.01)
    assert epsilon_of(1.1, q, n_steps, 1e-5) == pytest.approx(2.60, abs=0.01)


def test_noise_for_an_epsilon_spends_that_much_and_no_noise_spends_everything() -> None:
    for epsilon in (0.3, 2.0, 8.0, 50.0):
        noise = noise_for(epsilon, 0.02, 700, 1e-6)
        assert epsilon_of(noise, 0.02, 700, 1e-6) <= epsilon < epsilon_of(noise * 0.999, 0.02, 700, 1e-6)
    assert epsilon_of(0.0, 0.02, 700, 1e-6) == math.inf
    assert epsilon_of(1.0, 0.02, 0, 1e-6) == 0.0
    with pytest.raises(ValueError, match="no noise below"):
        noise_for(1e-9, 1.0, 10**6, 1e-12)
