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

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    const PART: &str = "VNET_TEST_CLOCK";

    /// The part of a process whose machine has slept: says what the clock reads.
    #[test]
    #[ignore = "the other side of the test below"]
    fn the_other_side() {
        if std::env::var_os(PART).is_some() {
            println!("reads {}", read().as_secs());
        }
    }

    /// A time namespace sets the clock that counts suspend ahead of the one that does not, as a suspend does.
    #[test]
    fn time_suspended_counts() {
        const SLEPT: u64 = 100_000;
        let slept = std::process::Command::new("unshare")
            .args([
                "--user",
                "--map-root-user",
                "--time",
                "--boottime",
                &SLEPT.to_string(),
                "--fork",
            ])
            .arg(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "clock::tests::the_other_side",
                "--ignored",
                "--nocapture",
            ])
            .env(PART, "1")
            .output();
        let Some(output) = slept.ok().filter(|output| output.status.success()) else {
            assert!(
                std::env::var_os("CI").is_none(),
                "no time namespace can be had (util-linux, user namespaces)"
            );
            eprintln!("skipped: no time namespace can be had (util-linux, user namespaces)");
            return;
        };
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let reads: u64 = said
            .lines()
            .find_map(|line| line.split("reads ").nth(1)?.trim().parse().ok())
            .unwrap_or_else(|| panic!("{said}"));
        let here = read().as_secs();
        assert!(reads >= here + SLEPT / 2, "{here} here, {reads} there");
    }
}
