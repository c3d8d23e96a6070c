//! Guards: which destinations a broad rule does not lift, judged on the address really dialled.
//!
//! Owns three of the built-in protections: cloud metadata and link-local addresses, every address the
//! host itself owns, and the addresses where a vnet daemon listens. Whether a destination belongs to
//! another guest, or was learned from DNS as a private address, is known to the engine, which adds
//! those guards itself. What a guard means for a flow is decided by the controlplane.
//!
//! A [`Guards`] holds one immutable [`Snapshot`], replaced whole when the host's addresses change
//! ([`follow`]) or a controlplane names where its other dataplanes listen. It is read for each miss and each
//! dial, never for a packet.
//!
//! An IPv6 address that carries an IPv4 address ([`carried_ipv4`]) is under the guards of both. The tables are
//! [`vnet_proto::model::special`]'s, which the controlplane reads too.

mod follow;

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use ipnet::IpNet;
use vnet_proto::model::special::{LOOPBACK, METADATA, carried_ipv4};
use vnet_proto::model::{Guard, GuardSet, Protocol};

pub use follow::{Watcher, follow};

/// The guards in force, and the host's way out over IPv6, which is followed with its addresses. Shared; cheap
/// to read.
#[derive(Debug, Default)]
pub struct Guards {
    snapshot: RwLock<Arc<Snapshot>>,
    has_ipv6: AtomicBool,
}

impl Guards {
    /// Guards of a host with these addresses and of the daemon's own TCP listeners.
    pub fn new(host: HostAddresses, own_listeners: impl IntoIterator<Item = SocketAddr>) -> Self {
        let own_listeners = own_listeners.into_iter().map(canonical_socket).collect();
        Self {
            snapshot: RwLock::new(Arc::new(Snapshot {
                host,
                own_listeners,
                closed: Vec::new(),
            })),
            has_ipv6: AtomicBool::new(false),
        }
    }

    /// Whether the host has a default route over IPv6.
    pub fn has_ipv6(&self) -> bool {
        self.has_ipv6.load(Ordering::Relaxed)
    }

    /// The host has a default route over IPv6 now, or none. Whether that is a change.
    pub fn set_ipv6(&self, has_ipv6: bool) -> bool {
        self.has_ipv6.swap(has_ipv6, Ordering::Relaxed) != has_ipv6
    }

    /// What is in force now. Keep it only for one decision.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        Arc::clone(&self.snapshot.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// The guards of one destination; see [`Snapshot::classify`].
    pub fn classify(&self, dialled: IpAddr, port: u16, protocol: Protocol) -> GuardSet {
        self.snapshot().classify(dialled, port, protocol)
    }

    /// Addresses that the host owns, loopback aside, in order.
    pub fn host_addresses(&self) -> Vec<IpAddr> {
        self.snapshot().host.reported()
    }

    /// The host owns these now. Whether that is a change.
    pub fn set_host(&self, host: HostAddresses) -> bool {
        self.update(|snapshot| {
            let changed = snapshot.host != host;
            snapshot.host = host;
            changed
        })
    }

    /// The daemon itself listens here too, over TCP.
    pub fn add_listener(&self, listener: SocketAddr) {
        self.update(|snapshot| {
            snapshot.own_listeners.push(canonical_socket(listener));
            true
        });
    }

    /// Where the daemon itself listens over TCP, in order.
    pub fn own_listeners(&self) -> Vec<SocketAddr> {
        let mut own = self.snapshot().own_listeners.clone();
        own.sort_unstable();
        own.dedup();
        own
    }

    /// Other daemons listen here now, instead of where the controlplane last said. Whether that is a change.
    pub fn set_closed(&self, closed: Vec<SocketAddr>) -> bool {
        let mut closed: Vec<_> = closed.into_iter().map(canonical_socket).collect();
        closed.sort_unstable();
        closed.dedup();
        self.update(|snapshot| {
            let changed = snapshot.closed != closed;
            snapshot.closed = closed;
            changed
        })
    }

    fn update(&self, change: impl FnOnce(&mut Snapshot) -> bool) -> bool {
        let mut guard = self.snapshot.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = Snapshot::clone(&guard);
        let changed = change(&mut next);
        if changed {
            *guard = Arc::new(next);
        }
        changed
    }
}

/// The guards at one moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    host: HostAddresses,
    own_listeners: Vec<SocketAddr>,
    closed: Vec<SocketAddr>,
}

