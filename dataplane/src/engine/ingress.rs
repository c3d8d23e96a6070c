//! What comes in through forwards: connections and datagrams that the host's side opens.
//!
//! The guest sees the gateway as the client, or, where the forward is to keep it, the client's own address. No
//! verdict is asked for: who opened the forward has said that it may. What the guest answers belongs to the
//! flow, whatever address it goes to, so that it is found before anything is judged.

use std::net::{IpAddr, SocketAddr};

use rand::Rng as _;
use vnet_proto::model::special::is_refused;
use vnet_proto::model::{FlowKey, Guard, Protocol};

use crate::engine::flow::{Flow, State};
use crate::engine::judge::Wanted;
use crate::engine::stack::Connection;
use crate::engine::synthetic::table::Place;
use crate::engine::{Engine, Time};
use crate::message::{FlowEnd, ForwardId};

impl Engine {
    /// A forward accepted a connection that leads to this guest: open one towards it, from `client` where that
    /// can be. Its place, for the driver's socket; `None` when it is refused.
    pub fn open_ingress(
        &mut self,
        now: Time,
        forward: Option<ForwardId>,
        target: SocketAddr,
        client: Option<SocketAddr>,
    ) -> Option<usize> {
        if self.settings.forwards_closed || !self.flows.has_room() || !self.is_guest_address(target.ip()) {
            return None;
        }
        let key = self.ingress_key(Protocol::Tcp, target, client)?;
        let descriptor = self.take_descriptor()?;
        let seed = self.random.next_u64();
        let slot = self.rings.take()?;
        let connection = Connection::connect(now, key.peer, target, self.config.mtu_bytes, slot, seed)?;
        let at = self.new_flow(now, Wanted::plain(key), State::Tcp(Box::new(connection)));
        if let Some(flow) = self.flows.get_mut(at) {
            flow.ingress = true;
            flow.forward = forward;
            flow.descriptor = Some(descriptor);
        }
        self.report_opened(now, at, None);
        self.mark_dirty(at);
        Some(at)
    }

    /// A datagram from a client of a UDP forward: the flow's place, `None` when it is refused.
    pub fn open_ingress_udp(
        &mut self,
        now: Time,
        forward: ForwardId,
        target: SocketAddr,
        client: Option<SocketAddr>,
    ) -> Option<usize> {
        if self.settings.forwards_closed || !self.is_guest_address(target.ip()) {
            return None;
        }
        self.make_room(Protocol::Udp).ok()?;
        let key = self.ingress_key(Protocol::Udp, target, client)?;
        let at = self.new_flow(now, Wanted::plain(key), State::Udp);
        if let Some(flow) = self.flows.get_mut(at) {
            flow.ingress = true;
            flow.forward = Some(forward);
        }
        self.report_opened(now, at, None);
        self.schedule(now, at);
        Some(at)
    }

    /// Forwards are closed: cuts the flows that came through them, and says how many.
    pub fn close_forwards(&mut self, now: Time, forwards: &[ForwardId]) -> usize {
        let through = |flow: &Flow| flow.forward.is_some_and(|forward| forwards.contains(&forward));
        let places = self.flows.places().into_iter();
        let cut = places.filter(|at| {
            let there = self.flows.get(*at).is_some_and(through);
            if there {
                self.cut(now, *at, FlowEnd::Cut);
            }
            there
        });
        cut.count()
    }

    /// The addresses of a flow that comes in. `None`, and counted, where the client is to be seen and the guest has
    /// a flow with it between the same ports already: which of the two an answer is for could not be told.
    fn ingress_key(
        &mut self,
        protocol: Protocol,
        target: SocketAddr,
        client: Option<SocketAddr>,
    ) -> Option<FlowKey> {
        let key = |peer| FlowKey {
            protocol,
            guest: target,
            peer,
        };
        let Some(client) = client.filter(|client| self.can_show(*client, target)) else {
            return self.free_ingress_port(protocol, target).map(key);
        };
        let key = key(client);
        if self.flows.contains(&key) {
            self.ingress_refused += 1;
            self.note_status();
            return None;
        }
        Some(key)
    }

    /// Whether a guest can be shown this client: what it answers must come here, and mean nobody else. Loopback
    /// and the host's own addresses would mean the guest itself or the gateway's host; an address of the subnet
    /// another guest; one that leads elsewhere the place where it leads; a synthetic one the name that it stands for.
    fn can_show(&self, client: SocketAddr, target: SocketAddr) -> bool {
        let address = client.ip();
        let guards = self.surroundings.guards(client, Protocol::Udp);
        address.is_ipv4() == target.is_ipv4()
            && client.port() != 0
            && !is_refused(address)
            && !self.is_on_link(address)
            && self.config.nat.dialled(address).is_none()
            && !matches!(address, IpAddr::V4(v4) if self.config.nat.is_answered(v4))
            && Place::of(address).is_none()
            && !matches!(target.ip(), IpAddr::V6(v6) if v6.is_unicast_link_local())
            && !guards.contains(Guard::Host)
            && !guards.contains(Guard::Metadata)
    }

    /// A port of the gateway that no flow to this target uses (RFC 6335 §6: dynamic ports).
    fn free_ingress_port(&mut self, protocol: Protocol, target: SocketAddr) -> Option<SocketAddr> {
        const FIRST: u16 = 49_152;
        const COUNT: u16 = u16::MAX - FIRST + 1;
        let gateway = self.gateway_towards(target.ip());
        (0..COUNT).find_map(|_| {
            let port = FIRST + self.next_ingress_port % COUNT;
            self.next_ingress_port = self.next_ingress_port.wrapping_add(1);
            let client = SocketAddr::new(gateway, port);
            let key = FlowKey {
                protocol,
                guest: target,
                peer: client,
            };
            (!self.flows.contains(&key)).then_some(client)
        })
    }
}
