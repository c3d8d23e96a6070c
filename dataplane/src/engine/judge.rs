//! What is decided about a new flow, and on what evidence: where it would go, and what the cache says.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;

use vnet_proto::model::special::{is_private_or_special, is_refused};
use vnet_proto::model::{FlowKey, FlowSubject, Guard, Reason, VerdictAction};

use crate::engine::cache::Decision;
use crate::engine::frame::DropReason;
use crate::engine::ip::Ip;
use crate::engine::reply::Unreachable;
use crate::engine::{Engine, Time};

impl Engine {
    /// What a guest-visible destination is dialled as.
    pub(super) fn dialled(&self, peer: SocketAddr) -> SocketAddr {
        match (peer.ip(), self.config.host_alias) {
            (IpAddr::V4(v4), Some(alias)) if v4 == alias => {
                SocketAddr::new(Ipv4Addr::LOCALHOST.into(), peer.port())
            }
            _ => peer,
        }
    }

    /// Whether a flow may go there at all.
    pub(super) fn check_destination(&self, address: IpAddr) -> Result<(), DropReason> {
        if Some(address) == self.config.host_alias.map(IpAddr::V4) {
            return Ok(());
        }
        if self.is_on_link(address) {
            return Err(match self.surroundings.guest_at(address) {
                Some(_) => DropReason::GuestToGuest,
                None => DropReason::UnknownStation,
            });
        }
        let refused = match address {
            IpAddr::V4(v4) => v4.octets()[0] == 0 || v4.is_loopback() || v4.octets()[0] >= 224,
            IpAddr::V6(v6) => is_refused(v6),
        };
        if refused {
            return Err(DropReason::Destination);
        }
        Ok(())
    }

    /// Whether the host has a way to what would be dialled. Where it has none, the guest is told at once,
    /// and nobody is asked about what cannot be: most hosts without IPv6 are found out so, and a program
    /// goes on to the IPv4 address without having waited.
    pub(super) fn check_way(&mut self, ip: &Ip<'_>, dialled: IpAddr) -> Result<(), DropReason> {
        if dialled.is_ipv4() || self.surroundings.has_way(dialled) {
            return Ok(());
        }
        self.refuse_unreachable(ip, Unreachable::Network);
        Err(DropReason::HostRefused)
    }

    /// The cache's answer for a new flow; `None` is a miss.
    pub(super) fn decide(&self, now: Time, key: &FlowKey, dialled: SocketAddr) -> Option<Arc<Decision>> {
        let guards = self.surroundings.guards(dialled, key.protocol);
        if guards.contains(Guard::Daemon) {
            return Some(Arc::new(Decision {
                action: VerdictAction::Deny,
                epoch: self.cache.epoch().unwrap_or(vnet_proto::model::Epoch {
                    incarnation: 0,
                    counter: 0,
                }),
                expires_at: None,
                grant: String::new(),
                reason: Reason::new("guard", "daemon", "a vnet daemon listens there; nothing opens it"),
                would_deny: false,
                guards,
            }));
        }
        self.cache.lookup(now, key, guards).cloned()
    }

    /// The evidence about a flow.
    pub(super) fn subject(&mut self, now: Time, key: &FlowKey, dialled: SocketAddr) -> FlowSubject {
        let mut guards = self.surroundings.guards(dialled, key.protocol);
        let bound = self.bindings.names_of(now, key.peer.ip());
        if !bound.is_empty() && is_private_or_special(key.peer.ip()) {
            guards = guards.with(Guard::PrivateFromDns);
        }
        FlowSubject {
            key: *key,
            dialled: dialled.ip(),
            names: bound,
            guards,
            peer_vm: None,
        }
    }
}
