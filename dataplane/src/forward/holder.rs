//! Who has a port or a socket that a forward cannot have, as far as the system tells.
//!
//! On Linux, the kernel's tables of sockets (proc(5)) give the number of the one that listens, and the processes
//! that this user may look at give their descriptors. A process of another user is not told, and then nothing is
//! said: no guess is made.

use std::fmt;
use std::net::SocketAddr;

use vnet_proto::model::{ForwardListen, Protocol};

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
pub(super) fn process(protocol: Protocol, listen: &ForwardListen) -> Option<Holder> {
    #[cfg(target_os = "linux")]
    return linux::process(protocol, listen);
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (protocol, listen);
        None
    }
}

#[cfg(target_os = "linux")]
mod linux {
    use std::net::Ipv6Addr;
    use std::time::{Duration, Instant};

    use procfs::net::TcpState;
    use procfs::process::{FDTarget, all_processes};

    use super::{ForwardListen, Holder, Protocol};

    /// How long processes are looked through: whoever opens a forward waits so long.
    const PATIENCE: Duration = Duration::from_millis(300);
    /// Characters of a process's name that are shown; Linux keeps 15 bytes (proc(5)).
    const NAME_CHARS_MAX: usize = 15;

    pub(super) fn process(protocol: Protocol, listen: &ForwardListen) -> Option<Holder> {
        let inodes = inodes(protocol, listen);
        if inodes.is_empty() {
            return None;
        }
        let until = Instant::now() + PATIENCE;
        for process in all_processes().ok()?.flatten() {
            if Instant::now() > until {
                return None;
            }
            // One of another user, or one that is gone.
            let Ok(mut descriptors) = process.fd() else {
                continue;
            };
            let has_it = descriptors.any(|descriptor| {
                matches!(descriptor.map(|d| d.target), Ok(FDTarget::Socket(inode)) if inodes.contains(&inode))
            });
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
