//! Who has a port or a socket that a forward cannot have, as far as the system tells.
//!
//! On Linux, the kernel's tables of sockets (proc(5)) give the number of the one that listens, and the processes
//! that this user may look at give their descriptors. A process of another user is not told, and then nothing is
//! said: no guess is made. Looking costs the one thread that does everything but packets: it has an [`Allowance`].

use std::fmt;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use vnet_proto::model::{ForwardListen, Protocol};

/// How long may be looked at once, and after a while without: whoever opens a forward waits so long.
const LOOKING_MAX: Duration = Duration::from_millis(300);
/// What may be looked for is this part of all time.
const LOOKING_PART: u32 = 20;

/// Time to look for who has a place; used up by whoever has forwards refused without end.
pub(super) struct Allowance(Mutex<Left>);

#[derive(Clone, Copy)]
struct Left {
    time: Duration,
    as_of: Instant,
}

impl Allowance {
    pub(super) fn new() -> Self {
        Self(Mutex::new(Left {
            time: LOOKING_MAX,
            as_of: Instant::now(),
        }))
    }

    /// What is left now; `None` when nothing is.
    fn left(&self, now: Instant) -> Option<Duration> {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let more = now.saturating_duration_since(left.as_of) / LOOKING_PART;
        *left = Left {
            time: LOOKING_MAX.min(left.time + more),
            as_of: now,
        };
        (!left.time.is_zero()).then_some(left.time)
    }

    fn spend(&self, time: Duration) {
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        left.time = left.time.saturating_sub(time);
    }
}

/// What has a place to listen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Holder {
    /// Another forward of this network.
    Forward {
        /// Where that listens.
        listen: ForwardListen,
        /// Where that leads.
        target: SocketAddr,
    },
    /// A program.
    Process {
        /// Its name, as the system shows it.
        name: String,
        /// Its number.
        pid: i32,
    },
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Forward { listen, target } => {
                write!(f, "this network's forward from {listen} to {target}")
            }
            Self::Process { name, pid } => write!(f, "{name} (pid {pid})"),
        }
    }
}

/// The process that listens there. `None` where the system does not tell, or not in time.
pub(super) fn process(protocol: Protocol, listen: &ForwardListen, looking: &Allowance) -> Option<Holder> {
    let began = Instant::now();
    let until = began + looking.left(began)?;
    #[cfg(target_os = "linux")]
    let found = linux::process(protocol, listen, until);
    #[cfg(not(target_os = "linux"))]
    let found = {
        let _ = (protocol, listen, until);
        None
    };
    looking.spend(began.elapsed());
    found
}

#[cfg(target_os = "linux")]
mod linux {
    use std::net::Ipv6Addr;
    use std::time::Instant;

    use procfs::net::TcpState;
    use procfs::process::{FDTarget, all_processes};

    use super::{ForwardListen, Holder, Protocol};

    /// Characters of a process's name that are shown; Linux keeps 15 bytes (proc(5)).
    const NAME_CHARS_MAX: usize = 15;

    pub(super) fn process(protocol: Protocol, listen: &ForwardListen, until: Instant) -> Option<Holder> {
        let inodes = inodes(protocol, listen);
        if inodes.is_empty() {
            return None;
        }
        for process in all_processes().ok()?.flatten() {
            // One of another user, or one that is gone.
            let Ok(descriptors) = process.fd() else {
                continue;
            };
            let mut has_it = false;
            for descriptor in descriptors {
                if Instant::now() > until {
                    return None;
                }
                has_it = matches!(descriptor.map(|d| d.target), Ok(FDTarget::Socket(inode)) if inodes.contains(&inode));
                if has_it {
                    break;
                }
            }
            if has_it {
                let name = process.stat().ok()?.comm;
                return Some(Holder::Process {
                    name: shown(&name),
                    pid: process.pid,
                });
            }
        }
        None
    }

    /// The numbers of the sockets that are in the way.
    fn inodes(protocol: Protocol, listen: &ForwardListen) -> Vec<u64> {
        let address = match listen {
            ForwardListen::Unix(path) => {
                let served = procfs::net::unix().unwrap_or_default().into_iter();
                return served
                    .filter(|entry| entry.path.as_deref() == Some(path))
                    .map(|entry| entry.inode)
                    .collect();
            }
            ForwardListen::Address(address) => *address,
        };
        let bound = bound(protocol);
        let that_are = |is_in_the_way: &dyn Fn(&ForwardListen) -> bool| -> Vec<u64> {
            let those = bound.iter().filter(|(local, _)| is_in_the_way(local));
            those.map(|(_, inode)| *inode).collect()
        };
        let own_family = that_are(&|local| local.overlaps(listen));
        if !own_family.is_empty() {
            return own_family;
        }
        // A socket on every IPv6 address has, unless it says otherwise, every IPv4 address as well.
        let both = ForwardListen::Address((Ipv6Addr::UNSPECIFIED, address.port()).into());
        that_are(&|local| *local == both)
    }

    /// Sockets that have a port to themselves, and their numbers.
    fn bound(protocol: Protocol) -> Vec<(ForwardListen, u64)> {
        if protocol == Protocol::Udp {
            let four = procfs::net::udp().unwrap_or_default().into_iter();
            let six = procfs::net::udp6().unwrap_or_default().into_iter();
            four.chain(six)
                .map(|entry| (entry.local_address.into(), entry.inode))
                .collect()
        } else {
            let four = procfs::net::tcp().unwrap_or_default().into_iter();
            let six = procfs::net::tcp6().unwrap_or_default().into_iter();
            four.chain(six)
                .filter(|entry| entry.state == TcpState::Listen)
                .map(|entry| (entry.local_address.into(), entry.inode))
                .collect()
        }
    }

    /// A process names itself, and so could write anything.
    fn shown(name: &str) -> String {
        let plain = |c: char| if c.is_ascii_graphic() || c == ' ' { c } else { '?' };
        name.chars().take(NAME_CHARS_MAX).map(plain).collect()
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn a_name_moves_no_terminal_and_is_short() {
            assert_eq!(shown("nginx"), "nginx");
            assert_eq!(shown("a\u{1b}[31m\u{202e}b"), "a?[31m?b");
            assert_eq!(shown(&"x".repeat(100)).len(), NAME_CHARS_MAX);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_takes_a_twentieth_of_the_time_at_most() {
        let allowance = Allowance::new();
        let began = Instant::now();
        let second = Duration::from_secs(1);
        assert_eq!(allowance.left(began), Some(LOOKING_MAX));
        // Once it took longer than it may.
        allowance.spend(LOOKING_MAX + second);
        assert_eq!(allowance.left(began), None);
        assert_eq!(allowance.left(began + second), Some(second / LOOKING_PART));
        allowance.spend(second / LOOKING_PART);
        assert_eq!(allowance.left(began + second), None);
        assert_eq!(allowance.left(began + second * 60), Some(LOOKING_MAX));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn without_time_to_look_nobody_is_named() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let listen = listener.local_addr().unwrap().into();
        let allowance = Allowance::new();
        assert!(process(Protocol::Tcp, &listen, &allowance).is_some());
        assert!(allowance.left(Instant::now()) < Some(LOOKING_MAX), "it took time");
        let tomorrow = Instant::now() + Duration::from_secs(86_400);
        allowance.left(tomorrow);
        allowance.spend(LOOKING_MAX);
        assert_eq!(process(Protocol::Tcp, &listen, &allowance), None);
    }
}
