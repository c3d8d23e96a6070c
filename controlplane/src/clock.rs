//! The time: one clock for lifetimes, one for people.
//!
//! A grant "for an hour" ends an hour later even when the host slept meanwhile (clock_gettime(2),
//! `CLOCK_BOOTTIME`). A wall clock that is set back prolongs nothing; one that is set forward ends
//! things early, which is the safe side. Tests drive the clock by hand.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// One moment on both clocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Now {
    /// For lifetimes: counts suspend, never goes back, never lies behind `wall`.
    pub steady: SystemTime,
    /// For people: the wall clock as it is set.
    pub wall: SystemTime,
}

impl Now {
    /// A moment before every other.
    pub const BEFORE_ALL: Self = Self {
        steady: SystemTime::UNIX_EPOCH,
        wall: SystemTime::UNIX_EPOCH,
    };
}

/// Where the time comes from.
#[derive(Debug, Clone)]
pub struct Clock(Source);

#[derive(Debug, Clone)]
enum Source {
    /// Holds the wall-clock time at which the machine started, as far as lifetimes are concerned.
    System(Arc<Mutex<Duration>>),
    Manual {
        start: SystemTime,
        elapsed_ms: Arc<AtomicU64>,
    },
}

impl Clock {
    /// The machine's clocks.
    pub fn system() -> Self {
        Self(Source::System(Arc::default()))
    }

    /// A clock that stands still until [`Clock::advance`].
    pub fn manual(start: SystemTime) -> Self {
        Self(Source::Manual {
            start,
            elapsed_ms: Arc::new(AtomicU64::new(0)),
        })
    }

    /// Moves a manual clock on, in whole milliseconds. The machine's clocks are left alone.
    pub fn advance(&self, by: Duration) {
        if let Source::Manual { elapsed_ms, .. } = &self.0 {
            elapsed_ms.fetch_add(
                u64::try_from(by.as_millis()).unwrap_or(u64::MAX),
                Ordering::SeqCst,
            );
        }
    }

    /// The time.
    pub fn now(&self) -> Now {
        match &self.0 {
            Source::System(started) => {
                let wall = SystemTime::now();
                let mut started = started.lock().unwrap_or_else(PoisonError::into_inner);
                Now {
                    steady: steady(&mut started, boot_time(), wall),
                    wall,
                }
            }
            Source::Manual { start, elapsed_ms } => {
                let now = *start + Duration::from_millis(elapsed_ms.load(Ordering::SeqCst));
                Now {
                    steady: now,
                    wall: now,
                }
            }
        }
    }
}

fn steady(started: &mut Duration, boot: Duration, wall: SystemTime) -> SystemTime {
    let wall = wall.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    *started = wall.saturating_sub(boot).max(*started);
    SystemTime::UNIX_EPOCH + *started + boot
}

fn boot_time() -> Duration {
    // macOS counts suspend in CLOCK_MONOTONIC; Linux only in CLOCK_BOOTTIME.
    #[cfg(target_os = "linux")]
    const CLOCK: nix::libc::clockid_t = nix::libc::CLOCK_BOOTTIME;
    #[cfg(not(target_os = "linux"))]
    const CLOCK: nix::libc::clockid_t = nix::libc::CLOCK_MONOTONIC;
    let mut time = nix::libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is a valid timespec for the kernel to fill.
    let result = unsafe { nix::libc::clock_gettime(CLOCK, &raw mut time) };
    debug_assert_eq!(result, 0, "both clocks exist on every supported system");
    let seconds = u64::try_from(time.tv_sec).unwrap_or(0);
    Duration::new(seconds, u32::try_from(time.tv_nsec).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn manual_clock_moves_by_hand_and_the_machines_by_itself() {
        let manual = Clock::manual(SystemTime::UNIX_EPOCH);
        let before = manual.now();
        assert_eq!(manual.now(), before);
        manual.advance(Duration::from_secs(5));
        assert_eq!(manual.now().steady, before.steady + Duration::from_secs(5));
        let system = Clock::system();
        assert!(system.now().steady <= system.now().steady);
        assert!(boot_time() > Duration::ZERO);
    }

    #[test]
    fn a_wall_clock_set_back_prolongs_nothing_and_suspend_counts() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let boot = Duration::from_secs;
        let mut started = Duration::ZERO;
        assert_eq!(steady(&mut started, boot(10), at(1000)), at(1000));
        // Set back by 500 s, ten seconds later.
        assert_eq!(steady(&mut started, boot(20), at(510)), at(1010));
        // An hour of suspend counts on the boot clock.
        assert_eq!(steady(&mut started, boot(3620), at(4110)), at(4610));
        // Set forward: what should have ended, has.
        assert_eq!(steady(&mut started, boot(3620), at(9000)), at(9000));
    }
}

#[cfg(all(test, target_os = "linux"))]
mod suspended {
    use super::*;

    const PART: &str = "VNET_TEST_CLOCK";

    /// The part of a process whose machine has slept: says what the clock reads.
    #[test]
    #[ignore = "the other side of the test below"]
    fn the_other_side() {
        if std::env::var_os(PART).is_some() {
            println!("reads {}", boot_time().as_secs());
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
                "clock::suspended::the_other_side",
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
        let here = boot_time().as_secs();
        assert!(reads >= here + SLEPT / 2, "{here} here, {reads} there");
    }
}