impl Snapshot {
    /// The guards that a destination is under: any of [`Guard::Metadata`], [`Guard::Host`] and
    /// [`Guard::Daemon`]. `dialled` is the address that `connect` would be given; `port` is ignored
    /// for protocols without ports.
    pub fn classify(&self, dialled: IpAddr, port: u16, protocol: Protocol) -> GuardSet {
        let embedded = match dialled {
            IpAddr::V4(_) => None,
            IpAddr::V6(v6) => carried_ipv4(v6),
        };
        let mut guards = GuardSet::EMPTY;
        for address in std::iter::once(dialled).chain(embedded.map(IpAddr::V4)) {
            if is_metadata(address) {
                guards = guards.with(Guard::Metadata);
            }
            if is_loopback(address) || self.host.owns(address) {
                guards = guards.with(Guard::Host);
            }
            if protocol == Protocol::Tcp && self.is_closed(address, port) {
                guards = guards.with(Guard::Daemon);
            }
        }
        guards
    }

    fn is_closed(&self, address: IpAddr, port: u16) -> bool {
        self.own_listeners.iter().chain(&self.closed).any(|listener| {
            listener.port() == port
                && (listener.ip() == address
                    // A wildcard listener is reached at every address of the host, of both families
                    // unless it was bound otherwise, which is not known here.
                    || listener.ip().is_unspecified() && (is_loopback(address) || self.host.owns(address))
                    // The kernel takes a connection to 0.0.0.0 or :: to loopback.
                    || address.is_unspecified() && is_loopback(listener.ip()))
        })
    }
}

/// Addresses that a host owns.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct HostAddresses {
    addresses: HashSet<IpAddr>,
    /// Prefixes on loopback interfaces: Linux takes every address inside them for its own.
    loopback_prefixes: Vec<IpNet>,
}

impl HostAddresses {
    /// From addresses of interfaces, and prefixes of loopback interfaces.
    pub fn new(
        addresses: impl IntoIterator<Item = IpAddr>,
        loopback_prefixes: impl IntoIterator<Item = IpNet>,
    ) -> Self {
        let mut loopback_prefixes: Vec<_> = loopback_prefixes.into_iter().map(|net| net.trunc()).collect();
        loopback_prefixes.sort_unstable();
        loopback_prefixes.dedup();
        Self {
            addresses: addresses.into_iter().map(|a| a.to_canonical()).collect(),
            loopback_prefixes,
        }
    }

    /// Asks the host.
    ///
    /// # Errors
    /// The host's error when its interfaces cannot be listed.
    pub fn enumerate() -> std::io::Result<Self> {
        let mut addresses = Vec::new();
        let mut prefixes = Vec::new();
        for interface in nix::ifaddrs::getifaddrs()? {
            let Some(address) = interface.address.as_ref().and_then(to_address) else {
                continue;
            };
            addresses.push(address);
            if interface
                .flags
                .contains(nix::net::if_::InterfaceFlags::IFF_LOOPBACK)
                && let Some(mask) = interface.netmask.as_ref().and_then(to_address)
                && let Ok(net) = IpNet::with_netmask(address, mask)
            {
                prefixes.push(net);
            }
        }
        Ok(Self::new(addresses, prefixes))
    }

    fn owns(&self, address: IpAddr) -> bool {
        self.addresses.contains(&address) || self.loopback_prefixes.iter().any(|net| net.contains(&address))
    }

    /// In order, loopback aside.
    fn reported(&self) -> Vec<IpAddr> {
        let mut addresses: Vec<_> = self
            .addresses
            .iter()
            .copied()
            .filter(|a| !is_loopback(*a))
            .collect();
        addresses.sort_unstable();
        addresses
    }
}

