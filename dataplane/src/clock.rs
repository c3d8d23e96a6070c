//! The one clock of a dataplane: since the process first asked, counting time suspended.

use std::sync::OnceLock;
use std::time::Duration;

/// Time since the first call.
pub(crate) fn now() -> Duration {
    static START: OnceLock<Duration> = OnceLock::new();
    let reading = read();
    reading.saturating_sub(*START.get_or_init(|| reading))
}

#[cfg(target_os = "linux")]
fn read() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    // Leases and expiries must run on while the machine sleeps. The clock exists since Linux 2.6.39.
    clock_gettime(ClockId::CLOCK_BOOTTIME)
        .map(Duration::from)
        .unwrap_or_default()
}

#[cfg(not(target_os = "linux"))]
fn read() -> Duration {
    use nix::time::{ClockId, clock_gettime};
    // On macOS this one counts suspended time.
    clock_gettime(ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .unwrap_or_default()
}
