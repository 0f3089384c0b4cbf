"""How the contract tests ask whether a promise is kept, and whether their models hold every pair of parts."""

from variants import every_pair, pairs_of

from hybridlm.testing import CHECKS

EXACT = 1e-9
FLOAT32 = 1e-4
TOLERANCES = {
    # transformers' loss function computes in float32, whatever the model's type
    "losses_add_up": 1e-6,
    "packed_losses_add_up": 1e-6,
    "bf16_is_close": 0.08,
}
# what runs in float32 too
CHECKS_OF_STREAMS = ["chunked_continuation", "step_is_scan", "pads_in_stream", "packed_by_seq_idx"]


def holds(check, subject, limit=None, **options):
    """Fail if a check finds an error above its limit, which is `TOLERANCES` or `EXACT` unless given."""
    error = CHECKS[check](subject, **options)
    limit = TOLERANCES.get(check, EXACT) if limit is None else limit
    assert error <= limit, f"{CHECKS[check].promise}: relative error {error:.1e} is above {limit:.0e}"


def holds_every_pair(factors, rows, impossible=()):
    """Fail if some two values of two factors stand in no row, or stand there and are `{a: x, b: y}` of `impossible`."""
    held = {pair for row in rows for pair in pairs_of(row)}
    possible = every_pair(factors, impossible)
    assert held == possible, f"{held ^ possible}"