fn to_address(storage: &nix::sys::socket::SockaddrStorage) -> Option<IpAddr> {
    let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
    v4.or_else(|| storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
}

fn canonical_socket(socket: SocketAddr) -> SocketAddr {
    SocketAddr::new(socket.ip().to_canonical(), socket.port())
}

/// Where the kernel takes a connection to the host itself whatever its interfaces are.
fn is_loopback(address: IpAddr) -> bool {
    LOOPBACK.iter().any(|net| net.contains(&address))
}

fn is_metadata(address: IpAddr) -> bool {
    METADATA.iter().any(|net| net.contains(&address))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guards() -> Guards {
        let host = HostAddresses::new(
            ["198.51.100.7", "2001:db8::7", "127.0.0.1", "::1"].map(|a| a.parse().unwrap()),
            ["127.0.0.1/8", "10.99.0.1/24"].map(|n| n.parse().unwrap()),
        );
        let guards = Guards::new(host, ["127.0.0.1:9000".parse().unwrap()]);
        guards.set_closed(vec![
            "0.0.0.0:9443".parse().unwrap(),
            "198.51.100.7:9444".parse().unwrap(),
        ]);
        guards
    }

    fn names(guards: &Guards, dialled: &str, port: u16, protocol: Protocol) -> Vec<Guard> {
        guards
            .classify(dialled.parse().unwrap(), port, protocol)
            .iter()
            .collect()
    }

    #[test]
    fn destinations_are_under_the_guards_of_the_table() {
        use Guard::{Daemon, Host, Metadata};
        let table: &[(&str, u16, &[Guard])] = &[
            // Ordinary.
            ("192.0.2.1", 443, &[]),
            ("2001:db8::8", 443, &[]),
            ("10.98.0.1", 80, &[]),
            // The host, in all spellings.
            ("127.0.0.1", 80, &[Host]),
            ("127.200.3.4", 80, &[Host]),
            ("0.0.0.0", 80, &[Host]),
            ("0.1.2.3", 80, &[Host]),
            ("::1", 80, &[Host]),
            ("::", 80, &[Host]),
            ("::ffff:127.0.0.1", 80, &[Host]),
            ("::127.0.0.1", 80, &[Host]),
            ("64:ff9b::7f00:1", 80, &[Host]),
            ("2002:7f00:1::", 80, &[Host]),
            ("198.51.100.7", 80, &[Host]),
            ("::ffff:198.51.100.7", 80, &[Host]),
            ("2001:db8::7", 80, &[Host]),
            // Every address of a prefix on a loopback interface.
            ("10.99.0.200", 80, &[Host]),
            ("10.99.1.1", 80, &[]),
            // Metadata and link-local.
            ("169.254.169.254", 80, &[Metadata]),
            ("169.254.0.1", 80, &[Metadata]),
            ("::ffff:169.254.169.254", 80, &[Metadata]),
            ("64:ff9b::a9fe:a9fe", 80, &[Metadata]),
            ("fe80::1", 80, &[Metadata]),
            ("febf::1", 80, &[Metadata]),
            ("fec0::1", 80, &[]),
            ("fd00:ec2::254", 80, &[Metadata]),
            ("fd00:ec2::253", 80, &[]),
            ("100.100.100.200", 80, &[Metadata]),
            ("192.0.0.192", 80, &[Metadata]),
            ("168.63.129.16", 80, &[Metadata]),
            // Daemons, wildcard listeners and the kernel's 0.0.0.0 included.
            ("127.0.0.1", 9000, &[Host, Daemon]),
            ("::ffff:127.0.0.1", 9000, &[Host, Daemon]),
            ("0.0.0.0", 9000, &[Host, Daemon]),
            ("127.0.0.2", 9000, &[Host]),
            ("127.0.0.1", 9443, &[Host, Daemon]),
            ("198.51.100.7", 9443, &[Host, Daemon]),
            ("2001:db8::7", 9443, &[Host, Daemon]),
            ("192.0.2.1", 9443, &[]),
            ("198.51.100.7", 9444, &[Host, Daemon]),
            ("127.0.0.1", 9444, &[Host]),
        ];
        let guards = guards();
        for (dialled, port, expected) in table {
            assert_eq!(
                names(&guards, dialled, *port, Protocol::Tcp),
                *expected,
                "{dialled}:{port}"
            );
        }
    }

    #[test]
    fn a_listener_of_a_daemon_closes_tcp_only() {
        let guards = guards();
        assert_eq!(names(&guards, "127.0.0.1", 9000, Protocol::Udp), [Guard::Host]);
        assert_eq!(names(&guards, "127.0.0.1", 0, Protocol::Icmp), [Guard::Host]);

        guards.add_listener("[::1]:9001".parse().unwrap());
        assert_eq!(
            names(&guards, "::1", 9001, Protocol::Tcp),
            [Guard::Host, Guard::Daemon]
        );
    }

    #[test]
    fn what_is_told_of_is_what_is_the_daemons_own_once_and_canonical() {
        let guards = guards();
        guards.add_listener("[::ffff:127.0.0.1]:9000".parse().unwrap());
        guards.add_listener("[::]:9001".parse().unwrap());
        let own: Vec<_> = guards.own_listeners().iter().map(ToString::to_string).collect();
        assert_eq!(own, ["127.0.0.1:9000", "[::]:9001"]);
    }

    #[test]
    fn only_a_difference_is_a_change() {
        let guards = guards();
        let host = HostAddresses::new(["203.0.113.9".parse().unwrap()], []);

        assert!(guards.set_host(host.clone()));
        assert!(!guards.set_host(host));
        assert!(!guards.set_closed(vec![
            "198.51.100.7:9444".parse().unwrap(),
            "0.0.0.0:9443".parse().unwrap()
        ]));
        assert!(guards.set_closed(Vec::new()));

        assert_eq!(names(&guards, "203.0.113.9", 80, Protocol::Tcp), [Guard::Host]);
        assert_eq!(names(&guards, "198.51.100.7", 80, Protocol::Tcp), []);
    }

    #[test]
    fn loopback_is_not_reported_and_the_rest_is_in_order() {
        let reported: Vec<String> = guards()
            .host_addresses()
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(reported, ["198.51.100.7", "2001:db8::7"]);
    }

    #[test]
    fn this_host_can_be_enumerated() {
        let host = HostAddresses::enumerate().unwrap();
        assert!(host.addresses.iter().any(|a| a.is_loopback()), "{host:?}");
    }
}
