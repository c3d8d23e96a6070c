//! What may happen many times in a row, and is told once in a while.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// When it was told last.
#[derive(Debug)]
pub(super) struct Seldom {
    interval: Duration,
    told: Mutex<Option<Instant>>,
}

impl Seldom {
    /// Told once in this time.
    pub(super) const fn new(interval: Duration) -> Self {
        Self {
            interval,
            told: Mutex::new(None),
        }
    }

    /// Whether it is to be told now, which it is then.
    pub(super) fn is_news(&self, now: Instant) -> bool {
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        let is_news = told.is_none_or(|at| now.saturating_duration_since(at) > self.interval);
        if is_news {
            *told = Some(now);
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_told_once_in_its_time_and_again_later() {
        const INTERVAL: Duration = Duration::from_secs(10);
        let told = Seldom::new(INTERVAL);
        let now = Instant::now();
        assert!(told.is_news(now));
        assert!(!told.is_news(now) && !told.is_news(now + INTERVAL));
        assert!(told.is_news(now + INTERVAL + Duration::from_millis(1)));
        assert!(!told.is_news(now + INTERVAL + Duration::from_millis(2)));
    }
}
