//! Whether the host has a way to an IPv6 address. Connecting a datagram socket looks the route up and sends
//! nothing.

use std::io;
use std::net::{Ipv6Addr, UdpSocket};

/// An address that only a default route leads to: the first of those that are given out (RFC 4291 §2.4), and
/// nobody's.
pub const ANYWHERE: Ipv6Addr = Ipv6Addr::new(0x2000, 0, 0, 0, 0, 0, 0, 1);
/// The discard service (RFC 863); nothing is sent there.
const PORT: u16 = 9;

/// Whether there is a route. Where the host cannot say, for want of descriptors, dialling will.
pub fn has_way(to: Ipv6Addr) -> bool {
    let connected = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).and_then(|socket| socket.connect((to, PORT)));
    match connected {
        Ok(()) => true,
        Err(error) => {
            !matches!(
                error.kind(),
                io::ErrorKind::NetworkUnreachable
                    | io::ErrorKind::HostUnreachable
                    | io::ErrorKind::NetworkDown
                    | io::ErrorKind::AddrNotAvailable
                    | io::ErrorKind::PermissionDenied
                    | io::ErrorKind::Unsupported
            ) && error.raw_os_error() != Some(nix::libc::EAFNOSUPPORT)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(target_os = "linux")]
    #[test]
    fn without_a_route_there_is_no_way_and_with_one_there_is() {
        // In a thread of its own, whose network namespace ends with it.
        std::thread::spawn(|| {
            use nix::sched::{CloneFlags, unshare};
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                eprintln!("skipped: this user may not make a network namespace outside a user namespace");
                return;
            }
            let ip = |arguments: &str| {
                let status = std::process::Command::new("ip")
                    .args(arguments.split(' '))
                    .status()
                    .expect("iproute2 is installed");
                assert!(status.success(), "ip {arguments}");
            };
            ip("link set lo up");
            let there = "2001:db8::9".parse().unwrap();
            assert!(!has_way(there) && !has_way(ANYWHERE));
            ip("-6 addr add fd00:1::1/64 dev lo");
            ip("-6 route add 2001:db8::/32 dev lo");
            assert!(has_way(there) && !has_way(ANYWHERE));
            ip("-6 route add default dev lo");
            assert!(has_way(ANYWHERE));
        })
        .join()
        .unwrap();
    }
}
