//! Jittered exponential back-off between attempts to reach the controlplane.

use std::time::Duration;

/// The pauses between attempts. Each is drawn from the upper half of a span that doubles.
#[derive(Debug)]
pub(super) struct Backoff {
    span: Duration,
}

impl Backoff {
    pub(super) fn new() -> Self {
        Self { span: FIRST }
    }

    /// The attempt succeeded; the next pause is short again.
    pub(super) fn reset(&mut self) {
        *self = Self::new();
    }

    /// How long to pause, drawn by `random`.
    pub(super) fn next(&mut self, random: u32) -> Duration {
        let half = self.span / 2;
        self.span = (self.span * 2).min(LONGEST);
        half + half.mul_f64(f64::from(random) / f64::from(u32::MAX))
    }
}

/// The first pause, at most.
const FIRST: Duration = Duration::from_millis(50);
/// Every later pause, at most.
const LONGEST: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_begin_anew() {
        let mut backoff = Backoff::new();
        let longest: Vec<u128> = (0..9).map(|_| backoff.next(u32::MAX).as_millis()).collect();
        assert_eq!(longest, [50, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert_eq!(backoff.next(0).as_millis(), 2500);
        backoff.reset();
        assert_eq!(backoff.next(0).as_millis(), 25);
    }
}
