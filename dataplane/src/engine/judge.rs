//! What is decided about a new flow, and on what evidence: where it would go, and what the cache says.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use vnet_proto::model::special::{is_private_or_special, is_refused};
use vnet_proto::model::{FlowKey, FlowSubject, Guard, Protocol, Reason, VerdictAction, VmId};

use crate::engine::cache::{Decision, Standing};
use crate::engine::frame::DropReason;
use crate::engine::held::Target;
use crate::engine::inspect::Level;
use crate::engine::ip::Ip;
use crate::engine::reply::Unreachable;
use crate::engine::{Engine, Time};

/// Where a flow goes, or would go.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Its addresses as the guest sees them.
    pub(super) key: FlowKey,
    /// The address that the host would dial.
    pub(super) dialled: SocketAddr,
    /// The other guest that it is for.
    pub(super) neighbour: Option<VmId>,
}

impl Wanted {
    /// To nobody but who its addresses say.
    pub(super) fn plain(key: FlowKey) -> Self {
        Self {
            key,
            dialled: key.peer,
            neighbour: None,
        }
    }

    /// By whom misses are told apart.
    pub(super) fn target(&self) -> Target {
        let key = self.key.judged();
        Target {
            protocol: key.protocol,
            peer: key.peer,
            dialled: (self.dialled != self.key.peer).then(|| self.dialled.ip()),
            neighbour: self.neighbour,
        }
    }
}

impl Engine {
    /// Where a flow that begins with this packet would go, if it may at all.
    pub(super) fn wanted(&mut self, ip: &Ip<'_>, key: FlowKey) -> Result<Wanted, DropReason> {
        let dialled = self.dialled(key.peer);
        let neighbour = match self.check_destination(ip.destination) {
            Ok(neighbour) => neighbour,
            Err(reason) => {
                if reason == DropReason::UnknownStation {
                    self.refuse_unreachable(ip, Unreachable::Host);
                }
                return Err(reason);
            }
        };
        if neighbour.is_none() && self.synthetics.find(key.peer.ip()).is_none() {
            self.check_way(ip, dialled.ip())?;
        }
        if key.protocol == Protocol::Icmp && dialled.is_ipv6() {
            // An echo request of the one family is none of the other.
            self.refuse_unreachable(ip, Unreachable::Host);
            return Err(DropReason::HostRefused);
        }
        Ok(Wanted {
            key,
            dialled,
            neighbour,
        })
    }

    /// What a guest-visible destination is dialled as.
    pub(super) fn dialled(&self, peer: SocketAddr) -> SocketAddr {
        match self.config.nat.dialled(peer.ip()) {
            Some(address) => SocketAddr::new(address, peer.port()),
            None => peer,
        }
    }

    /// Whether a flow may go there at all, and which other guest it is that has the address.
    pub(super) fn check_destination(&self, address: IpAddr) -> Result<Option<VmId>, DropReason> {
        if self.config.nat.dialled(address).is_some() {
            return Ok(None);
        }
        if self.is_on_link(address) {
            return match self.owner_of(address) {
                // Its own address is no way out.
                Some(vm) if vm == self.config.vm => Err(DropReason::Destination),
                Some(vm) => Ok(Some(vm)),
                None => Err(DropReason::UnknownStation),
            };
        }
        if is_refused(address) {
            return Err(DropReason::Destination);
        }
        if self.is_vacant(address) {
            return Err(DropReason::UnknownStation);
        }
        Ok(None)
    }

    /// How a destination stands now.
    pub(super) fn standing(&self, wanted: &Wanted) -> Standing {
        let mut guards = self.surroundings.guards(wanted.dialled, wanted.key.protocol);
        if self.is_synthetic(wanted) {
            guards = guards.with(Guard::Synthetic);
        }
        Standing {
            guards: match wanted.neighbour {
                Some(_) => guards.with(Guard::Guest),
                None => guards,
            },
            neighbour: wanted.neighbour,
            moved: self.config.nat.dialled(wanted.key.peer.ip()),
        }
    }

    /// Whether the host has a way to what would be dialled. Where it has none, the guest is told at once,
    /// and nobody is asked about what cannot be: most hosts without IPv6 are found out so, and a program
    /// goes on to the IPv4 address without having waited.
    fn check_way(&mut self, ip: &Ip<'_>, dialled: IpAddr) -> Result<(), DropReason> {
        if dialled.is_ipv4() || self.surroundings.has_way(dialled) {
            return Ok(());
        }
        self.refuse_unreachable(ip, Unreachable::Network);
        Err(DropReason::HostRefused)
    }

    /// The cache's answer for a new flow; `None` is a miss.
    pub(super) fn decide(&self, now: Time, wanted: &Wanted) -> Option<Arc<Decision>> {
        let standing = self.standing(wanted);
        if standing.guards.contains(Guard::Daemon) {
            return Some(Arc::new(Decision {
                action: VerdictAction::Deny,
                epoch: self.cache.epoch().unwrap_or(vnet_proto::model::Epoch {
                    incarnation: 0,
                    counter: 0,
                }),
                expires_at: None,
                grant: String::new(),
                meter: None,
                reason: Reason::new("guard", "daemon", "a vnet daemon listens there; nothing opens it"),
                would_deny: false,
                once: false,
                opens_until: None,
                synthetic_only: false,
                standing,
                naming: None,
            }));
        }
        let decision = self.cache.lookup(now, &wanted.key, standing)?;
        Some(unspeakable(wanted, decision).unwrap_or_else(|| Arc::clone(decision)))
    }

    /// The evidence about a flow.
    pub(super) fn subject(&mut self, now: Time, wanted: &Wanted) -> FlowSubject {
        let mut guards = self.standing(wanted).guards;
        let address = match self.is_synthetic(wanted) {
            true if self.is_unresolved(wanted) => None,
            true => Some(wanted.dialled.ip()),
            false => Some(wanted.key.peer.ip()),
        };
        let bound = self.names_of(now, wanted.key.peer.ip());
        // A name that leads to what is dialled elsewhere leads there.
        let moved = self.config.nat.dialled(wanted.key.peer.ip());
        let mut leads_to = address.into_iter().chain(moved);
        if !bound.is_empty() && leads_to.any(is_private_or_special) {
            guards = guards.with(Guard::PrivateFromDns);
        }
        FlowSubject {
            key: wanted.key,
            dialled: wanted.dialled.ip(),
            names: bound,
            guards,
            peer_vm: wanted.neighbour,
        }
    }
}

/// What becomes of an allow that demands a name of a flow in which none can be read: to another guest it is
/// passed on as it is, and echo has none to speak.
pub(super) fn unspeakable(wanted: &Wanted, decision: &Arc<Decision>) -> Option<Arc<Decision>> {
    let level = decision.level(&wanted.key)?;
    let why = if wanted.neighbour.is_some() {
        "what is said to another guest is not read, and a name is demanded; say sni: off where that is meant"
    } else if !wanted.key.protocol.has_ports() && level == Level::Require {
        "an echo speaks no name, and one is demanded; say sni: off where that is meant"
    } else {
        return None;
    };
    Some(Arc::new(Decision {
        action: VerdictAction::Deny,
        epoch: decision.epoch,
        expires_at: decision.expires_at,
        grant: String::new(),
        reason: Reason::new("name", decision.reason.subject.clone(), why),
        would_deny: false,
        standing: decision.standing,
        naming: None,
        meter: None,
        once: false,
        opens_until: None,
        synthetic_only: false,
    }))
}
