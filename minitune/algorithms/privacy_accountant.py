"""Privacy that steps of DP-SGD spend: epsilon of a noise multiplier, and the other way round.

Renyi divergence of the sampled Gaussian (Mironov et al. 2019, arXiv 1908.10530, section 3.3), which
adds up over steps, and its conversion (Balle et al. 2020, arXiv 1905.09982, theorem 21). Both
assume that each row is in a batch by a coin of its own, with probability q (Poisson sampling).
"""

import math

import numpy as np

WHOLE_ORDERS = (*range(12, 65), *range(72, 257, 8), 320, 384, 448, 512)
LOW_ORDERS = tuple(1 + i / 20 for i in range(1, 220))
TAIL = 12  # deviations of a normal beyond which an integral counts nothing
POINTS = 16  # of the integral in each deviation
LARGEST_NOISE = 1e6


def log_moment(noise: float, q: float, alpha: int) -> float:
    """Log of sum_k C(alpha, k) (1 - q)^(alpha - k) q^k exp((k^2 - k) / (2 noise^2)), section 3.3.

    (alpha - 1) times the Renyi divergence of order alpha that one step spends.
    """
    terms = []
    for k in range(alpha + 1):
        chosen = math.lgamma(alpha + 1) - math.lgamma(k + 1) - math.lgamma(alpha - k + 1)
        chosen += k * math.log(q) if k else 0.0
        if alpha > k:
            chosen += (alpha - k) * math.log1p(-q) if q < 1 else -math.inf
        terms.append(chosen + (k * k - k) / (2 * noise * noise))
    largest = max(terms)
    return largest + math.log(math.fsum(math.exp(term - largest) for term in terms))


def epsilon_of(noise: float, q: float, n_steps: int, delta: float) -> float:
    """Epsilon of n_steps at a noise multiplier and a sampling rate q: the least of all orders."""
    if n_steps == 0:
        return 0.0
    if noise == 0:
        return math.inf
    moments = [(alpha, _integral(noise, q, alpha)) for alpha in LOW_ORDERS]
    moments += [(alpha, log_moment(noise, q, alpha)) for alpha in WHOLE_ORDERS]
    each = []
    for alpha, moment in moments:
        spent = n_steps * moment / (alpha - 1)
        each.append(spent + math.log1p(-1 / alpha) - math.log(delta * alpha) / (alpha - 1))
    return max(0.0, min(each))


def noise_for(epsilon: float, q: float, n_steps: int, delta: float) -> float:
    """Smallest noise multiplier, to 4 digits and rounded up, for an epsilon.

    ValueError if none below LARGEST_NOISE is enough.
    """
    low, high = 0.0, 1.0
    while epsilon_of(high, q, n_steps, delta) > epsilon:
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            found = f"no noise below {LARGEST_NOISE:g} gives epsilon {epsilon}"
            raise ValueError(f"{found} at delta {delta}")
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        if epsilon_of(middle, q, n_steps, delta) > epsilon:
            low = middle
        else:
            high = middle
    return high


def _integral(noise: float, q: float, alpha: float) -> float:
    """Log of A_alpha = E_z ((1 - q) + q exp((2 z - 1) / (2 noise^2)))^alpha, z normal(0, noise^2).

    Definition of what log_moment sums, for any order: the trapezoidal rule, whose error falls
    exponentially with the points on so smooth a function.
    """
    low, high = -TAIL * noise, alpha + TAIL * noise
    z = np.linspace(low, high, int(POINTS * (high - low) / noise))
    log_normal = -(z**2) / (2 * noise**2) - math.log(noise * math.sqrt(2 * math.pi))
    log_outside = math.log1p(-q) if q < 1 else -math.inf
    log_ratio = np.logaddexp(log_outside, math.log(q) + (2 * z - 1) / (2 * noise**2))
    values = log_normal + alpha * log_ratio
    largest = float(values.max())
    return largest + math.log(float(np.exp(values - largest).sum()) * float(z[1] - z[0]))
