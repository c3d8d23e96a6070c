//! Why a forward is not opened or closed.

use std::io;
use std::net::SocketAddr;

use vnet_proto::model::{ForwardListen, NotOverUnix, Protocol};

use crate::descriptors::NoDescriptor;
use crate::forward::holder::Holder;

/// Why a forward was not opened or closed.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Something listens there already: another forward, or another program.
    #[error("{protocol} {listen} is already in use{}; close what listens there or {}", by_whom(.by), elsewhere(.listen))]
    InUse {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: ForwardListen,
        /// What has it, if the system tells.
        by: Option<Holder>,
    },
    /// There is something of that name which is no forward's to replace.
    #[error("{listen} is there already and {found}; it is left as it is: move it away or listen elsewhere")]
    PathTaken {
        /// Where.
        listen: ForwardListen,
        /// What it is.
        found: &'static str,
    },
    /// The host does not allow a port.
    #[error(
        "{protocol} {listen} may not be listened on by this user; ports below {first} need a privilege: forward a \
         higher one, or let every user have them with: sysctl net.ipv4.ip_unprivileged_port_start={port}"
    )]
    Privileged {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: SocketAddr,
        /// Its port.
        port: u16,
        /// The lowest port that needs none.
        first: u16,
    },
    /// The host does not allow it.
    #[error("{protocol} {listen} may not be listened on by this user; listen where it may")]
    NotPermitted {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: ForwardListen,
    },
    /// The host has no such address.
    #[error("{listen} is not an address of this host")]
    NoSuchAddress {
        /// Where.
        listen: SocketAddr,
    },
    /// The directory of a socket is not there.
    #[error("{listen} cannot be made, as its directory is not there; make it or listen elsewhere")]
    NoSuchDirectory {
        /// Where.
        listen: ForwardListen,
    },
    /// Anything else that the host says.
    #[error("{protocol} {listen} cannot be listened on")]
    Listen {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: ForwardListen,
        /// The host's error.
        #[source]
        source: io::Error,
    },
    /// Only TCP and UDP have ports.
    #[error("{0} cannot be forwarded (expected tcp or udp)")]
    Protocol(Protocol),
    /// Only streams pass through a Unix socket.
    #[error(transparent)]
    NotOverUnix(#[from] NotOverUnix),
    /// Nothing can be there.
    #[error("{0} is not a place in the network (expected a unicast address and a port other than 0)")]
    Target(SocketAddr),
    /// A range has no ports, or goes beyond what ports there are.
    #[error(
        "{count} ports from {listen} on to {target} on is no range (expected 1 to {most}, all below 65536, and a first port other than 0)"
    )]
    Range {
        /// Where it begins.
        listen: ForwardListen,
        /// Where that leads.
        target: SocketAddr,
        /// How many were asked for.
        count: u32,
        /// How many may be.
        most: usize,
    },
    /// There is no such forward.
    #[error("nothing is forwarded from {protocol} {listen}")]
    NotFound {
        /// TCP or UDP.
        protocol: Protocol,
        /// Where.
        listen: ForwardListen,
    },
    /// The process may have no more descriptors.
    #[error("no descriptor is left for another forward")]
    Descriptors(#[source] NoDescriptor),
    /// The limit is reached.
    #[error("{open} forwards are open, and {limit} may be; close some first")]
    TooMany {
        /// How many are open.
        open: usize,
        /// The limit.
        limit: usize,
    },
}

fn elsewhere(listen: &ForwardListen) -> &'static str {
    match listen {
        ForwardListen::Address(_) => "forward another port",
        ForwardListen::Unix(_) => "forward from another path",
    }
}

fn by_whom(holder: &Option<Holder>) -> String {
    holder
        .as_ref()
        .map_or_else(String::new, |holder| format!(" by {holder}"))
}

impl ForwardError {
    /// What the host's error says of a place to listen.
    pub(super) fn of(protocol: Protocol, listen: &ForwardListen, source: io::Error) -> Self {
        use io::ErrorKind::{AddrInUse, AddrNotAvailable, NotFound, PermissionDenied};
        let own = || listen.clone();
        match (source.kind(), listen) {
            (AddrInUse, _) => Self::InUse {
                protocol,
                listen: own(),
                by: None,
            },
            (PermissionDenied, _) => Self::denied(protocol, listen, privileged_below()),
            (AddrNotAvailable, ForwardListen::Address(address)) => Self::NoSuchAddress { listen: *address },
            (NotFound, ForwardListen::Unix(_)) => Self::NoSuchDirectory { listen: own() },
            _ => Self::Listen {
                protocol,
                listen: own(),
                source,
            },
        }
    }
}

impl ForwardError {
    fn denied(protocol: Protocol, listen: &ForwardListen, first: Option<u16>) -> Self {
        match (listen, first) {
            (ForwardListen::Address(address), Some(first)) if address.port() < first => Self::Privileged {
                protocol,
                listen: *address,
                port: address.port(),
                first,
            },
            _ => Self::NotPermitted {
                protocol,
                listen: listen.clone(),
            },
        }
    }
}

/// The lowest port that needs no privilege, where the host has such a setting (ip(7)).
fn privileged_below() -> Option<u16> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_unprivileged_port_start").ok()?;
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_that_needs_a_privilege_is_refused_with_what_helps() {
        let denied = |listen: &str, first| {
            let listen = listen.parse().unwrap();
            ForwardError::denied(Protocol::Tcp, &listen, first).to_string()
        };
        assert_eq!(
            denied("127.0.0.1:80", Some(1024)),
            "tcp 127.0.0.1:80 may not be listened on by this user; ports below 1024 need a privilege: forward a \
             higher one, or let every user have them with: sysctl net.ipv4.ip_unprivileged_port_start=80"
        );
        // By something else than that setting.
        for (listen, first) in [
            ("127.0.0.1:80", None),
            ("127.0.0.1:80", Some(80)),
            ("unix:///root/web.sock", Some(1024)),
        ] {
            assert_eq!(
                denied(listen, first),
                format!("tcp {listen} may not be listened on by this user; listen where it may")
            );
        }
    }
}
